"""The range in which a number of the configuration means something."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """A range of numbers; no number outside it, and none that is not finite, is taken.

    Attributes:
        least: the smallest number allowed.
        above: all numbers allowed are larger.
        most: the largest number allowed.
        below: all numbers allowed are smaller.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def broken_by(self, value: float) -> str | None:
        """What is expected of a number that lies outside the range; None: it lies within."""
        if not math.isfinite(value):
            return str(self) or "a finite number"
        if self.least is not None and value < self.least:
            return f"at least {self.least:,}"
        if self.above is not None and value <= self.above:
            return f"more than {self.above:,}"
        if self.most is not None and value > self.most:
            return f"at most {self.most:,}"
        if self.below is not None and value >= self.below:
            return f"less than {self.below:,}"
        return None

    def __str__(self) -> str:
        named = (
            ("at least", self.least), ("more than", self.above),
            ("at most", self.most), ("less than", self.below),
        )  # fmt: skip
        return " and ".join(f"{words} {bound:,}" for words, bound in named if bound is not None)


ANY_SEED = Bounds(least=0, most=2**32 - 1)
"""What Python, NumPy, torch and Lightning all take as a seed."""
SHARE = Bounds(least=0, below=1)

_TRAINER = {
    "max_steps": Bounds(least=1),
    "max_epochs": Bounds(least=-1),
    "accumulate_grad_batches": Bounds(least=1),
    "val_check_interval": Bounds(above=0),
    "check_val_every_n_epoch": Bounds(least=1),
    "log_every_n_steps": Bounds(least=1),
    "gradient_clip_val": Bounds(least=0),
    "limit_train_batches": Bounds(above=0),
    "limit_val_batches": Bounds(least=0),
    "num_nodes": Bounds(least=1),
}
_OPTIM = {
    "lr": Bounds(above=0),
    "betas": SHARE,
    "eps": Bounds(above=0),
    "momentum": SHARE,
    "weight_decay": Bounds(least=0),
    "sched.max_steps": Bounds(least=1),
    "sched.warmup_steps": Bounds(least=0),
    "sched.warmup_ratio": Bounds(least=0, most=1),
    "sched.constant_steps": Bounds(least=0),
    "sched.constant_ratio": Bounds(least=0, most=1),
    "sched.hold_steps": Bounds(least=0),
    "sched.min_lr": Bounds(least=0),
    "sched.power": Bounds(above=0),
}
OPTIMISERS = (
    "sgd", "adam", "adamw", "adadelta", "adamax", "adagrad", "rmsprop", "rprop", "novograd", "adafactor",
    "adan", "lamb", "fused_adam", "distributed_fused_adam", "megatron_fused_adam",
)  # fmt: skip
"""Names that NeMo knows, the last four where Apex is installed."""
SCHEDULES = (
    "WarmupPolicy", "WarmupHoldPolicy", "SquareAnnealing", "CosineAnnealing", "NoamAnnealing",
    "NoamHoldAnnealing", "WarmupHoldAnnealOneMinusSquareRoot", "WarmupHoldAnnealLinear", "WarmupAnnealing",
    "InverseSquareRootAnnealing", "T5InverseSquareRootAnnealing", "SquareRootAnnealing",
    "PolynomialDecayAnnealing", "PolynomialHoldDecayAnnealing", "StepLR", "ExponentialLR",
    "ReduceLROnPlateau", "CyclicLR",
)  # fmt: skip
"""Names that NeMo knows."""
HANDED_ON = {
    f"{section}{name}.{key}": bounds
    for section in ("", "pretrain.", "correct.")
    for name, keys in (("trainer", _TRAINER), ("optim", _OPTIM))
    for key, bounds in keys.items()
}
"""Ranges of keys in sections that are handed to Lightning and NeMo, which take or break on any number."""


def numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Name and value of the numbers in a key: itself, the entries of a list, those of a dictionary."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from numbers(f"{name}.{key}", each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from numbers(name, each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def check(name: str, bounds: Bounds, value: Any) -> None:
    """Checks the value of a key.

    Raises:
        ValueError: a number in it lies outside the range; the message names the key.
    """
    for key, number in numbers(name, value):
        expected = bounds.broken_by(number)
        if expected is not None:
            raise ValueError(f"{key}: expected {expected}, found {number!r}")


def check_handed_on(sections: Mapping[str, Any]) -> None:
    """Checks keys of the sections that are handed to Lightning and NeMo.

    Raises:
        ValueError: one is no number, or lies outside its range; a schedule has two warm-ups.
    """
    for name, bounds in HANDED_ON.items():
        value: Any = sections
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None and not _is_as(name, value):
            expected = "two numbers" if name.endswith(_PAIRS) else "a number"
            raise ValueError(f"{name}: expected {expected}, found {value!r}")
        check(name, bounds, value)
    for section in ("", "pretrain.", "correct."):
        optim = sections
        for part in f"{section}optim".split("."):
            optim = optim[part]
        _check_optim(f"{section}optim", optim)


_PAIRS = ".betas"


def _is_as(name: str, value: Any) -> bool:
    """Whether a value has the shape that its key takes: a number, or two."""
    found = value if name.endswith(_PAIRS) else [value]
    return (
        isinstance(found, list)
        and len(found) == (2 if name.endswith(_PAIRS) else 1)
        and all(isinstance(each, int | float) and not isinstance(each, bool) for each in found)
    )


def _check_optim(name: str, optim: Mapping[str, Any]) -> None:
    if "sched" in optim and optim["sched"] is None:
        raise ValueError(
            f"{name}.sched: expected a section, found null; '~{name}.sched' removes it"
        )
    sched = optim.get("sched", {})
    for key, section, known in (("name", optim, OPTIMISERS), ("sched.name", sched, SCHEDULES)):
        if "name" in section and "_target_" not in section and section["name"] not in known:
            raise ValueError(
                f"{name}.{key}: expected one of {', '.join(known)}, found {section['name']!r:.60}"
            )
    given = {key for key, value in sched.items() if value is not None}
    for kind in ("warmup", "constant"):
        if given >= {f"{kind}_steps", f"{kind}_ratio"}:
            raise ValueError(
                f"{name}.sched: {kind}_steps and {kind}_ratio exclude each other; remove one, as in "
                f"'~{name}.sched.{kind}_steps'"
            )
