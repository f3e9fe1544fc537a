"""Masks credentials in what Prefect sees of a flow: its parameters and its failure.

Prefect stores the parameters of a run in its database, the words of a failure in states, events and
logs, and the failure itself, pickled, in a file: also with ``persist_result=False``
(prefect.flow_engine, 3.8.8, ``handle_exception``). The function that is the flow gets the true
values: they stay in its process.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prefect import Flow
from pydantic import BaseModel

from nemo_minitron.launch.failures import without_secrets
from nemo_minitron.security.masking import mask_in, masked_values, remember

_WRITTEN_MASKED = "command"
"""Parameter that is masked before it is handed over, for it is only shown."""


class WithheldFlow(Flow[..., Any]):
    """A flow whose credentials stay in its process."""

    def __init__(self, fn: Callable[..., Any], **options: Any) -> None:
        super().__init__(
            fn, **options
        )  # with the function itself, for its file and its name are noted
        self.fn = _guarded(fn)

    def serialize_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The parameters as Prefect stores them."""
        return dict(masked_values(super().serialize_parameters(parameters)))

    def with_options(self, **options: Any) -> "WithheldFlow":
        """The same flow with other options; Prefect's own would make it a flow of another class."""
        made = super().with_options(**options)
        made.__class__ = WithheldFlow
        return made  # type: ignore[return-value]


def flow(
    name: str, flow_run_name: Callable[[], str]
) -> Callable[[Callable[..., Any]], WithheldFlow]:
    """Makes a function a flow of this package."""
    return functools.partial(
        WithheldFlow, name=name, flow_run_name=flow_run_name, log_prints=False, persist_result=False
    )


@contextmanager
def masked_failures(stored: bool) -> Iterator[None]:
    """Masks what leaves the block as an exception.

    Args:
        stored: Prefect pickles it.
    """
    try:
        yield
    except Exception as error:
        fit = without_secrets(error, stored)
        if fit is error:
            raise
        raise fit from None


def _guarded(fn: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        with masked_failures(stored=True):
            given = signature.bind(*args, **kwargs).arguments
            plain = {
                name: value.model_dump() if isinstance(value, BaseModel) else value
                for name, value in given.items()
            }
            remember(plain)
            _refuse_masks(plain)
            return fn(*args, **kwargs)

    return run


def _refuse_masks(given: Mapping[str, Any]) -> None:
    """Refuses parameters that were copied from what Prefect shows of another run.

    Raises:
        ValueError: a mask stands where a credential was.
    """
    found = mask_in({name: value for name, value in given.items() if name != _WRITTEN_MASKED})
    if found is not None:
        where, text = found
        raise ValueError(
            f"{where}: {text!r} holds a mask in place of a credential (never stored); give it again, or "
            "as ${oc.env:NAME}, which is read from the environment where the flow runs"
        )
