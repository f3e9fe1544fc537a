"""Channels dropped or rotated away, in plain torch: ``python -m benchmarks.paper.checks.rotation MODEL TEXT.jsonl``.

MODEL: a Llama of Hugging Face, as runs/paper/quick/seed-0/teacher-llama/pretrain/hf; TEXT: runs/paper/corpus/code.jsonl. Its 64 channels become
48: the highest by activations ([P1] section 2.2, written out here), 48 by chance, or the first of the residual stream's principal components
(SliceGPT, arXiv 2401.15024, with one rotation for all blocks). Every student then learns from the logits. Where the order is that of
benchmarks/results/paper/quick-side_by_side.json, it is no mistake of our slicing or our criteria.
"""

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.paper.checks.width_or_depth import BATCH, best, loss, texts, train

KEPT = 48


def norms(model: Any) -> list[torch.nn.Module]:
    """Those that read the stream inside of layers."""
    return [n for x in model.model.layers for n in (x.input_layernorm, x.post_attention_layernorm)]


def seen(model: Any, samples: torch.Tensor) -> list[torch.Tensor]:
    """What each norm gives, of shape [samples, positions, channels]."""
    found: list[torch.Tensor] = []
    handles = [n.register_forward_hook(lambda _m, _x, y: found.append(y)) for n in norms(model)]
    loss(model, samples)
    for handle in handles:
        handle.remove()
    return found


def turned(model: Any, samples: torch.Tensor) -> Any:
    """The same function of the tokens, the stream in its principal components."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        for norm, readers in (
            (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):  # fmt: skip
            for reader in readers:
                reader.weight.data *= norm.weight.data
            norm.weight.data[:] = 1
    model.lm_head.weight.data *= model.model.norm.weight.data
    model.model.norm.weight.data[:] = 1
    stream = torch.cat([x.flatten(0, 1) for x in seen(model, samples)]).double()
    q = torch.linalg.svd(stream.T @ stream).U.float()
    model.model.embed_tokens.weight.data @= q
    model.lm_head.weight.data @= q
    for layer in model.model.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.data = q.T @ writer.weight.data
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight.data @= q
        for name in ("gate_proj", "up_proj"):
            getattr(layer.mlp, name).weight.data @= q
    return model


def sliced(model: Any, channels: list[int], gain: float) -> Any:
    """Some channels; what their norms would divide by too little is a gain."""
    config = transformers.LlamaConfig.from_dict(
        {**model.config.to_dict(), "hidden_size": len(channels)}
    )
    student = transformers.LlamaForCausalLM(config)
    wide, kept = model.config.hidden_size, torch.tensor(channels)
    for name, value in model.named_parameters():
        for axis, size in enumerate(value.shape):
            reads = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight",
                                   "up_proj.weight", "embed_tokens.weight", "lm_head.weight"))  # fmt: skip
            if size == wide and axis == (1 if reads else 0):
                value = value.index_select(axis, kept)
        student.get_parameter(name).data = value.data * (gain if "norm" in name else 1)
    return student


def main() -> None:
    """Prints the losses of each way, before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 240])
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(args.model).eval()
    wide = teacher.config.hidden_size
    calibration, held_out, taught = texts(args.text, tokenizer, BATCH * max(args.steps))
    scores = torch.stack(
        [x.abs().mean(1).square().sum(0).sqrt() for x in seen(teacher, calibration)]
    )
    chance = torch.randperm(wide, generator=torch.Generator().manual_seed(0))[:KEPT].tolist()
    turn = turned(teacher, calibration)
    apart = abs(loss(turn, held_out) - loss(teacher, held_out))
    print(f"teacher {loss(teacher, held_out):.4f}, rotated {apart:.1e} apart", flush=True)
    ways = {
        "by activations": (teacher, best(scores.sum(0), KEPT), 1.0),
        "by chance": (teacher, sorted(chance), 1.0),
        "rotated": (turn, list(range(KEPT)), math.sqrt(wide / KEPT)),
    }
    for name, how in ways.items():
        before = loss(sliced(*how), held_out)
        for steps in args.steps:
            student = sliced(*how)
            train(student, taught[: BATCH * steps], 2e-3, teacher)
            after = loss(student, held_out)
            print(
                f"{name:<16} {before:.4f} after the cut, {after:.4f} after {steps} steps",
                flush=True,
            )


if __name__ == "__main__":
    main()
