"""Processes that are watched: real ones, stopped, silenced, crashed, orphaned."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nemo_minitron.launch.failures import exit_words
from nemo_minitron.launch.process_group import Limits, run_process
from nemo_minitron.launch.slurm import Hung, Job, _Watch

NONE = Limits()


def sh(script, tmp_path, limits=NONE, lines=None, sign=None):
    return run_process(
        ["/bin/sh", "-c", script], dict(os.environ), tmp_path / "out.log", limits,
        (lines if lines is not None else []).append, sign,
    )  # fmt: skip


def alive(pid: int) -> bool:
    """Whether a process is there and not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pid: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


def test_output_is_passed_on_line_by_line_and_kept(tmp_path):
    lines: list[str] = []
    ended = sh("printf 'one\\ntwo\\rthree'; echo oops >&2; exit 7", tmp_path, lines=lines)
    assert (ended.code, ended.stopped) == (7, None)
    assert lines == ["one", "two", "threeoops"] == ended.last
    assert (tmp_path / "out.log").read_text() == "one\ntwo\nthreeoops\n"
    assert exit_words(ended.code) == "ended with exit status 7"


def test_a_flood_of_output_does_not_stop_it(tmp_path):
    ended = sh("yes 'a long line of words that fills every pipe' | head -n 40000", tmp_path)
    assert ended.code == 0
    assert (tmp_path / "out.log").stat().st_size > 1_600_000


def test_a_listener_that_ends_the_thread_stops_nothing(tmp_path):
    """As rich does where what it writes to has gone."""

    def listen(line):
        raise SystemExit(1)

    script = "yes 'a long line of words that fills every pipe' | head -n 20000"
    ended = run_process(
        ["/bin/sh", "-c", script], dict(os.environ), tmp_path / "out.log", Limits(20), listen
    )
    assert (ended.code, ended.stopped) == (0, None)
    assert len((tmp_path / "out.log").read_text().splitlines()) == 20000


def test_a_crash_is_told_from_a_failure(tmp_path):
    ended = sh("kill -SEGV $$", tmp_path)
    assert ended.code == -signal.SIGSEGV
    assert exit_words(ended.code) == "was killed by SIGSEGV"
    assert "memory" in exit_words(-9)


def test_a_limit_of_time_asks_first_and_then_kills_the_whole_group(tmp_path):
    polite = "trap 'echo saved; exit 0' TERM; echo $$; while true; do sleep 0.1; done"
    ended = sh(polite, tmp_path, Limits(seconds=0.5, grace=20))
    assert (ended.stopped, ended.code, ended.last[-1]) == ("time limit", 0, "saved")
    assert ended.seconds < 5
    stubborn = "trap '' TERM; sleep 300 & echo $!; wait"
    ended = sh(stubborn, tmp_path, Limits(seconds=0.5, grace=0.5))
    assert (ended.stopped, ended.code) == ("time limit", -signal.SIGKILL)
    assert gone(int(ended.last[0]))


def test_a_process_that_is_no_longer_wanted_is_asked_to_end(tmp_path):
    begun = time.monotonic()
    ended = run_process(
        ["/bin/sh", "-c", "trap 'echo saved; exit 0' TERM; while true; do sleep 0.1; done"], dict(os.environ),
        tmp_path / "out.log", Limits(grace=20), print, unwanted=lambda: time.monotonic() - begun > 0.5,
    )  # fmt: skip
    assert (ended.stopped, ended.code, ended.last[-1]) == ("unwanted", 0, "saved")
    assert ended.seconds < 5


