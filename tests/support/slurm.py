"""A stand-in for Slurm's programs that runs jobs on this machine: sbatch, squeue, scancel, scontrol requeue, srun."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("sbatch", "squeue", "scancel", "scontrol", "srun")


def install(folder: Path) -> Path:
    """Puts the programs into a folder, which belongs at the head of PATH; jobs lie in its ``jobs``."""
    (folder / "jobs").mkdir(parents=True)
    for name in PROGRAMS:
        path = folder / name
        path.write_text(
            f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} {folder} {name} "$@"\n'
        )
        path.chmod(0o755)
    return folder


def option(words: list[str], name: str) -> str | None:
    """An option's value, as --name=value or --name value."""
    for position, word in enumerate(words):
        if word == name:
            return words[position + 1]
        if word.startswith(f"{name}="):
            return word.split("=", 1)[1]
    return None


def start(jobs: Path, number: str) -> None:
    script = jobs / f"{number}.sh"
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    options = [word for line in lines for word in shlex.split(line.removeprefix("#SBATCH "))]
    output = option(options, "--output")
    assert output is not None
    with open(output.replace("%%", "%"), "ab") as file:
        job = subprocess.Popen(
            ["/bin/bash", str(script)], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, "SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "here"},
        )  # fmt: skip
    (jobs / f"{number}.pid").write_text(str(job.pid))


def running(jobs: Path, number: str) -> bool:
    path = jobs / f"{number}.pid"
    if not path.is_file():
        return False
    try:
        return (
            Path(f"/proc/{path.read_text()}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        )
    except FileNotFoundError:
        return False


def send(jobs: Path, number: str, what: signal.Signals) -> None:
    if running(jobs, number):
        os.killpg(int((jobs / f"{number}.pid").read_text()), what)


def main(folder: Path, program: str, words: list[str]) -> int:
    jobs = folder / "jobs"
    if program == "sbatch":
        while (folder / "slow").exists():  # it has taken the job, and does not answer
            if not list(jobs.glob("*.sh")):
                (jobs / "1.sh").write_text(sys.stdin.read())
                (jobs / "1.name").write_text(option(words, "--job-name") or "")
                start(jobs, "1")
            time.sleep(0.1)
        if (folder / "refuse").exists():
            print(
                "sbatch: error: Batch job submission failed: Invalid partition name specified",
                file=sys.stderr,
            )
            return 1
        number = str(len(list(jobs.glob("*.sh"))) + 1)
        (jobs / f"{number}.sh").write_text(sys.stdin.read())
        (jobs / f"{number}.name").write_text(option(words, "--job-name") or "")
        start(jobs, number)
        print(number)
    elif program == "squeue":
        number, name = option(words, "--jobs"), option(words, "--name")
        if number is None:
            named = [path.stem for path in jobs.glob("*.name") if path.read_text() == name]
            print(*[each for each in named if running(jobs, each)], sep="\n")
            return 0
        if not (jobs / f"{number}.sh").is_file():
            print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
            return 1
        if running(jobs, number):
            print((jobs / f"{number}.name").read_text() if "--format=%j" in words else "RUNNING")
        (jobs / f"{number}.asked").touch()
    elif program == "scancel":
        if (folder / "away").exists():
            print("scancel: error: Unable to contact slurm controller", file=sys.stderr)
            return 1
        (jobs / f"{words[-1]}.cancelled").touch()
        send(jobs, words[-1], signal.SIGTERM)
    elif program == "scontrol" and words[0] == "requeue":
        if running(jobs, words[1]):
            (jobs / f"{words[1]}.requeued").touch()
        send(jobs, words[1], signal.SIGKILL)
        start(jobs, words[1])
    elif program == "scontrol":
        print("localhost")
    elif program == "srun":
        os.execvp(words[0], words)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
