"""Thirty flow runs on a real server and worker, each with something that goes wrong at a random moment.

Every run must end complete, or failed for the right reason; what is finished must verify, and be the same bytes as in a
run that nothing happened to; nothing finished may be made twice without need. Prints the tally.

    python -m benchmarks.soak [--runs 30] [--seed 0]
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from pathlib import Path

import psutil

from benchmarks.duel import RESULTS
from nemo_minitron.cli.tables import print_table
from nemo_minitron.workspace.artifacts import artifacts_in, verify_tree
from nemo_minitron.workspace.manifest import read_manifest, write_json
from tests.support.models import WORDS, make_model
from tests.support.runs import settings

FAULTS = (
    "none", "stage killed", "flow killed", "worker killed", "server killed", "disk full", "file truncated",
    "wrong input", "stage killed", "flow killed",
)  # fmt: skip
STAGES = ("score", "plan", "prune", "distill", "evaluate", "export")
ORDER = ("teacher", "scores", "plan", "pruned", "student", "report", "export")


class Place:
    """Server, worker and deployment, which can be killed and started again."""

    def __init__(self, root: Path) -> None:
        import socket

        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.root, self.api = root, f"http://127.0.0.1:{self.port}/api"
        self.environment = {
            **os.environ, "PREFECT_HOME": str(root / "prefect"), "PREFECT_API_URL": self.api, "OMP_NUM_THREADS": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_UI_ENABLED": "false", "HF_HUB_OFFLINE": "1", "PREFECT_CLIENT_MAX_RETRIES": "6",
        }  # fmt: skip
        self.server = self.worker = None

    def _start(self, words, name):
        with (self.root / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *words],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_server(self):
        """Starts the server, and waits until it answers."""
        self.server = self._start(
            ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)],
            "server",
        )
        end = time.monotonic() + 120
        while time.monotonic() < end:
            try:
                urllib.request.urlopen(f"{self.api}/health", timeout=2).read()
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError("the server does not start")

    def start_worker(self):
        """Starts a worker."""
        self.worker = self._start(
            ["prefect", "worker", "start", "--pool", "minitron", "--type", "process"], "worker"
        )

    def ask(self, what):
        """Asks the server."""
        import httpx
        from prefect.client.orchestration import PrefectClient

        async def go():
            async with PrefectClient(
                self.api, httpx_settings={"timeout": httpx.Timeout(30)}
            ) as client:
                return await what(client)

        return asyncio.run(go())

    def state(self, run):
        """A run's state."""
        return self.ask(lambda client: client.read_flow_run(run.id)).state

    def begin(self, overrides):
        """Starts a run of the deployment."""

        async def create(client):
            deployment = await client.read_deployment_by_name("compress/soak")
            return await client.create_flow_run_from_deployment(
                deployment.id, parameters={"overrides": overrides}
            )

        return self.ask(create)

    def stop(self):
        """Ends server and worker."""
        for process in (self.worker, self.server):
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def kill(process):
    """As nobody can prevent it."""
    try:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    except (ProcessLookupError, psutil.Error, subprocess.TimeoutExpired):
        pass


def stage_process(workspace):
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "nemo_minitron.launch.stage_process" in words and any(
            str(workspace) in word for word in words
        ):
            return process
    return None


def started(workspace):
    return {folder.name: read_manifest(folder).started for folder in artifacts_in(workspace)}


def contents(workspace):
    kept = ("scores", "plan", "pruned", "student")
    return {
        name: {
            o.file: o.sha256
            for o in read_manifest(workspace / name).outputs
            if not o.file.startswith("metrics.")
        }
        for name in kept
    }


def cut_a_file(workspace, draw):
    """Truncates a file of a finished artifact; returns the artifact's name."""
    names = [name for name in ORDER if (workspace / name / "manifest.json").is_file()]
    name = draw.choice(names)
    files = [o.file for o in read_manifest(workspace / name).outputs if o.size > 8]
    path = workspace / name / draw.choice(files)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return name


def fill(workspace):
    """Fills the small disk that the workspace lies on."""
    path = workspace.parent / "ballast"
    with path.open("wb") as file:
        try:
            while True:
                file.write(b"x" * 65536)
                file.flush()
        except OSError:
            return path


def small_disk(folder: Path) -> bool:
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def play(place: Place, number: int, fault: str, draw: random.Random, parts, reference) -> dict:
    """One run with one fault, started again as often as it takes; what came of it."""
    folder = place.root / f"disk{number}" if fault == "disk full" else place.root
    if fault == "disk full" and not small_disk(folder):
        return {"fault": fault, "end": "skipped: no small disk can be mounted here"}
    workspace = folder / f"run{number}"
    overrides = [word for word in settings(workspace, *parts)] + [
        "evaluate.speed=false", "evaluate.from_scratch=false", "evaluate.tasks=[]", "evaluate.prompts=0",
    ]  # fmt: skip
    wrong = ["plan.hidden=9999"] if fault == "wrong input" else []
    begun, tries, states, notes = time.monotonic(), 0, [], []
    stage, delay, ballast = draw.choice(STAGES), draw.uniform(0.0, 3.0), None
    struck, before, damaged = fault in ("none", "wrong input"), {}, None
    while tries < 6:
        tries += 1
        run = place.begin([*overrides, *wrong])
        while True:
            try:
                state = place.state(run)
            except Exception:
                time.sleep(0.5)
                continue
            if state.is_final():
                break
            if not struck and at(workspace, stage):
                time.sleep(delay)
                struck, before = True, started(workspace)
                ballast, hit = strike(place, fault, workspace, run, draw)
                notes += [] if hit else ["came too late"]
                if fault == "file truncated" and before:
                    damaged = cut_a_file(workspace, draw)
                    notes.append(f"{damaged} damaged at {stage}")
            time.sleep(0.2)
        states.append(f"{state.name}: {(state.message or '').replace(str(place.root), '')[:160]}")
        if ballast is not None:
            ballast.unlink()
            ballast = None
        if state.is_completed():
            if damaged and not verify_clean(workspace) and tries < 6:
                continue  # its size gives it away: the next run makes it anew
            break
        if fault == "wrong input":
            break
    row = {
        "fault": fault,
        "at": stage,
        "tries": tries,
        "states": states,
        "seconds": round(time.monotonic() - begun),
        "notes": notes,
    }
    row |= judged(workspace, fault, state, before, damaged, reference)
    if fault == "disk full":
        subprocess.run(["umount", "-l", str(folder)], check=False)
    shutil.rmtree(workspace, ignore_errors=True)
    return row


