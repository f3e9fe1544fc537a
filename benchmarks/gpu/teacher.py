"""A frozen teacher's forward pass: bf16, fp8, int8, and from the machine's memory; eager, and its layers compiled.

The weights are random, and the same in every row; errors are those of the hidden states against
bf16's, and depend on the weights. First one product alone, which says what the passes can reach.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from benchmarks.gpu.clock import Row, device_of, measure, rows_of
from benchmarks.gpu.shapes import LLAMA_8B, TINY, random_model
from nemo_minitron.families import families
from nemo_minitron.models.causal_lm import free, frozen, hidden_states, layers_of
from nemo_minitron.models.fp8 import Fp8Linear, quantise_rows, quantised
from nemo_minitron.models.int8 import quantise
from nemo_minitron.models.offload import Offloaded

FAMILY = families()["llama"]
AIM = "aim 0.65"


def rows(tiny: bool) -> Iterator[Row]:
    """One row for each kind of teacher, eager and compiled; each ratio is to bf16 of the same sort."""
    device = device_of(tiny)
    shape = {**LLAMA_8B, **(TINY if tiny else {})}
    batch, length = (2, 16) if tiny else (8, 2048)
    yield from _product(device, shape, batch * length)
    yield from _teachers(tiny, device, shape, batch, length)


def _product(device: str, shape: dict[str, Any], tokens: int) -> list[Row]:
    """The up projection alone in bf16 and in fp8, the quantisation of its input, and its error."""
    torch.manual_seed(0)
    sizes = shape["hidden_size"], shape["intermediate_size"]
    linear = torch.nn.Linear(*sizes, device=device, dtype=torch.bfloat16).requires_grad_(False)
    small = Fp8Linear(linear)
    x_TI = torch.randn(tokens, sizes[0], device=device, dtype=torch.bfloat16)
    runs = {
        "product: bf16": lambda: linear(x_TI),
        "product: fp8": lambda: small(x_TI),
        "product: rows to fp8 alone": lambda: quantised(x_TI),
    }
    with torch.inference_mode():
        found = rows_of(
            {name: measure(device, run) for name, run in runs.items()}, next(iter(runs))
        )
        part_TI = x_TI[:64]
        q_TI, scale_T1 = quantise_rows(part_TI)
        exact = (q_TI.double() * scale_T1) @ (
            small.quantised_OI.double() * small.scale_O[:, None]
        ).t()
        exact += small.bias.double()
        apart = float((small(part_TI).double() - exact).norm() / exact.norm())
    note = (
        f"off the product of its own numbers in float64 by {apart:.1e}, of which bf16 makes 1.7e-03"
    )
    return [replace(row, note=note) if row.what == "product: fp8" else row for row in found]


def _teachers(
    tiny: bool, device: str, shape: dict[str, Any], batch: int, length: int
) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, shape["vocab_size"], (batch, length), generator=generator)
    found: list[Row] = []
    exact: torch.Tensor | None = None
    for name, prepare in TEACHERS.items():
        before = _allocated(device)
        model = prepare(random_model(shape, device).eval().requires_grad_(False), device)
        weights = (_allocated(device) - before) / 2**30
        results: list[torch.Tensor] = []
        run = _pass(model, tokens_BS.to(device), results)
        for sort in ("eager", "compiled"):
            if sort == "compiled":
                for layer in layers_of(model, FAMILY):
                    layer.compile(dynamic=False, backend="eager" if tiny else "inductor")
            try:
                milliseconds, gib = measure(device, run, 3)
            except (
                TorchDynamoException
            ) as error:  # as training.compile does: such layers stay eager
                yield Row(f"{sort}: {name}", 0.0, note=f"does not compile: {type(error).__name__}")
                continue
            exact = results[-1] if exact is None and results else exact
            found.append(
                Row(
                    f"{sort}: {name}",
                    milliseconds,
                    milliseconds / _reference(found, sort, milliseconds),
                    gib,
                    f"weights {weights:.1f} GiB, {1000 * tokens_BS.numel() / milliseconds:,.0f} tokens/s"
                    f"{_error(results, exact)}{f', {AIM}' if name == 'fp8' else ''}",
                )
            )
            yield found[-1]
        del model, run, results
        _forget()


def _int8(model: Any, device: str) -> Any:
    return quantise(model, FAMILY)


def _fp8(model: Any, device: str) -> Any:
    return quantise(model, FAMILY, "fp8")


def _offload(model: Any, device: str) -> Any:
    Offloaded(model, FAMILY, torch.device(device))
    return model


TEACHERS: dict[str, Callable[[Any, str], Any]] = {
    "bf16": lambda model, device: model,
    "fp8": _fp8,
    "int8": _int8,
    "bf16 in the machine's memory": _offload,
}


def _pass(model: Any, tokens_BS: torch.Tensor, results: list[torch.Tensor]) -> Callable[[], None]:
    """A forward pass that leaves its hidden states."""

    def run() -> None:
        with frozen(model):
            results[:] = [hidden_states(model, FAMILY, tokens_BS)]

    return run


def _reference(found: list[Row], sort: str, own: float) -> float:
    return next((row.milliseconds for row in found if row.what == f"{sort}: bf16"), own)


def _error(results: list[torch.Tensor], exact: torch.Tensor | None) -> str:
    if not results or exact is None:
        return ""
    with torch.inference_mode():
        apart = (results[-1].float() - exact.float()).norm() / exact.float().norm()
    return f", error {float(apart):.1e}" if float(apart) else ", equal to the bit"


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _forget() -> None:
    """Frees a model that is gone, and what was compiled of it."""
    torch._dynamo.reset()
    gc.collect()
    free()
