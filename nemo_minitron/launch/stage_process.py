"""A stage as a process: ``python -m nemo_minitron.launch.stage_process STAGE VALUES.json OUTCOME.json``.

Under torchrun every rank runs it. The outcome is a JSON file, whole or not there at all.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_minitron.config.compose import from_dict
from nemo_minitron.launch.failures import failure_to_json
from nemo_minitron.launch.start_up import start_fast
from nemo_minitron.security.masking import Masking, masked, masked_values, remember
from nemo_minitron.stages.result import Result
from nemo_minitron.stages.run import run_alone
from nemo_minitron.workspace.layout import outcome_of_rank
from nemo_minitron.workspace.manifest import now, write_json

_PR_SET_PDEATHSIG = 1


def result_from(value: dict[str, Any]) -> Result:
    """A result back from JSON."""
    return Result(**{
        **value, "folder": Path(value["folder"]), "columns": tuple(value["columns"]),
        "rows": tuple(tuple(row) for row in value["rows"]), "notes": tuple(value["notes"]),
    })  # fmt: skip


def outcomes(outcome: Path) -> list[Path]:
    """The outcome's file, and those of other ranks, as far as they are there."""
    return [
        path for path in (outcome, *outcome.parent.glob(f"{outcome.stem}.*.json")) if path.is_file()
    ]


def clear(outcome: Path) -> None:
    """Removes what an earlier try said."""
    for path in outcomes(outcome):
        path.unlink()


def main(arguments: list[str]) -> int:
    """Runs a stage, and writes what became of it.

    Returns:
        The command line's exit status: 0 done, 2 the user's input is wrong, 1 it failed.
    """
    name, values, outcome = arguments
    _die_with_torchrun()
    path = Path(outcome)
    # a batch job's output goes to its log without passing through the flow
    sys.stdout, sys.stderr = Masking(sys.stdout), Masking(sys.stderr)
    _say(f"{name}: process {os.getpid()}")
    try:
        given = json.loads(Path(values).read_text(encoding="utf-8"))
        remember(given)
        result = run_alone(name, from_dict(given))
    except BaseException as error:
        # the first rank to fail knows why; the others only that it is gone
        failure = {"failure": failure_to_json(error), "at": time.time()}
        with contextlib.suppress(OSError):  # the disk that is full may be this one
            write_json(outcome_of_rank(path, int(os.environ.get("RANK", "0"))), failure)
        if failure["failure"]["kind"] == "failed":
            print(masked(traceback.format_exc()), file=sys.stderr)
        _say(f"{name}: {failure['failure']['message']}")
        return 2 if failure["failure"]["kind"] == "mistake" else 1
    if result is not None:
        _say(f"{name}: {result.headline}")
        write_json(
            path, {"result": {**masked_values(asdict(result)), "folder": str(result.folder)}}
        )
    return 0


def _say(text: str) -> None:
    print(f"{now()[:19]} {text}", file=sys.stderr, flush=True)


def _die_with_torchrun() -> None:
    """Lets the system kill a rank whose torchrun has died: it is in a process group of its own."""
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    start_fast()
    sys.exit(main(sys.argv[1:]))
