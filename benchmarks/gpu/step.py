"""A distillation step of large models with random weights: what the loss and the heads add to the rest."""

from collections.abc import Iterator

import torch

from benchmarks.gpu.clock import OUT_OF_MEMORY, Row, device_of, measure
from benchmarks.gpu.shapes import LLAMA_4B, LLAMA_8B, TINY, random_model
from nemo_minitron.families import families
from nemo_minitron.losses.fused_linear_loss import LossWeights, fused_linear_loss
from nemo_minitron.losses.projection import Projection
from nemo_minitron.models.causal_lm import frozen, head_of, hidden_states, layers_of


def rows(tiny: bool) -> Iterator[Row]:
    """bf16-true, AdamW, activation checkpointing, 16,384 tokens; layers as they are and compiled."""
    device, family = device_of(tiny), families()["llama"]
    shapes = [{**config, **(TINY if tiny else {})} for config in (LLAMA_8B, LLAMA_4B)]
    samples, length = (2, 32) if tiny else (8, 2048)
    teacher = random_model(shapes[0], device).eval().requires_grad_(False)
    student = random_model(shapes[1], device).train()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=device == "cuda")
    tokens_BS = torch.randint(0, shapes[0]["vocab_size"], (samples, length + 1), device=device)

    def step(with_loss: bool) -> None:
        with frozen(teacher):
            teacher_TG = hidden_states(teacher, family, tokens_BS[:, :-1]).flatten(0, 1)
        student_TH = hidden_states(student, family, tokens_BS[:, :-1]).flatten(0, 1)
        if with_loss:
            ours, theirs = (
                Projection(student_TH, head_of(student)),
                Projection(teacher_TG, head_of(teacher)),
            )
            labels_T = tokens_BS[:, 1:].flatten()
            fused_linear_loss(ours, labels_T, LossWeights(), theirs).loss.backward()
        else:
            student_TH.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for compiled in (False, True):
        if compiled:
            for layer in [*layers_of(teacher, family), *layers_of(student, family)]:
                layer.compile(dynamic=False)
        kind = "compiled layers" if compiled else "eager layers"
        base, _ = measure(device, lambda: step(False), 2)
        yield Row(f"{kind}: without loss and heads", base, 1.0)
        whole, gib = measure(device, lambda: step(True), 2)
        speed = 0.0 if whole == OUT_OF_MEMORY else 1000 * samples * length / whole
        yield Row(f"{kind}: the whole step", whole, whole / base, gib, f"{speed:,.0f} tokens/s")
