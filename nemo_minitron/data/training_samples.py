"""Samples for training: windows of the workspace's token caches."""

import sys
from typing import Any

from nemo_minitron.config.config import Config, workspace_of
from nemo_minitron.data.mixtures import training_mixture
from nemo_minitron.workspace.layout import Workspace
from nemo_minitron.workspace.manifest import digest
from nemo_minitron.workspace.progress_bar import bar

_CHEAP = 200_000_000
"""Tokens up to which ``windows.SPREAD`` times as many are made as a training needs."""


def training_samples(config: Config, tokenizer: Any, needed: int, per_step: int, ranks: Any) -> Any:
    """Packed samples of ``data.train``, mapped from the workspace's token caches.

    Rank 0 makes what is not there yet, the others wait.

    Args:
        config: the whole configuration.
        tokenizer: the tokenizer that packs.
        needed: samples that the training consumes; where there are fewer, they come again.
        per_step: samples that one step takes, over all ranks.
        ranks: this process among those of torchrun.

    Raises:
        ValueError: no text, or too little for ``data.train.samples`` or for one step.
    """
    from nemo_minitron.data.token_cache import PackedTokens, places
    from nemo_minitron.data.tokenisation import begin_tokens

    ranks.first(lambda: _streams(config, tokenizer, needed))
    streams = _streams(config, tokenizer, needed)
    text = config.data.train
    weights = [weight for _, weight in training_mixture(config)]
    try:
        found = places([len(s) for s in streams], weights, text.sequence_length, needed, text.seed)
    except ValueError as error:
        raise ValueError(f"data.train: {error}") from error
    if text.samples is not None and len(found) < text.samples:
        raise ValueError(
            f"data.train.samples: expected {text.samples} samples of {text.sequence_length} tokens, the text "
            f"yields {len(found)}"
        )
    if len(found) < per_step:
        raise ValueError(
            f"data.train: a step takes {per_step:,} samples (batch_size, times accumulate_grad_batches and "
            f"ranks), the text yields {len(found):,} of {text.sequence_length:,} tokens; use a smaller "
            "batch_size, or more text"
        )
    if text.samples is None and needed >= 2 * len(found) and ranks.rank == 0:
        print(
            f"data.train: the text yields {len(found):,} samples of {text.sequence_length:,} tokens, each of "
            f"which is read {needed / len(found):.1f} times",
            file=sys.stderr,
        )
    samples = PackedTokens(streams, found, text.sequence_length, begin_tokens(tokenizer))
    if text.learn_from == "answers":
        _check_learned(samples, tokenizer.eos_token_id)
        if ranks.rank == 0 and not any((ids < 0).any() for ids in streams):
            print(
                "data.train: learn_from=answers, and every token is learned: the text holds no conversation",
                file=sys.stderr,
            )
    return samples


def _check_learned(samples: Any, end: int | None) -> None:
    """Refuses samples in which nothing but ends of documents is learned; the first one usually settles it.

    Raises:
        ValueError: they are so.
    """
    for number in range(len(samples)):
        labels = samples[number][1:]
        if ((labels >= 0) & (labels != (-1 if end is None else end))).any():
            return
    raise ValueError(
        f"data.train: learn_from=answers, but none of {len(samples)} samples of {samples.positions} tokens "
        "holds an answer: no message of role 'assistant' is in reach; look at the roles in the data, or use "
        "learn_from=all"
    )


def sample_fingerprint(samples: Any) -> str:
    """Fingerprint of the samples: their places, and the first and last sample in full."""
    edges = [*range(min(16, len(samples))), *range(max(0, len(samples) - 16), len(samples))]
    return digest([samples.places_N2.tolist(), [samples[i].tolist() for i in edges]])


def _streams(config: Config, tokenizer: Any, needed: int) -> list[Any]:
    from nemo_minitron.data.token_cache import cached_tokens
    from nemo_minitron.data.windows import SPREAD

    text, mixture = config.data.train, training_mixture(config)
    streams = []
    for texts, weight in mixture:
        share = needed * weight / sum(other for _, other in mixture) * text.sequence_length
        wanted = int(share * max(1, min(SPREAD, _CHEAP / share))) + 1
        with bar("tokenising", wanted) as advance:
            ids = cached_tokens(
                Workspace(workspace_of(config)).tokens, texts, tokenizer, text.seed, wanted,
                text.learn_from == "answers", advance,
            )  # fmt: skip
        streams.append(ids[:wanted])
    return streams
