"""Kinds of failure: real exceptions of the libraries that raise them, and what becomes of them between processes."""

import errno
import pickle
import socket

import httpx
import pytest
import torch

from nemo_minitron.artifacts.gate import GateError
from nemo_minitron.launch import failures
from nemo_minitron.launch.failures import StageError, kind_of, raised, told


def answered(status: int) -> Exception:
    from huggingface_hub.errors import HfHubHTTPError

    request = httpx.Request("GET", "http://localhost/x")
    return HfHubHTTPError("no", response=httpx.Response(status, request=request))


def from_(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("plan.hidden: expected 1 to 24"), failures.MISTAKE),
        (GateError([("quality kept", ">= 90%", "12%", "")]), failures.GATE),
        (ConnectionResetError("reset"), failures.TRANSIENT),
        (OSError(errno.EHOSTUNREACH, "no route"), failures.TRANSIENT),
        (answered(503), failures.TRANSIENT),
        (httpx.RemoteProtocolError("Server disconnected without sending a response."), failures.TRANSIENT),
        (socket.gaierror(-3, "Temporary failure in name resolution"), failures.TRANSIENT),
        (answered(429), failures.TRANSIENT),
        (answered(404), failures.FAILED),
        (from_(RuntimeError("while scoring"), TimeoutError("slow")), failures.TRANSIENT),
        (
            RuntimeError("[../gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:1"),
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
    again = raised("distill", told(error))
    assert kind_of(again) == kind
    assert kind_of(pickle.loads(pickle.dumps(again))) == kind


def test_a_real_allocation_that_cannot_be_is_a_failure_of_memory():
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**62, dtype=torch.uint8)
    assert kind_of(failure.value) == failures.MEMORY


def test_only_what_may_pass_is_worth_another_try():
    assert set(failures.AGAIN) == {failures.MEMORY, failures.TRANSIENT, failures.LOST}


def test_the_gate_keeps_its_table_between_processes():
    rows = [("quality kept", ">= 90.0%", "12.0%", ""), ("own_choice acc", ">= 0.1", "0.2", "held")]
    again = raised("evaluate", told(GateError(rows)))
    assert isinstance(again, GateError) and again.rows == tuple(rows)