def at(workspace, stage):
    """Whether a stage has begun: its process was told what to do."""
    return (workspace / ".launch" / f"{stage}.json").is_file()


def verify_clean(workspace):
    return not verify_tree(workspace)[1]


def strike(place, fault, workspace, run, draw):
    """Does it; returns what must be undone afterwards, and whether anything was hit."""
    if fault in ("stage killed", "flow killed"):
        while (process := stage_process(workspace)) is None:
            if place.state(run).is_final():
                return None, False
            time.sleep(0.02)
        kill(process.parent() if fault == "flow killed" else process)
    elif fault == "worker killed":
        kill(place.worker)
        time.sleep(1)
        place.start_worker()
    elif fault == "server killed":
        kill(place.server)
        time.sleep(draw.uniform(0, 4))
        place.start_server()
    elif fault == "disk full":
        return fill(workspace), True
    return None, True


def judged(workspace, fault, state, before, damaged, reference) -> dict:
    """Whether a run ended as it should."""
    if fault == "wrong input":
        good = state.name == "Failed" and "plan.hidden" in (state.message or "")
        return {
            "end": "failed for the right reason" if good else f"WRONG: {state.name} {state.message}"
        }
    if not state.is_completed():
        return {"end": f"WRONG: {state.name} {state.message}"}
    problems = verify_tree(workspace)[1]
    if problems:
        return {"end": f"WRONG: {problems[0]}"}
    if reference is not None and contents(workspace) != reference:
        return {"end": "WRONG: other bytes than in a run that nothing happened to"}
    after = started(workspace)
    untouched = ORDER[: ORDER.index(damaged)] if damaged else ORDER
    again = [name for name in untouched if name in before and after.get(name) != before[name]]
    return {"end": "complete", "needless": again}


def main() -> None:
    """Plays all runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, root = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="minitron-soak-"))
    place = Place(root)
    try:
        rows = soak(place, args.runs, draw)
    finally:
        place.stop()
    report(rows, args.seed)
    shutil.rmtree(root, ignore_errors=True)


def soak(place: Place, runs: int, draw: random.Random) -> list[dict]:
    parts = make_parts(place.root)
    place.start_server()
    launch = {"kind": "subprocess", "retries": 3, "retry_seconds": 0.5, "grace": 10}
    words = ["nemo_minitron", "deploy", "soak", "--parameter", f"launch={json.dumps(launch)}"]
    subprocess.run([sys.executable, "-m", *words], env=place.environment, check=True)
    place.start_worker()
    kinds = [FAULTS[i % len(FAULTS)] for i in range(runs)]
    rows, reference = [], None
    for number, fault in enumerate(kinds):
        if number == 0:
            assert fault == "none"
            reference = first(place, parts)
        row = play(place, number, fault, draw, parts, reference)
        rows.append(row)
        print(f"[{number + 1}/{runs}] {row}", flush=True)
    return rows


def first(place, parts):
    """The bytes of a run that nothing happens to."""
    workspace = place.root / "reference"
    overrides = [
        *settings(workspace, *parts),
        "evaluate.speed=false",
        "evaluate.from_scratch=false",
        "evaluate.tasks=[]",
        "evaluate.prompts=0",
    ]
    run = place.begin(overrides)
    while not place.state(run).is_final():
        time.sleep(0.5)
    assert place.state(run).is_completed(), place.state(run)
    return contents(workspace)


def make_parts(root: Path):
    """A small teacher and some text."""
    from nemo_minitron.data.tokenizer import train_tokenizer

    draw, corpus = random.Random(0), root / "corpus"
    corpus.mkdir()
    for i in range(40):
        lines = [" ".join(draw.choices(WORDS, k=12)) + "." for _ in range(40)]
        (corpus / f"doc{i:02d}.txt").write_text("\n".join(lines))
    teacher = make_model(root / "teacher", "llama", vocab_size=300)
    train_tokenizer([path.read_text() for path in sorted(corpus.iterdir())], 300, teacher)
    return teacher, corpus


def report(rows: list[dict], seed: int) -> None:
    groups = defaultdict(list)
    for row in rows:
        groups[row["fault"]].append(row)
    table = []
    for fault, some in groups.items():
        ends = Counter(row["end"].split(":")[0] for row in some)
        table.append((
            fault, ", ".join(f"{count} {end}" for end, count in ends.items()),
            "-".join(str(n) for n in sorted({row["tries"] for row in some if "tries" in row})),
            str(sum(len(row.get("needless", [])) for row in some)),
            str(round(sum(row.get("seconds", 0) for row in some) / len(some))),
        ))  # fmt: skip
    print_table(
        ("what happened", "ended", "starts", "made again needlessly", "seconds"),
        tuple(table),
        left=2,
    )
    wrong = [row for row in rows if row["end"].startswith("WRONG")]
    print(f"{len(rows)} runs, {len(wrong)} wrong")
    write_json(RESULTS / "soak.json", {"seed": seed, "runs": rows})
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
