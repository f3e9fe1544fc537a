"""Width against depth at equal size, in plain torch: ``python -m benchmarks.paper.checks.width_or_depth MODEL TEXT.jsonl``.

MODEL: a Nemotron of Hugging Face, as runs/paper/quick/seed-0/teacher-nemotron/pretrain/hf: 6 layers of width 64, 256 neurons,
8 heads in 4 groups. It is cut to the sizes of benchmarks/paper/start.py by a ranking and a slicing of its own, and with
nothing left to a ranking: layers by the loss of all 20 choices, channels and heads one by one, by the loss without each.
Two more widths of the same size spare what costs most: all heads, or all channels. Every student then learns from the logits.

``--steps N`` is the length of the distillation; ``--teacher-steps N`` trains the teacher on for N steps before it is cut. Where
the order is that of benchmarks/results/paper/quick-start.json, it is no mistake of our slicing, our ranking or our training.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.paper.checks.rankings import LENGTH

CALIBRATION, HELD_OUT, BATCH, HEAD, LEFT = 128, 256, 16, 16, 3
PROBED = 48
"""Calibration samples by which a choice is measured."""
WIDTHS = {
    "width": (48, 4, 200),
    "width, all heads": (48, 8, 136),
    "width, all channels": (64, 4, 96),
}
"""Channels, heads and neurons of six layers, with about as many parameters as three whole layers."""


@dataclass(frozen=True)
class Keep:
    """What stays: channels of the model, layers of the model, heads and neurons of each layer."""

    hidden: Sequence[int]
    layers: Sequence[int]
    heads: Sequence[Sequence[int]]
    ffn: Sequence[Sequence[int]]


def texts(path: Path, tokenizer: Any, *counts: int) -> list[torch.Tensor]:
    """Samples to calibrate and to measure with, four of a file, and so many to train with, of all other files."""
    files = path.read_text(encoding="utf-8").splitlines()
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()

    def samples(one: int) -> torch.Tensor:
        ids = torch.tensor(tokenizer(json.loads(files[one])["text"])["input_ids"])
        return ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)

    found = []
    for count in (CALIBRATION, HELD_OUT):
        some: list[torch.Tensor] = []
        while sum(map(len, some)) < count:
            some.append(samples(order.pop())[:4])
        found.append(torch.cat(some)[:count])
    rest = torch.cat([samples(one) for one in order])
    assert len(rest) >= sum(counts), f"{len(rest)} samples for {counts}"
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(1))]
    return [*found, *rest[: sum(counts)].split(counts)]


def loss(model: torch.nn.Module, samples: torch.Tensor) -> float:
    """Cross-entropy, nats per token."""
    with torch.no_grad():
        return float(model.eval()(samples, labels=samples).loss)


def importance(model: torch.nn.Module, samples: torch.Tensor) -> dict[str, torch.Tensor]:
    """[P1] section 2.2, written out: hidden [H], heads [L, N] and ffn [L, F] by l2 over samples of the mean of |x| over positions, and block influence [L]."""
    found: dict[str, list[torch.Tensor]] = {"hidden": [], "heads": [], "ffn": [], "layers": []}

    def keep(name: str, x: torch.Tensor) -> None:
        found[name].append(x.abs().mean(1).square().sum(0).sqrt())

    def of_heads(_module: object, given: tuple[torch.Tensor]) -> None:
        keep("heads", given[0].unflatten(-1, (-1, HEAD)).norm(dim=-1))

    def of_layer(_module: object, given: tuple[torch.Tensor], made: torch.Tensor) -> None:
        alike = torch.cosine_similarity(given[0], made, dim=-1)
        found["layers"].append(1 - alike.mean())

    handles = []
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            handles.append(norm.register_forward_hook(lambda _m, _x, y: keep("hidden", y)))
        handles += [
            layer.self_attn.o_proj.register_forward_pre_hook(of_heads),
            layer.mlp.down_proj.register_forward_pre_hook(lambda _m, x: keep("ffn", x[0])),
            layer.register_forward_hook(of_layer),
        ]
    loss(model, samples)
    for handle in handles:
        handle.remove()
    scores = {name: torch.stack(of) for name, of in found.items()}
    return {**scores, "hidden": scores["hidden"].sum(0)}


def best(scores: torch.Tensor, count: int) -> list[int]:
    """The highest, in their order."""
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


def best_heads(scores: torch.Tensor, each: int) -> list[int]:
    """The highest of each pair of heads that share keys and values."""
    pairs = scores.view(-1, 2)
    return [2 * group + i for group, pair in enumerate(pairs) for i in best(pair, each)]


def cut(model: torch.nn.Module, keep: Keep) -> torch.nn.Module:
    """A smaller model from the rows and columns that stay."""
    config = transformers.NemotronConfig.from_dict(
        {
            **model.config.to_dict(), "hidden_size": len(keep.hidden), "num_hidden_layers": len(keep.layers),
            "num_attention_heads": len(keep.heads[0]), "intermediate_size": len(keep.ffn[0]),
        }
    )  # fmt: skip
    student, hidden = transformers.NemotronForCausalLM(config), torch.tensor(keep.hidden)

    def put(
        target: str, source: str, rows: torch.Tensor | None, columns: torch.Tensor | None
    ) -> None:
        value = model.get_parameter(source).data
        value = value if rows is None else value[rows]
        student.get_parameter(target).data = (
            value if columns is None else value[:, columns]
        ).clone()

    put("model.embed_tokens.weight", "model.embed_tokens.weight", None, hidden)
    put("lm_head.weight", "lm_head.weight", None, hidden)
    for part in ("weight", "bias"):
        put(f"model.norm.{part}", f"model.norm.{part}", hidden, None)
    for new, old in enumerate(keep.layers):
        heads = (torch.tensor(keep.heads[old])[:, None] * HEAD + torch.arange(HEAD)).flatten()
        neurons = torch.tensor(keep.ffn[old])
        for name, rows, columns in (
            ("self_attn.q_proj.weight", heads, hidden),
            ("self_attn.k_proj.weight", None, hidden),
            ("self_attn.v_proj.weight", None, hidden),
            ("self_attn.o_proj.weight", hidden, heads),
            ("mlp.up_proj.weight", neurons, hidden),
            ("mlp.down_proj.weight", hidden, neurons),
            *((f"{n}_layernorm.{p}", hidden, None) for n in ("input", "post_attention") for p in ("weight", "bias")),
        ):  # fmt: skip
            put(f"model.layers.{new}.{name}", f"model.layers.{old}.{name}", rows, columns)
    return student


def whole(model: torch.nn.Module) -> Keep:
    """All of a model."""
    own = model.config
    layers = range(own.num_hidden_layers)
    heads, ffn = range(own.num_attention_heads), range(own.intermediate_size)
    return Keep(range(own.hidden_size), layers, [heads] * len(layers), [ffn] * len(layers))


def choices(model: torch.nn.Module, samples: torch.Tensor) -> dict[str, Callable[[], Keep]]:
    """Every way to half the size, each chosen when it is called."""
    scores, probed = importance(model, samples), samples[:PROBED]
    everything = whole(model)
    layers = everything.layers

    def after(keep: Keep) -> float:
        return loss(cut(model, keep), probed)

    def by_activations(hidden: int, many: int, neurons: int) -> Keep:
        return Keep(
            best(scores["hidden"], hidden), layers,
            [best_heads(of, many // 4) for of in scores["heads"]], [best(of, neurons) for of in scores["ffn"]],
        )  # fmt: skip

    def one_by_one(hidden: int, _many: int, neurons: int) -> Keep:
        keep = replace(
            everything,
            heads=heads_by_loss(model, probed),
            ffn=[best(of, neurons) for of in scores["ffn"]],
        )
        while len(keep.hidden) > hidden:
            left = [[*keep.hidden[:i], *keep.hidden[i + 1 :]] for i in range(len(keep.hidden))]
            keep = min((replace(keep, hidden=one) for one in left), key=after)
        return keep

    def of_all() -> Keep:
        every = itertools.combinations(layers, LEFT)
        return min((replace(everything, layers=left) for left in every), key=after)

    return {
        **{f"{name}, by activations": partial(by_activations, *sizes) for name, sizes in WIDTHS.items()},
        "width, one by one, by the loss": partial(one_by_one, *WIDTHS["width"]),
        "depth, by block influence": lambda: replace(everything, layers=best(scores["layers"], LEFT)),
        "depth, best of all 20": of_all,
    }  # fmt: skip


def heads_by_loss(model: torch.nn.Module, samples: torch.Tensor) -> list[list[int]]:
    """A head of each pair, layer by layer the best of all 16 choices: what a head would have written is zero."""
    chosen = []
    projections = [layer.self_attn.o_proj for layer in model.model.layers]
    whole = [of.weight.data.clone() for of in projections]
    for projection in projections:
        weight, tried = projection.weight.data.clone(), []
        for sides in itertools.product((0, 1), repeat=4):
            gone = [2 * pair + 1 - side for pair, side in enumerate(sides)]
            columns = (torch.tensor(gone)[:, None] * HEAD + torch.arange(HEAD)).flatten()
            projection.weight.data = weight.index_fill(1, columns, 0.0)
            tried.append((loss(model, samples), sides, projection.weight.data))
        _, sides, projection.weight.data = min(tried, key=lambda one: one[0])
        chosen.append([2 * pair + side for pair, side in enumerate(sides)])
    for projection, weight in zip(projections, whole, strict=True):
        projection.weight.data = weight
    return chosen


def scheduled(
    parameters: list[torch.nn.Parameter], samples: torch.Tensor, rate: float
) -> Iterator[torch.Tensor]:
    """Batches; after each a step of AdamW by the gradients there are: warm-up, then cosine to a twentieth."""
    batches = samples.split(BATCH)
    warm = min(20, max(1, len(batches) // 6))
    optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: (
            min((step + 1) / warm, 1)
            * (0.05 + 0.475 * (1 + math.cos(math.pi * max(0, step - warm) / (len(batches) - warm))))
        ),
    )
    for batch in batches:
        yield batch
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        rates.step()
        optimiser.zero_grad()


def train(
    student: torch.nn.Module,
    samples: torch.Tensor,
    rate: float,
    teacher: torch.nn.Module | None = None,
) -> None:
    """Trains on the teacher's logits (KL, all entries), or on the text."""
    for batch in scheduled([*student.parameters()], samples, rate):
        made = student.train()(batch, labels=None if teacher else batch)
        if teacher is None:
            error = made.loss
        else:
            with torch.no_grad():
                p = teacher(batch).logits[:, :-1].log_softmax(-1)
            q = made.logits[:, :-1].log_softmax(-1)
            error = (p.exp() * (p - q)).sum(-1).mean()
        error.backward()


def main() -> None:
    """Prints the losses of each way, before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--teacher-steps", type=int, default=0)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--without", default="-", help="leaves out what has this in its name")
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(args.model)
    used = BATCH * args.steps, BATCH * args.teacher_steps
    calibration, held_out, taught, more = texts(args.text, tokenizer, *used)
    if args.teacher_steps:
        train(teacher, more, args.rate)
    print(
        f"teacher: {sum(p.numel() for p in teacher.parameters()):,} parameters, loss {loss(teacher, held_out):.4f}",
        flush=True,
    )
    for name, chosen in choices(teacher, calibration).items():
        if args.without in name:
            continue
        keep = chosen()
        student = cut(teacher, keep)
        size, before = sum(p.numel() for p in student.parameters()), loss(student, held_out)
        train(student, taught, args.rate, teacher)
        told = (
            f"layers {list(keep.layers)}"
            if len(keep.layers) == LEFT
            else f"hidden {len(keep.hidden)}, heads {len(keep.heads[0])}, ffn {len(keep.ffn[0])}"
        )
        print(
            f"{name:<36} {told:<30} {size:,} parameters, after the cut {before:.4f}, after training {loss(student, held_out):.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
