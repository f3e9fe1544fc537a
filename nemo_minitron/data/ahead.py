"""Work that a thread does ahead of the one who needs it."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")

_WAIT = 0.1
"""Seconds after which a full queue's thread looks whether it is still needed."""


def ahead(items: Iterable[Item], depth: int = 2) -> Generator[Item, None, None]:
    """The same items in the same order, made by a thread while the caller works on those before.

    Close it (``contextlib.closing``) where the caller may leave early: that ends the thread, at the
    latest behind the item that it is making. A process that is killed does not wait for the thread.

    Args:
        items: makes the items; runs in the thread. What it raises is raised here, in its place.
        depth: items that wait; one more is being made.
    """
    ready: _Queue = queue.Queue(depth)
    left = threading.Event()
    thread = threading.Thread(target=_work, args=(items, ready, left), name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, _End):
                return
            if error is not None:
                raise error
            yield item
            item = None  # the caller's alone now: the next may need its memory
    finally:
        left.set()
        thread.join()


class _End(Exception):
    """Nothing more comes."""


_Queue = queue.Queue[tuple[Any, BaseException | None]]


def _work(items: Iterable[Any], ready: _Queue, left: threading.Event) -> None:
    try:
        for item in items:
            if not _put(ready, left, item, None):
                return
            del item
    except BaseException as error:  # whatever it is, the caller is the one to tell
        _put(ready, left, None, error)
    else:
        _put(ready, left, None, _End())


def _put(ready: _Queue, left: threading.Event, item: Any, error: BaseException | None) -> bool:
    """Puts an item into the queue; False: nobody takes it any more."""
    while not left.is_set():
        try:
            ready.put((item, error), timeout=_WAIT)
        except queue.Full:
            continue
        return True
    return False
