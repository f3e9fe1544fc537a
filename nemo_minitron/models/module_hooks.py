"""torch hooks on what goes into a module and what comes out of it: its first hidden states."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from nemo_minitron.families import Tap


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among the arguments of a layer, or of a module inside of it."""
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def first_output(output: Any) -> Tensor:
    """The hidden states in a result: a tuple, or a decoder's ModelOutput, begins with them."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def on_tap(model: nn.Module, tap: Tap, note: Callable[[Tensor], None]) -> Any:
    """Hands on the hidden states at a tap, each time that they pass.

    Args:
        model: holds the tap's module.
        tap: its module without placeholders.
        note: called with the hidden states.

    Returns:
        A handle whose ``remove`` ends it.
    """

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(first_input(args, kwargs))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        note(first_output(output))

    module = model.get_submodule(tap.module)
    if tap.side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)
