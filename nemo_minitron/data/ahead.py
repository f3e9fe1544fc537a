"""Work that a thread does ahead of the one who needs it."""

import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

_WAIT = 0.1
"""Seconds after which a thread that may not go on looks whether it is still needed."""


def ahead(items: Iterable[Item], depth: int = 2) -> Generator[Item, None, None]:
    """The same items in the same order, made by a thread while the caller works on those before.

    Close it (``contextlib.closing``) where the caller may leave early: that ends the thread, at the
    latest behind the item that it is making. A process that is killed does not wait for the thread.

    Args:
        items: makes the items; runs in the thread. What it raises is raised here, in its place.
        depth: items that are being made or wait, at most, beside the caller's.
    """
    ready: _Queue = queue.SimpleQueue()
    room, left = threading.Semaphore(depth), threading.Event()
    work = (iter(items), ready, room, left)
    thread = threading.Thread(target=_work, args=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, _End):
                return
            if error is not None:
                raise error
            room.release()
            yield item
            item = None  # the next may need its memory
    finally:
        left.set()
        thread.join()


class _End(Exception):
    """Nothing more comes."""


_Queue = queue.SimpleQueue[tuple[Any, BaseException | None]]


def _work(
    items: Iterator[Any], ready: _Queue, room: threading.Semaphore, left: threading.Event
) -> None:
    try:
        while not left.is_set():
            if room.acquire(timeout=_WAIT):
                ready.put((next(items), None))
    except StopIteration:
        ready.put((None, _End()))
    except BaseException as error:  # whatever it is, the caller is the one to tell
        ready.put((None, error))
