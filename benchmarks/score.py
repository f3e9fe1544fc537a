"""Scoring: what the sums cost beside the forward pass, what depth costs, and a peer's depth scorer.

``python -m benchmarks.score [FOLDER]`` keeps the peer, optipfair, in FOLDER. Scoring layer by layer: benchmarks.stream.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.duel import duel, show
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.data.calibration_samples import Samples
from nemo_minitron.models.causal_lm import (
    decoder_of,
    frozen,
    hidden_states,
    load_model,
    new_model,
    save_model,
    stored_config,
)
from nemo_minitron.models.layer_control import LayerControl
from nemo_minitron.scoring.hooks import Measures
from nemo_minitron.scoring.pass_in_memory import in_memory, loss_sum

SHAPE = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip
DEEP = {
    **SHAPE,
    "num_hidden_layers": 24,
    "hidden_size": 256,
    "intermediate_size": 768,
    "head_dim": 32,
    "vocab_size": 1024,
}
PEER = "optipfair==0.4.2"


def saved(shape: dict[str, Any], folder: Path) -> tuple[Checkpoint, Any]:
    """A random model of a shape, on disk and in memory."""
    model = new_model(shape, seed=0)
    folder.mkdir()
    save_model(model, folder, stored_config(model, shape))
    return open_checkpoint(folder), load_model(folder)


def samples_of(shape: dict[str, Any], count: int, length: int) -> Samples:
    """Random token ids."""
    generator = torch.Generator().manual_seed(0)
    return Samples(torch.randint(0, shape["vocab_size"], (count, length + 1), generator=generator))


def one_pass(checkpoint: Checkpoint, model: Any) -> None:
    """All width axes and block influence against the same forward pass."""
    samples = samples_of(SHAPE, 4, 256)
    tokens_BS = samples.tokens_NS[:, :-1]

    def forward(part: Any) -> None:
        with frozen(model):
            part(input_ids=tokens_BS, use_cache=False)

    def score(measures: Measures) -> None:
        in_memory(model, checkpoint, samples, [[0, 1, 2, 3]], measures)

    seconds = duel(
        {
            "forward": lambda: forward(model),
            "forward without the output projection": lambda: forward(
                decoder_of(model, checkpoint.family)
            ),
            "score": lambda: score(Measures()),
            "score, l2, mean and var side by side": lambda: score(Measures(("mean", "l2", "var"))),
        },
        16,
    )
    hooks = seconds["score"] / seconds["forward without the output projection"]
    show(
        "score",
        "forward",
        seconds,
        {"score": 1.05},
        hooks_alone=f"{hooks:.3f} x the same forward without head",
    )


def against_peer(checkpoint: Checkpoint, model: Any, home: Path) -> None:
    """Block influence of layers as optipfair has it; ours with all width axes, and alone."""
    if not (home / "optipfair").is_dir():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(home),
            PEER,
        ]
        if subprocess.run(command, check=False).returncode:
            print(f"{PEER} cannot be installed: left out")
            return
    sys.path.append(str(home))
    from optipfair.pruning.depth import analyze_layer_importance

    samples = samples_of(SHAPE, 16, 256)
    groups = [list(range(i, i + 4)) for i in range(0, 16, 4)]
    batches = [{"input_ids": samples.tokens_NS[group, :-1]} for group in groups]
    theirs = analyze_layer_importance(model, batches, show_progress=False)
    sums = in_memory(model, checkpoint, samples, groups, Measures()).depth["block_influence", 1]
    ours = 1 - sums.total / sums.count
    apart = max(abs(theirs[i] - float(ours[i])) for i in theirs)
    seconds = duel(
        {
            "optipfair's layer importance": lambda: analyze_layer_importance(
                model, batches, show_progress=False
            ),
            "score, depth alone": lambda: in_memory(
                model, checkpoint, samples, groups, Measures(())
            ),
            "score, depth and all width axes": lambda: in_memory(
                model, checkpoint, samples, groups, Measures()
            ),
        },
        5,
    )
    show(
        "score-peer", "optipfair's layer importance", seconds, {}, largest_difference=f"{apart:.1e}"
    )


def leave_one_out(checkpoint: Checkpoint, model: Any) -> None:
    """The loss without each layer: shared prefixes against a forward pass of the whole model for each."""
    samples, family = samples_of(DEEP, 4, 128), checkpoint.family
    batch = samples.batch([0, 1, 2, 3])
    found: dict[str, list[float]] = {}

    def naive() -> None:
        losses = []
        with frozen(model), LayerControl(model, family).attached() as detour:
            for layer in range(24):
                detour.skip = frozenset({layer})
                losses.append(
                    loss_sum(
                        model,
                        family,
                        hidden_states(model, family, **batch.arguments()),
                        batch.labels_BS,
                    )[0]
                )
        found["naive"] = losses

    def whole() -> None:
        with frozen(model):
            for _ in range(24):
                loss_sum(
                    model,
                    family,
                    hidden_states(model, family, **batch.arguments()),
                    batch.labels_BS,
                )

    def shared() -> None:
        measures = Measures((), influence=(), losses=(1,))
        found["shared"] = (
            in_memory(model, checkpoint, samples, [[0, 1, 2, 3]], measures)
            .depth["lm_loss", 1]
            .total.tolist()
        )

    seconds = duel(
        {
            "24 full forward passes": whole,
            "24 passes, a layer left out": naive,
            "shared prefixes": shared,
        },
        4,
    )
    apart = max(abs(a - b) for a, b in zip(found["naive"], found["shared"], strict=True)) / max(
        found["naive"]
    )
    show(
        "score-depth",
        "24 full forward passes",
        seconds,
        {"shared prefixes": 1 / 1.8},
        largest_difference=f"{apart:.1e}",
    )


def main() -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as name:
        small = saved(SHAPE, Path(name) / "small")
        one_pass(*small)
        against_peer(*small, Path(sys.argv[1] if len(sys.argv) > 1 else name))
        leave_one_out(*saved(DEEP, Path(name) / "deep"))


if __name__ == "__main__":
    main()
