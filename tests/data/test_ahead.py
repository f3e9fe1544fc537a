"""A thread ahead of its caller: order, errors, and a caller who leaves early."""

import threading
import time
from contextlib import closing

import pytest

from nemo_minitron.data.ahead import ahead


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


def test_items_come_in_order_and_are_made_before_they_are_asked_for():
    made = []

    def items():
        for number in range(5):
            made.append(number)
            yield number

    taken = ahead(items(), depth=2)
    assert next(taken) == 0
    limit = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < limit:
        time.sleep(0.001)
    time.sleep(0.01)
    assert made == [0, 1, 2]  # two, and no more
    assert list(taken) == [1, 2, 3, 4]
    assert not threads()


def test_an_error_comes_where_its_item_would_have_come():
    def items():
        yield 1
        raise ValueError("train.jsonl, row 7: damaged")

    taken = ahead(items())
    assert next(taken) == 1
    with pytest.raises(ValueError, match="row 7: damaged"):
        next(taken)
    assert not threads()


def test_a_caller_that_leaves_ends_the_thread():
    def items():
        while True:
            yield bytes(1)

    with pytest.raises(KeyboardInterrupt), closing(ahead(items())) as taken:
        next(taken)
        raise KeyboardInterrupt
    assert not threads()
