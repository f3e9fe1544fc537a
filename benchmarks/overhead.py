"""What the flow costs beside its stages: against a running server, and with the embedded one, first and later.

The stages are run for real (a tiny model), each call of one is timed, and the rest of the flow's wall time is overhead.
Every process of the run notes what it connects to: nothing outside this machine may be among it.

    python -m benchmarks.overhead
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from benchmarks.duel import RESULTS
from nemo_minitron.cli.tables import print_table
from nemo_minitron.workspace.manifest import write_json

WATCH = """
import os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        where = arguments[1] if event == "socket.connect" else arguments[0]
        with open(os.environ["MINITRON_TRACE"], "a") as file:
            file.write(f"{event} {where!r}\\n")
sys.addaudithook(watch)
"""
LOCAL = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "'/", "b'/", "None")
"""What may be connected to: this machine, and sockets that are files."""


def one(overrides: list[str]) -> dict[str, Any]:
    """Runs the flow once in this process; its wall time, that of its stages, and the memory of both sides."""
    begun = time.monotonic()
    from nemo_minitron.flows.local import prepare_environment

    prepare_environment()
    from nemo_minitron.flows import tasks
    from nemo_minitron.flows.compress import compress

    imported, inside, launch = time.monotonic() - begun, [], tasks.launch

    def timed(*arguments: Any) -> Any:
        started = time.monotonic()
        try:
            return launch(*arguments)
        finally:
            inside.append(time.monotonic() - started)

    tasks.launch = timed
    started, server = time.monotonic(), 0
    compress(overrides=overrides)
    wall = time.monotonic() - started
    for child in psutil.Process().children(recursive=True):
        server += child.memory_info().rss
    return {
        "imports": imported, "wall": wall, "stages": sum(inside), "overhead": wall - sum(inside),
        "flow_mb": psutil.Process().memory_info().rss / 1e6, "server_mb": server / 1e6,
    }  # fmt: skip


def main() -> None:
    """Measures the three cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(one(args.one)))
        return
    root = Path(tempfile.mkdtemp(prefix="minitron-overhead-"))
    try:
        rows, outside = cases(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    table = [
        (name, *(f"{row[key]:.1f}" for key in ("wall", "stages", "overhead", "imports")),
         f"{row['flow_mb']:.0f}", f"{row['server_mb']:.0f}")
        for name, row in rows.items()
    ]  # fmt: skip
    columns = ("case", "flow s", "stages s", "overhead s", "imports s", "flow MB", "server MB")
    print_table(columns, tuple(table))
    print(f"connections to the outside: {outside or 'none'}")
    write_json(RESULTS / "overhead.json", {"cases": rows, "outside": outside})
    if outside or rows["running server"]["overhead"] > 5:
        sys.exit("the aim is missed: at most 5 s, and no connection to the outside")


def cases(root: Path) -> tuple[dict[str, Any], list[str]]:
    """Running server, embedded server with a new database, and with that database again."""
    from benchmarks.soak import make_parts
    from tests.support.runs import settings

    parts, trace = make_parts(root), root / "trace.txt"
    (root / "watch").mkdir()
    (root / "watch" / "sitecustomize.py").write_text(WATCH)
    trace.touch()
    base = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    base |= {
        "PYTHONPATH": f"{root / 'watch'}:{os.environ.get('PYTHONPATH', '')}", "MINITRON_TRACE": str(trace),
        "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    found = {}

    def run(name: str, environment: dict[str, str], *more: str) -> None:
        words = [
            *settings(root / name.replace(",", "").replace(" ", "-"), *parts),
            "evaluate.from_scratch=false",
            "evaluate.speed=false",
            *more,
        ]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.overhead", "--one", *words], env={**base, **environment},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        found[name] = json.loads(done.stdout.strip().splitlines()[-1])

    home = {"PREFECT_HOME": str(root / "home")}
    run("embedded, first", home)
    run("embedded, later", home)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = {
        "PREFECT_HOME": str(root / "served"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
    }
    words = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    server = subprocess.Popen(
        [sys.executable, "-m", *words],
        env={**base, **served},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/api/health")
        run("running server", served)
        run("running server, processes", served, "launch.kind=subprocess")
        processes = [
            psutil.Process(server.pid),
            *psutil.Process(server.pid).children(recursive=True),
        ]
        for name in ("running server", "running server, processes"):
            found[name]["server_mb"] = sum(process.memory_info().rss for process in processes) / 1e6
    finally:
        server.terminate()
        server.wait(20)
    seen = trace.read_text().splitlines()
    assert seen, "nothing was traced"
    print(f"{len(seen):,} connections and look-ups traced")
    outside = [line for line in seen if not any(word in line for word in LOCAL)]
    return found, sorted(set(outside))


def wait_for(address: str) -> None:
    """Waits until a server answers."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(address, timeout=2).read()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"no answer from {address}")


if __name__ == "__main__":
    main()
