"""How Transformer Engine scales what it multiplies in FP8: its recipes, and which sizes each takes.

Read against Transformer Engine 2.0 to 2.20 (``quantization.py``, ``utils.assert_dim_for_fp8_exec``,
``Float8BlockQuantizer.is_quantizable``). Products of the forward pass want rows in eights and
columns in sixteens; the backward pass multiplies across the rows, so that they are columns there;
blocks of 32 (MXFP8) or 128 values have to be whole both ways.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Fp8Recipe:
    """One of Transformer Engine's recipes.

    Attributes:
        name: as ``training.fp8_recipe`` calls it.
        kind: its class in ``transformer_engine.common.recipe``.
        available: the function that says whether the device has it.
        multiple: what a layer's two widths, and the tokens of a micro-batch, have to be multiples of.
        measured: the same of the tokens of a pass without gradients.
    """

    name: str
    kind: str
    available: str
    multiple: int
    measured: int


_RECIPES = (
    Fp8Recipe("delayed", "DelayedScaling", "is_fp8_available", 16, 8),
    Fp8Recipe("current", "Float8CurrentScaling", "is_fp8_available", 16, 8),
    Fp8Recipe("mxfp8", "MXFP8BlockScaling", "is_mxfp8_available", 32, 32),
    Fp8Recipe("block", "Float8BlockScaling", "is_fp8_block_scaling_available", 128, 128),
)
RECIPES: Mapping[str, Fp8Recipe] = MappingProxyType({recipe.name: recipe for recipe in _RECIPES})
WHERE = "training.fp8_recipe"


def choose(te: Any, name: str) -> tuple[Fp8Recipe, Any]:
    """A recipe that the device has, and Transformer Engine's object of it.

    Args:
        te: the module ``transformer_engine.pytorch``.
        name: one of ``RECIPES``, or ``auto``: what Transformer Engine takes by itself on this device.

    Raises:
        ValueError: the device has no FP8, or not this recipe; or Transformer Engine does not know it.
    """
    _ask(te, RECIPES["delayed"], "training.transformer_engine=fp8")
    from transformer_engine.common import recipe as made

    if name == "auto":
        name = _default(te)
    recipe = RECIPES[name]
    _ask(te, recipe, f"{WHERE}={name}")
    if not hasattr(made, recipe.kind):
        raise ValueError(
            f"{WHERE}={name}: Transformer Engine {_version()} has no {recipe.kind}; install a newer one, or "
            "use another recipe"
        )
    return recipe, getattr(made, recipe.kind)()


def _default(te: Any) -> str:
    """The recipe of ``autocast`` without one, by its class."""
    give = getattr(te, "get_default_recipe", None)
    if give is None:  # before 2.8
        from transformer_engine.pytorch.fp8 import get_default_fp8_recipe as give
    kind = type(give()).__name__
    found = next((recipe.name for recipe in _RECIPES if recipe.kind == kind), None)
    if found is None:
        raise ValueError(
            f"{WHERE}=auto: Transformer Engine {_version()} would take {kind}, whose sizes are not known "
            f"here; use one of {', '.join(RECIPES)}"
        )
    return found


def _ask(te: Any, recipe: Fp8Recipe, key: str) -> None:
    ask = getattr(te, recipe.available, None)
    if ask is not None:
        usable, reason = ask(return_reason=True)
    else:  # before 2.8
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager as manager

        ask = getattr(manager, recipe.available, None)
        usable, reason = (False, f"{_version()} is too old") if ask is None else ask()
    if not usable:
        raise ValueError(
            f"{key}: Transformer Engine cannot run it here ({str(reason).rstrip('.')}); use "
            "training.transformer_engine=on, or another training.fp8_recipe"
        )


def _version() -> str:
    import transformer_engine

    return str(getattr(transformer_engine, "__version__", ""))


def check_tokens(
    recipe: Fp8Recipe, batch_size: int, positions: int, batches: Sequence[int], measured: int
) -> None:
    """Refuses batches that FP8 products would refuse in the middle of a step.

    Args:
        recipe: how is scaled.
        batch_size: samples of a micro-batch.
        positions: tokens of a sample.
        batches: numbers of samples that a validation's batches have.
        measured: tokens of a sample of theirs.

    Raises:
        ValueError: there is one; the message names the keys to change.
    """
    with_fp8 = f"training.transformer_engine=fp8, training.fp8_recipe={recipe.name}"
    if batch_size * positions % recipe.multiple:
        raise ValueError(
            f"{with_fp8}: a micro-batch has {batch_size} x {positions} = {batch_size * positions} tokens, "
            f"expected a multiple of {recipe.multiple}; change data.train.sequence_length, or the stage's "
            "batch_size"
        )
    for rows in batches:
        if rows * measured % recipe.measured:
            raise ValueError(
                f"{with_fp8}: a batch of the validation has {rows} x {measured} = {rows * measured} tokens, "
                f"expected a multiple of {recipe.measured}; change data.validation.sequence_length, "
                "data.validation.samples, or the stage's batch_size"
            )
