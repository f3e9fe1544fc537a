"""transformers: what models write when they continue a prompt greedily.

Multiple choice recovers long before generation does, so both are looked at.
Shape suffixes: B samples, P positions of the prompt, N generated positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from nemo_minitron.families import Family
from nemo_minitron.losses.fused_linear_loss import cross_entropy
from nemo_minitron.models.causal_lm import head_of, hidden_states, projection_of

_GRAM = 4


def continue_greedily(model: Any, prompts_BP: Tensor, new_tokens: int) -> Tensor:
    """Greedy continuations, Tensor of shape [samples, new_tokens] on the CPU; never ended early.

    Args:
        model: a causal LM in evaluation mode.
        prompts_BP: token ids, all prompts of one length.
        new_tokens: how many. Nothing else decides: what the model's generation_config.json asks for
            (penalties, banned tokens, n-grams) would hide what the model itself prefers.
    """
    device = head_of(model).device
    prompts_BP = prompts_BP.to(device)
    own = model.generation_config
    # transformers fills in from the model's own settings what an argument leaves open
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1,
        eos_token_id=own.eos_token_id, pad_token_id=0, use_cache=True,
    )  # fmt: skip
    try:
        ids_BS = model.generate(prompts_BP, attention_mask=torch.ones_like(prompts_BP))
    finally:
        model.generation_config = own
    return ids_BS[:, prompts_BP.shape[1] :].cpu()


def repetition(ids_BS: Tensor) -> float:
    """Share of a continuation's runs of four tokens that occurred in it before; mean over continuations.

    A model that is lost says the same thing again and again.
    """
    shares = []
    for row in ids_BS.tolist():
        grams = [tuple(row[i : i + _GRAM]) for i in range(len(row) - _GRAM + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)


def agreement(theirs_BN: Tensor, ours_BN: Tensor) -> float:
    """Prefix match: share of the teacher's continuation that a model repeats up to the first difference."""
    same_BN = (theirs_BN == ours_BN).long().cumprod(1)
    return float(same_BN.float().mean())


def loss_of(model: Any, family: Family, prompts_BP: Tensor, ids_BS: Tensor) -> float:
    """A model's (the teacher's) mean cross-entropy on continuations, in nats per generated token."""
    device = head_of(model).device
    tokens_BS = torch.cat([prompts_BP, ids_BS], 1).to(device)
    labels_BS = tokens_BS[:, 1:].clone()
    labels_BS[:, : prompts_BP.shape[1] - 1] = -1
    hidden_TH = hidden_states(model, family, tokens_BS[:, :-1]).flatten(0, 1)
    terms = cross_entropy(projection_of(model, family, hidden_TH), labels_BS.flatten())
    return float(terms.ce)


def as_text(tokenizer: Any, rows: Sequence[Any]) -> list[str]:
    """Token ids as text."""
    return [tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in rows]
