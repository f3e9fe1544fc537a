"""Side by side with other techniques: one trained teacher, equal sizes, before and after the same distillation.

Protocol: a Llama per seed is cut along one axis at a time, by each technique's criterion (``criteria``), to the same size;
every student then takes the same steps on the same samples. Ours, magnitude and chance stand in every group. All others
read the calibration samples that ours reads.

* neurons: LLM-Pruner, FLAP, optipfair's peak-to-peak magnitude, Model-Optimizer's formula (that of ours: the same ranking)
* query heads: LLM-Pruner, FLAP, Model-Optimizer's formula (which takes a channel's mean over positions first, ours a head's norm)
* hidden channels: LLM-Pruner, Model-Optimizer's formula, SliceGPT's rotation (one for all blocks)
* layers: mergekit's usual passthrough slice (the block before the last layer goes, whatever the data), LLM-Pruner

What each leaves out: FLAP its bias compensation, LLM-Pruner its LoRA, and both that layers keep as many units as a global
ranking gives them (config.json has one number); optipfair ranks layers by block influence, as ours by default.

``--model FOLDER --data FILE ...`` measures a model of one's own instead: neurons to two thirds, 48 x 512 calibration tokens
of the text that is given, held-out loss before training (after it with ``--steps``).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.paper.lab import Lab, Model, to
from benchmarks.paper.verdict import Claim
from nemo_minitron.checkpoints.checkpoint import open_checkpoint

TITLE = "Side by side with other techniques"
GROUPS = {
    "ffn": ("neurons", ("llm-pruner", "flap", "optipfair", "model-optimizer")),
    "heads": ("heads", ("llm-pruner", "flap", "model-optimizer")),
    "hidden": ("hidden", ("llm-pruner", "model-optimizer", "slicegpt")),
    "layers": ("layers", ("llm-pruner",)),
}
"""Axis to its name in tables and the criteria that rank it."""


def _claims() -> tuple[Claim, ...]:
    found = []
    for title, criteria in GROUPS.values():
        others = ("magnitude", "random", *criteria, *(["mergekit"] if title == "layers" else []))
        for other in others:
            if other == "model-optimizer" and title == "neurons":
                continue  # the same ranking
            for metric, when in (("pruned", "right after the cut"), ("loss", "after retraining")):
                found.append(
                    Claim(f"{title}: ours beats {other}, {when}", "[P1] table 4: MMLU 63.8; LLM-Pruner 25.2, SliceGPT 37.1, LaCo 45.9, ShortGPT 54.7",
                          f"{title}: ours", (f"{title}: {other}",), metric)
                )  # fmt: skip
    return tuple(found)


CLAIMS = _claims()
NOTE = """Rotating the residual stream before its channels are cut is far ahead, in plain torch, too (`benchmarks/paper/checks/rotation.py`, first teacher, 3.941): 64 channels to 48
by activations 4.279 right after the cut, 4.020 after 60 steps and 3.954 after 240; by chance 4.309, 4.014, 3.949; rotated 3.948, 3.948, 3.945. The stream of so small a model
fills few directions, and no channel is one of them: which channels stay hardly matters, activations or chance. Whether that is so with thousands of channels has not been measured. SliceGPT itself, with a rotation for every block, is
[P1]'s comparison, without retraining. A rotation is no row of `minitron`: the gain of the last norm has to go into the head, so that a tied head would become a matrix of its own (SmolLM2-135M at 448 channels:
22 M parameters more). LLM-Pruner's hidden channels are worse right after the cut and better by .007 after 60 steps, where chance is as good as either."""


def measure(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one seed."""
    yield "teacher", lab.measured(Model(family="llama"))
    for axis, (title, criteria) in GROUPS.items():
        size = lab.profile.sizes["glu"][axis]
        cut = to({axis: size})
        steps = lab.profile.short
        ways = {"ours": Model(cut, steps=steps, family="llama")}
        if axis == "layers":
            words = (*cut, "score.depth=lm_loss")
            ways["ours, by loss"] = Model(words, steps=steps, family="llama")
            ways["mergekit"] = Model((_slice(lab, size),), steps=steps, family="llama")
        ways |= {
            name: Model((*cut, f"score.importance={name}"), steps=steps, family="llama")
            for name in ("magnitude", "random")
        }
        ways |= {
            name: Model(
                cut, steps=steps, family="llama", criterion=name, taught_by=Model(family="llama")
            )
            for name in criteria
        }
        for name, model in ways.items():
            yield f"{title}: {name}", lab.before_and_after(model)


def _slice(lab: Lab, size: int) -> str:
    """The block that a passthrough merge leaves out by habit: it ends before the last layer."""
    layers = open_checkpoint(lab.teacher("llama")).architecture.sizes["layers"]
    gone = range(size - 1, layers - 1)
    return f"plan.drop_layers=[{','.join(map(str, gone))}]"


def measure_given(lab: Lab, steps: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a model of one's own: neurons to two thirds."""
    ffn = open_checkpoint(lab.teacher()).architecture.sizes["ffn"]
    cut = to({"ffn": round(ffn * 2 / 3 / 64) * 64})
    yield "teacher", lab.measured(Model())
    ways = {"ours": Model(cut, steps=steps)}
    ways |= {
        name: Model((*cut, f"score.importance={name}"), steps=steps)
        for name in ("magnitude", "random")
    }
    ways |= {
        name: Model(cut, steps=steps, criterion=name, taught_by=Model() if steps else None)
        for name in GROUPS["ffn"][1]
    }
    for name, model in ways.items():
        yield f"neurons: {name}", lab.before_and_after(model) if steps else lab.measured(model)


def given_words(data: list[str]) -> tuple[str, ...]:
    """Overrides for a model of one's own: 48 x 512 calibration tokens, 32 held-out samples."""
    return (
        f"data.train.paths=[{','.join(str(Path(path).resolve()) for path in data)}]", "data.train.exclude=[]",
        *(f"data.{text}.sequence_length=512" for text in ("train", "calibration", "validation")),
        "data.calibration.samples=48", "data.validation.samples=32", "data.holdout=0.2", "score.depth=none",
        "distill.batch_size=4", "optim.lr=1e-4", "optim.sched.min_lr=1e-5",
    )  # fmt: skip


def pictures(rows: Any) -> Iterator[tuple[str, Any]]:
    """Loss of each way, before and after."""
    from benchmarks.paper.pictures import before_and_after

    yield "side_by_side", before_and_after(rows)
