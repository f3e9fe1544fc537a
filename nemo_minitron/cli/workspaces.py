"""Commands on workspaces: list runs, remove what can be made again, verify hashes."""

import argparse
import datetime
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_minitron.cli.deployments import deploy, serve
from nemo_minitron.cli.tables import print_table
from nemo_minitron.security.plain_text import plain

HELP = {
    "runs": "workspaces with the states of their stages, sizes and ages",
    "clean": "remove what can be made again, after asking",
    "deploy": "register a flow with a Prefect server, for its workers and schedules",
    "serve": "run a flow's schedule in this process",
}


def add_parsers(commands: Any) -> None:
    """Adds these commands to the command line's grammar."""
    made = {
        name: commands.add_parser(name, help=text, description=text) for name, text in HELP.items()
    }
    made["runs"].add_argument(
        "folder", metavar="FOLDER", type=Path, nargs="?", default=Path("runs")
    )
    made["runs"].add_argument("--json", action="store_true")
    clean = made["clean"]
    clean.add_argument("workspace", metavar="WORKSPACE", type=Path)
    clean.add_argument(
        "--intermediate", action="store_true",
        help="also all between source and export: needs a finished export; a later run starts over",
    )  # fmt: skip
    clean.add_argument("--yes", action="store_true", help="do not ask")
    clean.add_argument("--json", action="store_true")
    for name in ("deploy", "serve"):
        command = made[name]
        command.add_argument("name", metavar="NAME", help="of the deployment")
        command.add_argument(
            "--flow",
            default="compress",
            help="compress, search, sweep, cascade or evaluate_checkpoint",
        )
        command.add_argument(
            "--config-name",
            "-cn",
            default="config",
            metavar="NAME",
            help="configuration to start from",
        )
        command.add_argument("--cron", metavar="SCHEDULE", help="when, as in '0 2 * * *'")
        command.add_argument(
            "--timezone", metavar="ZONE", help="of the schedule; UTC where none is given"
        )
        command.add_argument(
            "--parameter", action="append", default=[], metavar="NAME=VALUE",
            help="a parameter of the flow; the value is JSON, or a plain word",
        )  # fmt: skip
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="overrides in Hydra's grammar"
        )
    made["deploy"].add_argument(
        "--pool", default="minitron", help="work pool, made where there is none"
    )
    made["deploy"].add_argument("--kind", default="process", help="kind of a pool that is made")


def runs(args: argparse.Namespace) -> int:
    """Lists workspaces."""
    from humanize import naturalsize, naturaltime

    from nemo_minitron.workspace.inventory import workspaces

    if not args.folder.is_dir():
        raise ValueError(f"{args.folder}: no such folder")
    found, now = workspaces(args.folder), datetime.datetime.now(datetime.timezone.utc)
    if args.json:
        print(json.dumps([asdict(workspace) for workspace in found], indent=2, default=str))
        return 0
    if not found:
        print(f"no workspaces below {plain(args.folder)}")
        return 0
    rows, root = [], os.path.realpath(args.folder)
    for workspace in found:
        done = [artifact.name for artifact in workspace.artifacts if artifact.state == "done"]
        other = [
            f"{artifact.name} {artifact.state}"
            + (f" ({artifact.detail})" if artifact.detail else "")
            for artifact in workspace.artifacts
            if artifact.state != "done"
        ]
        rows.append((
            os.path.relpath(workspace.path, root), "running" if workspace.held else "",
            ", ".join(done), ", ".join(other), naturalsize(workspace.bytes),
            naturaltime(now - workspace.changed),
        ))  # fmt: skip
    columns = ("workspace", "now", "done", "not done", "size", "changed")
    print_table(columns, tuple(rows), str(args.folder), left=4)
    return 0


def clean(args: argparse.Namespace) -> int:
    """Removes what can be made again."""
    from humanize import naturalsize

    from nemo_minitron.workspace.inventory import is_workspace, remove, rubbish
    from nemo_minitron.workspace.locks import locked

    if not is_workspace(args.workspace):
        raise ValueError(
            f"{args.workspace}: expected a workspace, found no artifact and no commands.jsonl in it"
        )
    with locked(args.workspace):
        items = rubbish(args.workspace, "intermediate" if args.intermediate else "caches")
        size = sum(item.bytes for item in items)
        listed = [{"path": str(item.path), "bytes": item.bytes, "why": item.why} for item in items]
        if not args.json:
            for item in items:
                print(f"{naturalsize(item.bytes):>10}  {plain(item.path)}  ({item.why})")
        if (
            items
            and not args.yes
            and not _agreed(f"remove these {len(items)}, {naturalsize(size)}? [y/N] ")
        ):
            print("nothing removed", file=sys.stderr)
            return 1
        freed = remove(items)
    if args.json:
        print(json.dumps({"removed": listed, "freed": freed}, indent=2))
    else:
        print(f"{naturalsize(freed)} freed" if items else "nothing to remove")
    return 0


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise ValueError("nobody there to ask; pass --yes to remove what is listed")
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


COMMANDS = {"runs": runs, "clean": clean, "deploy": deploy, "serve": serve}


def verify(args: argparse.Namespace) -> int:
    """``minitron verify``: re-hashes an artifact or a workspace."""
    from nemo_minitron.workspace.artifacts import verify_tree

    if not args.path.is_dir():
        raise ValueError(f"{args.path}: no such folder")
    count, problems = verify_tree(args.path)
    if args.json:
        print(json.dumps({"artifacts": count, "problems": problems}, indent=2))
    else:
        print(
            "\n".join(
                [*map(plain, problems), f"{count} artifacts checked, {len(problems)} problems"]
            )
        )
    return 1 if problems else 0
