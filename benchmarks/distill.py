"""A distillation step against the passes it cannot do without, and the fused loss against the naive one."""

import torch

from benchmarks.duel import duel, show
from nemo_minitron.families import families
from nemo_minitron.losses.divergences import forward_kl
from nemo_minitron.losses.fused_linear_loss import LossWeights, fused_linear_loss
from nemo_minitron.losses.projection import Projection
from nemo_minitron.models.causal_lm import frozen, head_of, hidden_states, new_model

TEACHER = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip
STUDENT = {**TEACHER, "hidden_size": 384, "intermediate_size": 1024}


def step() -> None:
    """The step: teacher forward, student forward and backward, with the logits of both in either case."""
    family = families()["llama"]
    teacher, student = (
        new_model(TEACHER, 0).eval().requires_grad_(False),
        new_model(STUDENT, 1).train(),
    )
    tokens_BS = torch.randint(0, TEACHER["vocab_size"], (4, 257))
    labels_T = tokens_BS[:, 1:].flatten()

    def passes() -> None:
        with frozen(teacher):
            teacher(input_ids=tokens_BS[:, :-1], use_cache=False)
        logits = student(input_ids=tokens_BS[:, :-1], use_cache=False).logits
        student.zero_grad()
        logits.backward(torch.ones_like(logits))

    def distil() -> None:
        with frozen(teacher):
            teacher_TG = hidden_states(teacher, family, tokens_BS[:, :-1]).flatten(0, 1)
        student_TH = hidden_states(student, family, tokens_BS[:, :-1]).flatten(0, 1)
        ours, theirs = (
            Projection(student_TH, head_of(student)),
            Projection(teacher_TG, head_of(teacher)),
        )
        loss = fused_linear_loss(ours, labels_T, LossWeights(), theirs).loss
        student.zero_grad()
        loss.backward()

    seconds = duel(
        {"teacher forward + student forward/backward": passes, "distillation step": distil}, 10
    )
    show(
        "distill-step",
        "teacher forward + student forward/backward",
        seconds,
        {"distillation step": 1.10},
    )


def loss() -> None:
    """The loss alone, at a vocabulary where logits are most of the memory."""
    tokens, vocabulary, hidden = 1024, 65536, 256
    student_TH = torch.randn(tokens, hidden, requires_grad=True)
    head_VH = (torch.randn(vocabulary, hidden) * 0.05).requires_grad_()
    teacher_TH, teacher_VH = torch.randn(tokens, hidden), torch.randn(vocabulary, hidden) * 0.05
    labels_T = torch.randint(0, vocabulary, (tokens,))

    def naive() -> None:
        student_TH.grad = head_VH.grad = None
        forward_kl(teacher_TH @ teacher_VH.T, student_TH @ head_VH.T).mean().backward()

    def fused() -> None:
        student_TH.grad = head_VH.grad = None
        ours, theirs = Projection(student_TH, head_VH), Projection(teacher_TH, teacher_VH)
        fused_linear_loss(ours, labels_T, LossWeights(), theirs).loss.backward()

    seconds = duel({"naive": naive, "fused": fused}, 4)
    show("distill-loss", "naive", seconds, {"fused": 1.05})


def main() -> None:
    """Measures and prints."""
    step()
    loss()


if __name__ == "__main__":
    main()
