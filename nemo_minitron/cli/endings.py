"""How a command ends that somebody ends: Ctrl-C, and SIGTERM, which services and batch systems send.

A command that gets SIGTERM is interrupted as by Ctrl-C, with an exit status of its own; a training,
unlike by Ctrl-C, finishes its step and saves first. What else is at work is dropped and made again
by the next run, which resumes.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 1
"""Exit status after Ctrl-C."""
TERMINATED = 128 + signal.SIGTERM
"""Exit status after SIGTERM, as shells tell it, and where a training's ``max_time_per_run`` is over."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextlib.contextmanager
def sigterm_like_ctrl_c() -> Iterator[None]:
    """Raises ``Terminated`` in the block when SIGTERM comes.

    Under torchrun the signal keeps its meaning: a rank that waits for others inside a C function
    would not hear it, and torchrun tells every rank. The same where somebody has set a handler.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    mine = threading.current_thread() is threading.main_thread()
    if several or not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated


def ended_by(error: BaseException) -> tuple[str, int] | None:
    """What a command says, and its exit status, where somebody has ended it; None: nobody has.

    What failed because of it (a server that no longer answers, a task that was about to start) has
    the cause somewhere in its chain.
    """
    chain = list(_chain(error))
    saved = next((_saved(each) for each in chain if _has_saved(each)), None)
    by_signal = any(type(each).__name__ in ("Terminated", "TerminationSignal") for each in chain)
    if saved is not None or by_signal:
        return saved or "ended by SIGTERM; run it again to resume", TERMINATED
    if any(isinstance(each, KeyboardInterrupt) for each in chain):
        return "interrupted; run it again to resume", INTERRUPTED
    return None


def _has_saved(error: BaseException) -> bool:
    """Whether it is ``training.preemption``'s; of a stage in a process of its own, that its time was over."""
    kind = getattr(error, "kind", None)
    return type(error).__name__ in ("Preempted", "TimeOver") or kind == "time over"


def _saved(error: BaseException) -> str:
    return str(error).removeprefix("TimeOver: ")  # as another process reports it


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, and all that it was raised from or during."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [each.__cause__, each.__context__]