def test_a_signal_while_it_starts_leaves_nothing_behind(tmp_path):
    class Told(Exception):
        pass

    def tell(*_):
        raise Told

    script, before = f"exec -a {tmp_path.name}-child sleep 300", signal.signal(signal.SIGTERM, tell)
    killer = f"while read pause; do sleep $pause; kill -TERM {os.getpid()}; done"
    told = 0
    with subprocess.Popen(
        ["/bin/sh", "-c", killer], stdin=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        for number in range(16):
            try:
                process.stdin.write(f"{0.0006 * number:.4f}\n")
                run_process(
                    ["/bin/bash", "-c", script],
                    dict(os.environ),
                    tmp_path / "log",
                    Limits(3),
                    print,
                )
            except Told:
                told += 1
        process.stdin.close()
        assert process.wait(30) == 0
        signal.signal(signal.SIGTERM, before)
    found = [
        p
        for p in psutil.process_iter(["cmdline"])
        if f"{tmp_path.name}-child" in (p.info["cmdline"] or [])
    ]
    assert told == 16 and not found


def test_silence_is_noticed_and_a_sign_of_life_is_not_silence(tmp_path):
    ended = sh("echo begun; sleep 300", tmp_path, Limits(silence=0.6, grace=1))
    assert (ended.stopped, ended.last) == ("silence", ["begun"])
    sign = tmp_path / "progress.json"
    quiet = f"for i in 1 2 3 4 5 6 7 8; do sleep 0.2; echo $i > {sign}; done"
    ended = sh(quiet, tmp_path, Limits(silence=0.8), sign=sign)
    assert (ended.stopped, ended.code) == (None, 0)
    ended = sh(
        "for i in 1 2 3 4 5 6 7 8; do sleep 0.2; echo $i; done", tmp_path, Limits(silence=0.8)
    )
    assert (ended.stopped, ended.code) == (None, 0)


def test_a_disk_that_does_not_answer_ends_nothing_and_is_no_sign_of_life(tmp_path):
    """A link to a name that no disk takes: whoever looks at it gets an error, not that nothing is there."""
    sign, real, nowhere = tmp_path / "progress.json", tmp_path / "real", "x" * 300
    with pytest.raises(OSError, match="too long"):
        (tmp_path / nowhere).is_file()
    away, back = f"ln -sfn {nowhere} {sign}", f"ln -sfn {real} {sign}"
    # what was seen before still counts
    healthy = f"sleep 3; echo 1 > {real}; {back}; sleep 1; {away}; sleep 2.5; echo done"
    ended = sh(healthy, tmp_path, Limits(silence=5), sign=sign)
    assert (ended.stopped, ended.code) == (None, 0)
    hung = f"while :; do {away}; sleep 0.3; {back}; sleep 0.3; done"
    ended = sh(hung, tmp_path, Limits(seconds=60, silence=2, grace=1), sign=sign)
    assert ended.stopped == "silence"
    job = Job("minitron-x", [], 1, [], [], tmp_path / "out.log", None, 1.0, sign)
    watch, until = _Watch(job), time.monotonic() + 30
    with pytest.raises(Hung, match="silent for 1 s"):
        while time.monotonic() < until:
            sign.unlink(missing_ok=True)
            sign.symlink_to(nowhere if time.monotonic() % 0.4 < 0.2 else real)
            watch.look("RUNNING")
            time.sleep(0.05)


def test_what_it_leaves_behind_does_not_outlive_it(tmp_path):
    ended = sh("sleep 300 & echo $!", tmp_path)
    assert ended.code == 0 and ended.seconds < 10  # although the child holds the output open
    assert gone(int(ended.last[0]))


STARTER = """
import os, sys
from pathlib import Path
from nemo_minitron.launch.process_group import Limits, run_process
from nemo_minitron.launch.slurm import Hung, Job, _Watch
script = "trap 'echo saved > {0}/saved; exit 0' TERM; sleep 300 & echo $! > {0}/pids; echo $$ >> {0}/pids; wait"
run_process(["/bin/sh", "-c", script.format(sys.argv[1])], dict(os.environ), Path(sys.argv[1]) / "log", Limits(grace=20), print)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_group_ends_with_its_parent_whatever_that_dies_of(tmp_path, how):
    parent = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path)], stderr=subprocess.DEVNULL
    )
    pids = tmp_path / "pids"
    end = time.monotonic() + 60
    while not (pids.is_file() and len(pids.read_text().split()) == 2):
        assert time.monotonic() < end and parent.poll() is None
        time.sleep(0.05)
    first, second = map(int, pids.read_text().split())
    assert alive(first) and alive(second)
    parent.send_signal(how)
    assert parent.wait(30) != 0
    assert gone(first) and gone(second)
    assert (tmp_path / "saved").is_file()  # it was asked before it was killed
