"""What a command says when somebody ends it, whatever Python makes of that on the way."""

import pytest

from nemo_minitron.cli.endings import Terminated, ended_by
from nemo_minitron.launch import failures
from nemo_minitron.launch.failures import failure_from_json, failure_to_json
from nemo_minitron.training.preemption import Preempted, TimeOver


def raised_while(cause, error):
    error.__context__ = cause  # as Python notes it where one is raised while another is handled
    return error


@pytest.mark.parametrize(
    ("cause", "status"), [(KeyboardInterrupt(), 1), (Terminated(), 143)], ids=["ctrl-c", "sigterm"]
)
def test_what_fails_because_a_command_is_ended_is_not_a_failure(cause, status):
    """Prefect says 'Task run is not set', a ValueError, where Ctrl-C comes as a task begins."""
    found = ended_by(raised_while(cause, ValueError("Task run is not set")))
    assert found is not None and found[1] == status


def test_a_cause_is_found_behind_another_one():
    inner = raised_while(KeyboardInterrupt(), OSError("connection refused"))
    outer = RuntimeError("the server is gone")
    outer.__cause__ = ConnectionError("first try")
    outer.__context__ = inner
    assert ended_by(outer) == ("interrupted; run it again to resume", 1)


def test_a_failure_that_nobody_caused_is_one():
    assert ended_by(raised_while(KeyError("x"), ValueError("y"))) is None


def test_a_training_whose_time_is_over_ends_like_one_that_was_preempted_wherever_it_ran():
    over = TimeOver("stopped by exp_manager.max_time_per_run at step 3")
    told = failure_from_json("distill", failure_to_json(over))  # of a process of its own
    assert told.kind == failures.OVER not in failures.AGAIN
    for error in (over, told, raised_while(told, RuntimeError("the flow ends"))):
        assert ended_by(error) == ("stopped by exp_manager.max_time_per_run at step 3", 143)
    assert failures.kind_of(Preempted("by a signal")) == failures.STOPPED
