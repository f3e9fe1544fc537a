"""Losses right after a cut of neurons, in plain torch: ``python -m benchmarks.paper.checks.rankings MODEL TEXT.jsonl KEEP``.

MODEL: a Hugging Face folder (Nemotron or Llama), as runs/paper/quick/seed-0/teacher-nemotron/pretrain/hf. Each layer keeps
KEEP neurons, the others are set to zero in the matrix behind them, which is what removing them does. Rankings: the nine pairs
of aggregations behind the activation function, l2 / mean before it, magnitude, chance (five draws). The order of the ways
must be that of benchmarks/paper/aggregation.py.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

LENGTH, CALIBRATION, HELD_OUT = 64, 128, 256


def windows(path: Path, tokenizer: object, count: int) -> torch.Tensor:
    """Samples from the end of a text that is one JSON object per line."""
    ids: list[int] = []
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        ids += tokenizer(json.loads(line)["text"])["input_ids"]  # type: ignore[operator]
        if len(ids) >= count * (LENGTH + 1):
            break
    return torch.tensor(ids[: count * (LENGTH + 1)]).view(count, LENGTH + 1)


def aggregate(x_NSU: torch.Tensor, batch: str, sequence: str) -> torch.Tensor:
    """[P1] section 2.2, written out."""

    def along(x: torch.Tensor, how: str, axis: int) -> torch.Tensor:
        if how == "mean":
            return x.abs().mean(axis)
        return x.square().sum(axis).sqrt() if how == "l2" else x.var(axis, unbiased=False)

    return along(along(x_NSU, sequence, 1), batch, 0)


def main() -> None:
    """Prints a loss per way."""
    folder, text, keep = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    samples = windows(text, tokenizer, CALIBRATION + HELD_OUT)
    calibration, held_out = samples[:CALIBRATION], samples[CALIBRATION:]
    layers = model.model.layers
    behind: list[list[torch.Tensor]] = [[] for _ in layers]
    before: list[list[torch.Tensor]] = [[] for _ in layers]
    handles = []
    for number, layer in enumerate(layers):
        handles += [
            layer.mlp.down_proj.register_forward_hook(
                lambda _m, x, _y, i=number: behind[i].append(x[0].double())
            ),
            layer.mlp.up_proj.register_forward_hook(
                lambda _m, _x, y, i=number: before[i].append(y.double())
            ),
        ]
    with torch.no_grad():
        for batch in calibration.split(16):
            model(batch[:, :-1])
    for handle in handles:
        handle.remove()
    down = [layer.mlp.down_proj.weight.data.clone() for layer in layers]

    def loss(scores: list[torch.Tensor]) -> float:
        for layer, weight, score in zip(layers, down, scores, strict=True):
            gone = score.argsort(descending=True, stable=True)[keep:]
            layer.mlp.down_proj.weight.data = weight.index_fill(1, gone, 0.0)
        with torch.no_grad():
            return float(model(held_out, labels=held_out).loss)

    def ways() -> Iterator[tuple[str, list[torch.Tensor]]]:
        for batch in ("l2", "mean", "var"):
            for sequence in ("mean", "l2", "var"):
                yield (
                    f"{batch} / {sequence}",
                    [aggregate(torch.cat(x), batch, sequence) for x in behind],
                )
        yield "before the activation", [aggregate(torch.cat(x), "l2", "mean") for x in before]
        yield "magnitude", [
            (layer.mlp.up_proj.weight.square().sum(1) + weight.square().sum(0)).detach()
            for layer, weight in zip(layers, down, strict=True)
        ]  # fmt: skip
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            yield (
                f"random {seed}",
                [torch.rand(weight.shape[1], generator=generator) for weight in down],
            )

    with torch.no_grad():
        print(f"{'whole':<22} {float(model(held_out, labels=held_out).loss):.4f}")
    for name, scores in ways():
        print(f"{name:<22} {loss(scores):.4f}")


if __name__ == "__main__":
    main()
