"""An accelerator made of Python: its tensors are elsewhere, compute on the CPU, and refuse to mix with others.

Whatever forgets to move a tensor fails here as it would on a GPU, and what runs through must come out as it
does on the CPU. Used as ``with accelerator(): ...``; the device is called ``elsewhere``, for Lightning's
Trainer too (``trainer.accelerator``, ``trainer.strategy``).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration as backend
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "elsewhere"
MOVES = {"aten::_to_copy", "aten::to", "aten::copy_"}
CPU_INDICES = ("aten::index", "aten::_index_put")  # a GPU takes these from the CPU as well


def _wide_mm(one: Any, other: Any, out_dtype: torch.dtype, *, out: Any) -> Any:
    return torch.mm(one.to(out_dtype), other.to(out_dtype), out=out)


def _wide_addmm(
    to: Any, one: Any, other: Any, out_dtype: torch.dtype, *, out: Any, **scales: Any
) -> Any:
    return torch.addmm(to, one.to(out_dtype), other.to(out_dtype), out=out, **scales)


def _histc(values: Any, *rest: Any, **more: Any) -> Any:
    return torch.histc(values.float(), *rest, **more).to(values.dtype)


# CUDA has these, the CPU does not
ABLE = {
    "aten.mm.dtype_out": _wide_mm,
    "aten.addmm.dtype_out": _wide_addmm,
    "aten.histc.default": _histc,
}


class _Module(backend._DummyBackendModule):  # type: ignore[misc]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


backend._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


class Elsewhere(torch.Tensor):
    """A tensor on the accelerator; ``held`` is what it is made of."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Elsewhere":
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE, requires_grad=held.requires_grad,
        )  # fmt: skip

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


narrow = False
"""Whether it has no float64, as Apple's."""
operations = 0
"""How many operations it has done."""


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation: on the CPU as ever, or on what the accelerator's tensors are made of."""
    flat = list(_leaves((*args, *kwargs.values())))
    ours = [value for value in flat if isinstance(value, Elsewhere)]
    targets = [value for value in flat if isinstance(value, torch.device)]
    there = targets[0].type == NAME if targets else bool(ours)
    if not ours and not there:
        return func(*args, **kwargs)
    others = [
        v for v in flat if isinstance(v, torch.Tensor) and not isinstance(v, Elsewhere) and v.dim()
    ]
    name = func._schema.name
    if ours and others and name not in MOVES and not name.startswith(CPU_INDICES):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    global operations
    operations += 1
    args_held = [_mapped(_held, value) for value in args]
    kwargs_held = {name: _mapped(_held, value) for name, value in kwargs.items()}
    if there and "pin_memory" in kwargs_held:
        kwargs_held["pin_memory"] = False
    found = ABLE.get(str(func), func)(*args_held, **kwargs_held)
    if name == "aten::copy_":
        return args[0]
    known = {id(value.held): value for value in ours}
    return _mapped(lambda value: _wrapped(value, known), found) if there else found


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """What operations are given, lists taken apart; ``torch.utils._pytree`` takes four times as long."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_mapped(change, each) for each in value)
    return change(value)


def _held(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value.held if isinstance(value, Elsewhere) else value


def _wrapped(value: Any, known: dict[int, Elsewhere]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if narrow and value.dtype == torch.float64:
        raise TypeError(f"{NAME}: no float64 here")
    return known[id(value)] if id(value) in known else Elsewhere(value)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What PyTorch does outside its dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_ours(kwargs.get("device")):
            del kwargs["device"]
            learned = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs).to(DEVICE).requires_grad_(learned)
        if func is torch.Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


class ElsewhereAccelerator(Accelerator):
    """What Lightning asks an accelerator for."""

    def setup_device(self, device: torch.device) -> None:
        assert device.type == NAME

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return 1

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


AcceleratorRegistry.register(NAME, ElsewhereAccelerator, "tensors elsewhere")
StrategyRegistry.register(NAME, SingleDeviceStrategy, "one device elsewhere", device=DEVICE)


@contextlib.contextmanager
def accelerator() -> Iterator[torch.device]:
    """Makes the device known inside the block."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    modes = torch.inference_mode.__enter__, torch.inference_mode.__exit__
    # PyTorch cannot make views of tensors of classes written in Python in this mode
    torch.inference_mode.__enter__ = lambda self: _no_gradients(self).__enter__()  # type: ignore[method-assign]
    torch.inference_mode.__exit__ = lambda self, *error: self.instead.__exit__(*error)  # type: ignore[method-assign]
    generator, torch.Generator = torch.Generator, _generator  # type: ignore[misc,assignment]
    try:
        with _Functions(), _Operations():
            yield DEVICE
    finally:
        torch.Generator = generator  # type: ignore[misc]
        torch.__future__.set_overwrite_module_params_on_conversion(before)
        torch.inference_mode.__enter__, torch.inference_mode.__exit__ = modes  # type: ignore[method-assign]


def _generator(device: Any = "cpu", make: Any = torch.Generator) -> Any:
    return make("cpu" if _is_ours(device) else device)


def _no_gradients(mode: Any) -> Any:
    mode.instead = torch.no_grad() if mode.mode else contextlib.nullcontext()
    return mode.instead
