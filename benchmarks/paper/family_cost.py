"""What a family of three costs: by the paper's sizes, and a toy family.

Protocol: (a) FLOPs of a training step (three forward passes, 1152 x 4096 tokens) of the 15B, 8B and 4B by our counter, from
their config.json alone; all three from scratch against the largest from scratch and two on a fortieth of the tokens,
without and with the teacher's forward passes. The paper's numbers (4.4e17, 2.5e17, 1.2e17) count attention to all 4096
positions, as Megatron does; with the half that a causal model attends to on average they are 4.2e17, 2.3e17 and 1.1e17. (b) A toy family: the teacher; the middle one, cut from it and distilled;
the smallest, cut from the middle one, taught by the largest. Beside it the same shapes trained from scratch on the
teacher's tokens. Measured: FLOPs of all trainings, and the losses that they buy.
Claim: model card and [P1] section 4: 1.8 times cheaper (4.4e17, 2.5e17 and 1.2e17 FLOPs a step give 1.803).
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.paper.lab import Lab, Model, to
from benchmarks.paper.verdict import Claim
from nemo_minitron.families import Architecture, families
from nemo_minitron.pruning.cost import model_size

TITLE = "The cost of a family of three"
_SIZES = {"15B": (6144, 48, 24576), "8B": (4096, 48, 16384), "4B": (3072, 24, 9216)}
_STEP = 1152 * 4096
"""Tokens of a step."""
_FACTOR = 40
CLAIMS = (
    *(
        Claim(f"A training step of the {size} takes {paper}e17 FLOPs (± 0.05)", f"{paper}e17", "paper's family", (),
              f"flops_{size}", True, margin=0.051, least=paper, exact=True)
        for size, paper in (("15B", 4.4), ("8B", 2.5), ("4B", 1.2))
    ),
    Claim("The paper's family is 1.8 times cheaper, by our counter (1.803 ± 0.02)", "1.803", "paper's family", (),
          "ratio", True, margin=0.02, least=1.803, exact=True),
    Claim("With the teacher's forward passes (1.774 ± 0.02)", "1.774", "paper's family", (), "ratio_with_teacher",
          True, margin=0.02, least=1.774, exact=True),
    Claim("A toy family is cheaper than from scratch", "1.8", "toy family", (), "ratio", True, least=1.0),
    Claim("Its middle model is no worse for it (± 0.02)", "[P1] table 2", "middle, pruned", ("middle, from scratch",), margin=0.02, one_sided=True),
    Claim("Its smallest model is no worse for it (± 0.02)", "[P1] table 3", "smallest, pruned", ("smallest, from scratch",), margin=0.02,
          one_sided=True),
)  # fmt: skip


def paper_flops(causal: bool) -> dict[str, float]:
    """FLOPs of a training step of the paper's three models: 6 per weight and token, and attention's."""
    context = 4096 if causal else 2 * 4096  # our counter takes the mean position of a context
    found = {}
    for name, (hidden, heads, ffn) in _SIZES.items():
        config = {
            "model_type": "nemotron", "vocab_size": 256_000, "hidden_size": hidden, "num_hidden_layers": 32,
            "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": ffn,
            "tie_word_embeddings": False,
        }  # fmt: skip
        size = model_size(Architecture(families()["nemotron"], config), context)
        found[name] = 3.0 * size.flops_per_token * _STEP
    return found


def ratio(flops: dict[str, float], factor: float, with_teacher: bool) -> float:
    """All from scratch, against the largest from scratch and the others on 1 / factor of its tokens."""
    large, *small = flops.values()
    extra = len(small) * large / 3 if with_teacher else 0.0
    return sum(flops.values()) / (large + (sum(small) + extra) / factor)


def measure(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one seed."""
    for name, causal in (("paper's family", False), ("paper's family, causal attention", True)):
        flops = paper_flops(causal)
        yield name, {
            **{f"flops_{size}": value / 1e17 for size, value in flops.items()},
            "ratio": ratio(flops, _FACTOR, False), "ratio_with_teacher": ratio(flops, _FACTOR, True),
        }  # fmt: skip
    steps, sizes = lab.profile.steps, lab.profile.sizes
    trained = next(
        int(word.split("=")[1])
        for word in reversed(lab.profile.words)
        if word.startswith("pretrain.trainer.max_steps=")
    )
    middle = Model(to(sizes["width"]), steps=steps)
    small = Model(to(sizes["quarter"]), steps=steps, of=middle, taught_by=Model())
    rows = {
        "largest": lab.measured(Model()),
        "middle, pruned": lab.before_and_after(middle),
        "smallest, pruned": lab.before_and_after(small),
        "middle, from scratch": lab.measured(Model(middle.cut, steps=trained, scratch=True)),
        "smallest, from scratch": lab.measured(Model(small.cut, steps=trained, scratch=True)),
    }
    yield from rows.items()
    large, mid, less = (
        rows[n]["flops_per_token"] for n in ("largest", "middle, pruned", "smallest, pruned")
    )
    scratch = 3.0 * trained * (large + mid + less)
    ours = 3.0 * trained * large + steps * (3.0 * (mid + less) + 2 * large)
    yield "toy family", {"ratio": scratch / ours, "token_factor": trained / steps}
