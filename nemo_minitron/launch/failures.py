"""What kind of failure an exception is, and whether another try may help."""

import errno
import os
import signal
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_minitron.evaluation.gate import GateError
from nemo_minitron.security.masking import masked, masked_values

MISTAKE, GATE, MEMORY, TRANSIENT, LOST, STOPPED, OVER, SLOW, FAILED = (
    "mistake", "gate", "memory", "transient", "lost", "stopped", "time over", "time limit", "failed",
)  # fmt: skip
"""Kinds of failure.

mistake: the user's, nothing will change it; gate: the student is too weak; memory: there was too
little, a smaller micro-batch may do; transient: the network's and the machine's passing moods;
lost: a process died or fell silent; stopped: somebody asked it to stop; time over: it has trained as
long as one run may, and saved; time limit: it took longer than allowed; failed: all else.
"""

AGAIN = (MEMORY, TRANSIENT, LOST)
"""Kinds for which the same stage is worth another try."""

_PASSING = frozenset({
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ETIMEDOUT, errno.ENETUNREACH,
    errno.EHOSTUNREACH, errno.EPIPE, errno.EAGAIN, errno.EINTR, errno.ESTALE,
})  # fmt: skip
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
_BROKEN_LINE = (
    "connection closed by peer",
    "connection reset by peer",
    "socket timeout",
    "broken pipe",
)
"""What gloo and NCCL say, in a plain RuntimeError, when another rank has died."""


class StageError(RuntimeError):
    """A stage failed in a process of its own.

    Attributes:
        kind: one of the kinds of failure.
        stage: which stage.
    """

    def __init__(self, stage: str, kind: str, message: str) -> None:
        super().__init__(message)
        self.stage, self.kind = stage, kind

    def __reduce__(self) -> tuple[Any, ...]:
        return StageError, (self.stage, self.kind, str(self))


def kind_of(error: BaseException) -> str:
    """The kind of failure that an exception, or what caused it, stands for."""
    if isinstance(error, StageError):
        return error.kind
    if isinstance(error, GateError):
        return GATE
    if isinstance(error, ValueError):  # what the stages raise for what the user can put right
        return MISTAKE
    # training.preemption's: not imported, for it would import NeMo
    if type(error).__name__ == "TimeOver":
        return OVER
    if type(error).__name__ == "Preempted" or isinstance(error, KeyboardInterrupt):
        return STOPPED
    for each in _chain(error):
        if _is_memory(each):
            return MEMORY
        if _is_passing(each):
            return TRANSIENT
    return FAILED


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was raised from."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def _is_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)
    )  # torch.OutOfMemoryError is a RuntimeError


_LINES = ("TransportError", "ChunkedEncodingError", "gaierror")
"""Broken lines by the names that httpx, requests and the resolver give them; not imported for it."""


def _is_passing(error: BaseException) -> bool:
    if any(base.__name__ in _LINES for base in type(error).__mro__):
        return True
    status = getattr(
        getattr(error, "response", None), "status_code", None
    )  # httpx, requests, the hub
    if isinstance(status, int):
        return status == 429 or status >= 500
    if isinstance(error, OSError):
        named = (ConnectionError, TimeoutError, InterruptedError, BlockingIOError)
        return isinstance(error, named) or error.errno in _PASSING
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _BROKEN_LINE)


def failure_to_json(error: BaseException) -> dict[str, Any]:
    """A failure as JSON, for another process; credentials are masked."""
    message = " ".join(str(error).split()) or "no message"
    known = isinstance(error, ValueError | GateError | StageError)
    text = message if known else f"{type(error).__name__}: {message}"
    rows = [list(row) for row in error.rows] if isinstance(error, GateError) else []
    return {"kind": kind_of(error), "message": masked(text), "rows": masked_values(rows)}


def failure_from_json(stage: str, value: Mapping[str, Any]) -> Exception:
    """The exception that ``value`` describes: the user's mistakes and the gate keep their type."""
    if value["kind"] == MISTAKE:
        return ValueError(value["message"])
    if value["kind"] == GATE:
        return GateError([(row[0], row[1], row[2], row[3]) for row in value["rows"]])
    return StageError(stage, value["kind"], value["message"])


def without_secrets(error: Exception, stored: bool = False) -> Exception:
    """A failure of the same kind in whose words, and in those of what caused it, credentials are masked.

    Args:
        error: changed in place where it can be, so that it keeps its type, its traceback and its
            causes.
        stored: it will be pickled: then it may hold nothing but words, no answer of a server that
            knows its request.

    Returns:
        The same exception; or, where it cannot be changed, another one with the same words.
    """
    instead, kind = failure_from_json("", failure_to_json(error)), kind_of(error)
    first, *causes = [_mask(each) for each in _chain(error)]
    if not all(causes):
        error.__cause__, error.__suppress_context__ = None, True
        error.__context__ = None
    fit = first and not (stored and not _holds_words_only(error))
    return error if fit and kind_of(error) == kind else instead


def _mask(error: BaseException) -> bool:
    """Masks what an exception says; returns whether nothing is left that it tells."""
    try:
        error.args = masked_values(error.args)
        error.__dict__.update(masked_values(vars(error)))
        if isinstance(error, OSError):
            for name in ("strerror", "filename", "filename2"):
                value = getattr(error, name)
                if isinstance(value, str | os.PathLike):
                    setattr(error, name, masked(os.fspath(value)))
        inside = [_mask(each) for each in getattr(error, "exceptions", ())]
        lines = "".join(traceback.format_exception_only(type(error), error))
    except Exception:  # whatever a library's exceptions do where they are touched
        return False
    return all(inside) and masked(lines) == lines


def _holds_words_only(error: BaseException) -> bool:
    def plain(value: Any) -> bool:
        if isinstance(value, Mapping):
            return all(plain(each) for pair in value.items() for each in pair)
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or isinstance(value, str | int | float)

    return plain(error.args) and plain(vars(error))


def exit_words(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"ended with exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}" + (
        " (by the system, if memory ran out)" if name == "SIGKILL" else ""
    )
