"""Kinds of failure: real exceptions of the libraries that raise them, and what becomes of them between processes."""

import errno
import json
import pickle
import socket
import traceback

import httpx
import pytest
import torch

from nemo_minitron.evaluation.gate import GateError
from nemo_minitron.launch import failures
from nemo_minitron.launch.failures import (
    StageError,
    failure_from_json,
    failure_to_json,
    kind_of,
    without_secrets,
)


def answered(status: int) -> Exception:
    from huggingface_hub.errors import HfHubHTTPError

    request = httpx.Request("GET", "http://localhost/x")
    return HfHubHTTPError("no", response=httpx.Response(status, request=request))


def noted(error: Exception, note: str) -> Exception:
    if hasattr(error, "add_note"):
        error.add_note(note)
    return error


def from_(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("plan.hidden: expected 1 to 24"), failures.MISTAKE),
        (GateError([("perplexity retention", ">= 90%", "12%", "")]), failures.GATE),
        (ConnectionResetError("reset"), failures.TRANSIENT),
        (OSError(errno.EHOSTUNREACH, "no route"), failures.TRANSIENT),
        (answered(503), failures.TRANSIENT),
        (
            httpx.RemoteProtocolError("Server disconnected without sending a response."),
            failures.TRANSIENT,
        ),
        (socket.gaierror(-3, "Temporary failure in name resolution"), failures.TRANSIENT),
        (answered(429), failures.TRANSIENT),
        (answered(404), failures.FAILED),
        (from_(RuntimeError("while scoring"), TimeoutError("slow")), failures.TRANSIENT),
        (
            RuntimeError(
                "[../gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:1"
            ),
            failures.TRANSIENT,
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), failures.MEMORY),
        (MemoryError(), failures.MEMORY),
        (OSError(errno.ENOSPC, "No space left on device"), failures.FAILED),
        (KeyError("student"), failures.FAILED),
        (StageError("distill", failures.LOST, "killed"), failures.LOST),
    ],
)
def test_kinds(error, kind):
    assert kind_of(error) == kind
    again = failure_from_json("distill", failure_to_json(error))
    assert kind_of(again) == kind
    assert kind_of(pickle.loads(pickle.dumps(again))) == kind


def test_a_real_allocation_that_cannot_be_is_a_failure_of_memory():
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**62, dtype=torch.uint8)
    assert kind_of(failure.value) == failures.MEMORY


def test_only_what_may_pass_is_worth_another_try():
    assert set(failures.AGAIN) == {failures.MEMORY, failures.TRANSIENT, failures.LOST}


def test_the_gate_keeps_its_table_between_processes():
    rows = [
        ("perplexity retention", ">= 90.0%", "12.0%", ""),
        ("own_choice acc", ">= 0.1", "0.2", "held"),
    ]
    again = failure_from_json("evaluate", failure_to_json(GateError(rows)))
    assert isinstance(again, GateError) and again.rows == tuple(rows)


SECRET, MASKED = "http://me:s3cretpw@host", "http://***@host"


def chained(error: Exception, cause: Exception) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    "error",
    [
        ValueError(f"bad {SECRET}"), KeyError(SECRET), StageError("score", failures.LOST, f"lost {SECRET}"),
        GateError([(SECRET, ">= 1", "0", "")]), FileNotFoundError(errno.ENOENT, "none", f"/x/{SECRET}"),
        ConnectionError(f"{SECRET} is away"), json.JSONDecodeError("no", SECRET, 1), noted(RuntimeError("x"), SECRET),
        chained(RuntimeError("x"), ConnectionResetError(SECRET)), torch.OutOfMemoryError(f"out of memory {SECRET}"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_credentials_leave_a_failure_and_its_type_stays(error):
    kind, told_before = kind_of(error), failure_to_json(error)
    assert "s3cretpw" not in json.dumps(told_before)
    fit = without_secrets(error, stored=True)
    assert fit is error and kind_of(fit) == kind
    assert "s3cretpw" not in "".join(traceback.format_exception(fit)) + repr(fit)
    assert b"s3cretpw" not in pickle.dumps(fit)
    assert (
        failure_to_json(fit) == told_before
        and kind_of(failure_from_json("score", failure_to_json(fit))) == kind
    )


class Stubborn(Exception):
    """One that says what it likes."""

    def __str__(self) -> str:
        return f"always {SECRET}"


def test_a_failure_that_cannot_be_changed_becomes_another_of_its_kind():
    fit = without_secrets(Stubborn())
    assert isinstance(fit, StageError) and fit.kind == failures.FAILED
    assert str(fit) == f"Stubborn: always {MASKED}"
    behind = without_secrets(chained(ValueError("x"), Stubborn()))
    assert type(behind) is ValueError and behind.__cause__ is None and behind.__context__ is None
    undecodable = UnicodeDecodeError("utf-8", SECRET.encode() + b"\xff", 0, 1, "no")
    assert without_secrets(undecodable) is undecodable
    stored = without_secrets(undecodable, stored=True)
    assert type(stored) is ValueError and b"s3cretpw" not in pickle.dumps(stored)
    transient = answered(503)
    assert without_secrets(transient) is transient
    assert isinstance(without_secrets(transient, stored=True), StageError)
    assert kind_of(without_secrets(transient, stored=True)) == failures.TRANSIENT


def test_a_failure_without_credentials_is_left_alone():
    error = chained(ValueError("plan.hidden: expected 1 to 24"), KeyError("x"))
    assert without_secrets(error, stored=True) is error and isinstance(error.__cause__, KeyError)
