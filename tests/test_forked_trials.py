"""A forked trial is to whoever asks for it what a new process is."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import forked_trials
from tests.support.processes import until

SEES = """
import os, sys
assert not [name for name in sys.modules if name.startswith(("nemo", "lightning", "prefect", "tests"))]
print(sys.argv[1:], os.getcwd(), os.environ["SAID"], "HOME" in os.environ, sys.stdin.read())
print("ä", file=sys.stderr)
"""
FAILS = "raise ValueError('as it should')"
STAYS = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
ASKS = "import os, sys; from tests.support import forked_trials; forked_trials.run(sys.argv[1:], cwd='/', env={}, input='')"


ANSWERS = """
import datetime, os, sys
for line in sys.stdin.buffer:
    print(line, sys.argv, os.getcwd(), sorted(os.environ), datetime.datetime(2026, 1, 1).astimezone(), flush=True)
    print("said", file=sys.stderr)
os.kill(os.getpid(), 14)
"""


@pytest.mark.parametrize(
    "program",
    [
        SEES,
        FAILS,
        "import sys; sys.exit(3)",
        "import sys; sys.exit('no')",
        "import os; os.kill(os.getpid(), 9)",
    ],
)
def test_it_sees_and_says_what_a_new_process_does(program, tmp_path):
    command = [sys.executable, "-c", program, "one", "two words"]
    given = {"cwd": tmp_path, "env": {"SAID": "yes"}, "input": "from here"}
    new = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, **given)
    assert (new.returncode == 0) == (program == SEES), new.stderr
    forked = forked_trials.run(command, **given)
    assert (forked.returncode, forked.stdout) == (new.returncode, new.stdout)
    assert forked.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]
    assert Path(os.environ[forked_trials.PLACE]).is_socket()


@pytest.mark.parametrize("killed", [False, True])
def test_it_answers_over_pipes_as_a_new_process_does(killed, tmp_path):
    (tmp_path / "program.py").write_text(ANSWERS)
    environment = {"TZ": "XYZ-7:30", "LC_CTYPE": "C.UTF-8"}
    seen = []
    for make in (subprocess.Popen, forked_trials.Popen):
        with (tmp_path / make.__module__).open("w+b") as err:
            process = make(
                [sys.executable, "-I", "-B", str(tmp_path / "program.py")], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=err, bufsize=0, cwd="/", env=environment,
            )  # fmt: skip
            process.stdin.write(b"one\n")
            answer = process.stdout.readline()
            if killed:
                process.kill()
            process.stdin.close()
            seen.append((answer, process.stdout.read(), process.wait(), process.returncode))
            process.stdout.close()
            process.kill()  # has no effect any more
            err.seek(0)
            seen[-1] += (killed or err.read(), process.wait())
    assert seen[0] == seen[1]
    assert b"+07:30" in seen[0][0] and seen[0][2] == (-9 if killed else -14) == seen[0][-1]


def test_it_ends_with_whoever_asked_for_it(tmp_path):
    forked_trials.start()
    asks = subprocess.Popen(
        [sys.executable, "-c", ASKS, sys.executable, "-c", STAYS, str(tmp_path / "pid")]
    )
    trial = int(until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    assert trial != asks.pid
    os.kill(trial, 0)
    asks.send_signal(signal.SIGKILL)
    asks.wait()

    def gone():
        try:
            os.kill(trial, 0)
        except ProcessLookupError:
            return True
        return False

    assert until(gone, 30)


def test_where_nobody_answers_it_is_a_new_process(tmp_path, monkeypatch):
    monkeypatch.setenv(forked_trials.PLACE, str(tmp_path / "nobody"))
    (tmp_path / "nobody.pid").write_text(str(2**22 + 1))  # none has this number
    done = forked_trials.run(
        [sys.executable, "-c", "print(1)"],
        cwd=tmp_path,
        env={},
        input="",
        capture_output=True,
        encoding="utf-8",
    )
    assert done.stdout == "1\n"
