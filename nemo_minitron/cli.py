"""The command line: composes configurations, runs one stage or, imported late, the flow. Knows no tensor."""

import argparse
import contextlib
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nemo_minitron
from nemo_minitron.stages import STAGES, run_stage

if TYPE_CHECKING:
    from nemo_minitron.stages.config import Config
    from nemo_minitron.stages.stage import Result

_HELP = {
    "run": "the whole pipeline, as a Prefect flow",
    "download": "find, fetch and check the model to compress",
    "pretrain": "train a small model from random weights",
    "correct": "train the teacher on the distillation data",
    "score": "importance of channels, heads, neurons and layers",
    "plan": "decide what stays",
    "prune": "write the smaller checkpoint",
    "distill": "train the pruned model against its teacher",
    "evaluate": "measure all models, write the report",
    "export": "write the Hugging Face folder",
    "size": "parameters, FLOPs per token and KV-cache bytes, from config.json alone",
    "families": "supported architectures and their axes",
    "report": "(re)write report.html",
    "verify": "re-hash an artifact or a workspace",
}


def parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The command line's grammar: the whole, and that of each command."""
    top = argparse.ArgumentParser(
        prog="minitron",
        description="Smaller language models out of bigger ones: score, prune, distil, evaluate, export.",
    )
    top.add_argument("--version", action="version", version=f"nemo_minitron {nemo_minitron.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in ("run", *STAGES):
        command = commands.add_parser(name, help=_HELP[name], description=_HELP[name])
        command.add_argument(
            "--config-name", default="config", metavar="NAME", help="configuration to start from"
        )
        command.add_argument("--config-dir", metavar="DIR", help="folder with configurations of your own")
        command.add_argument("--keys", action="store_true", help="print every configuration key and stop")
        command.add_argument("--cfg", action="store_true", help="print the composed configuration and stop")
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="overrides in Hydra's grammar")
    size = commands.add_parser("size", help=_HELP["size"], description=_HELP["size"])
    size.add_argument("model", metavar="MODEL", help="model folder, config.json, or hub id")
    size.add_argument(
        "sizes", nargs="*", metavar="axis=size", help="hidden= ffn= heads= kv_heads= layers= ..."
    )
    size.add_argument("--context", type=int, default=4096, help="tokens of context that FLOPs assume")
    size.add_argument("--json", action="store_true")
    families = commands.add_parser("families", help=_HELP["families"], description=_HELP["families"])
    families.add_argument("--json", action="store_true")
    for name, operand in (("report", "workspace"), ("verify", "path")):
        command = commands.add_parser(name, help=_HELP[name], description=_HELP[name])
        command.add_argument(operand, metavar=operand.upper(), type=Path)
        command.add_argument("--json", action="store_true")
    return top, commands.choices


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0 done, 2 the user's input is wrong (one line says what), 1 it failed.
    """
    raw = sys.argv[1:] if arguments is None else arguments
    top, commands = parser()
    if raw and raw[0] in commands:  # a command on its own lets options and overrides stand in any order
        args = commands[raw[0]].parse_intermixed_args(raw[1:], argparse.Namespace(command=raw[0]))
    else:
        args = top.parse_args(raw)
    try:
        return _COMMANDS[args.command](args)
    except ValueError as error:
        print(f"minitron {args.command}: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"minitron {args.command}: interrupted; run it again to go on", file=sys.stderr)
        return 1
    except Exception as error:  # the last resort: a failure is one line too, its traceback on request
        if os.environ.get("MINITRON_TRACEBACK"):
            raise
        text = f"{type(error).__name__}: {_one_line(error)}"
        print(f"minitron {args.command}: failed: {text} (MINITRON_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", text)


def _config(args: argparse.Namespace) -> "Config":
    from nemo_minitron.compose import load_config

    return load_config(args.config_name, args.overrides, args.config_dir)


def _shows_only(args: argparse.Namespace) -> bool:
    if args.keys:
        from nemo_minitron.stages.config import describe

        for name, item, _ in describe():
            print(
                f"{name}: {item.metadata['help']}"
                + (f" ({', '.join(item.metadata['choices'])})" if item.metadata["choices"] else "")
            )
        return True
    if args.cfg:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.structured(_config(args))), end="")
        return True
    return False


def _stage(args: argparse.Namespace) -> int:
    if _shows_only(args):
        return 0
    from nemo_minitron.artifacts.workspace import locked

    config = _config(args)
    with locked(Path(config.workspace)):
        if args.command not in ("download", "pretrain"):
            _quick_download(config)
        with contextlib.redirect_stdout(sys.stderr):  # progress bars; standard output is for the result
            result = run_stage(args.command, config)
    _show(result, args.json)
    return 0


def _quick_download(config: "Config") -> None:
    """Makes the pointer to the source model where a stage is run on its own before ``download``."""
    if config.source.model is not None:
        run_stage("download", config)


def _run(args: argparse.Namespace) -> int:
    if _shows_only(args):
        return 0
    config = _config(args)
    from nemo_minitron.artifacts.workspace import locked

    with locked(Path(config.workspace)):  # before Prefect is started: a busy workspace is an input error
        pass
    from nemo_minitron.flows.local import run_here

    with contextlib.redirect_stdout(sys.stderr):
        results = run_here(config)
    if args.json:
        print(json.dumps([_json(result) for result in results], indent=2))
        return 0
    evaluated = [result for result in results if result.stage == "evaluate"]
    for result in evaluated:
        _print_table(result.columns, result.rows, result.headline)
    print(
        f"report  {Path(config.workspace) / 'report' / 'report.html'}\n"
        f"model   {Path(config.workspace) / 'export'}"
    )
    return 0


def _show(result: "Result", as_json: bool) -> None:
    if as_json:
        print(json.dumps(_json(result), indent=2))
        return
    if result.columns:
        _print_table(result.columns, result.rows)
    print(f"{result.stage}: {result.headline}" + ("" if result.made else " (already done)"))


def _json(result: "Result") -> dict[str, Any]:
    return {
        "stage": result.stage, "folder": str(result.folder), "made": result.made, "headline": result.headline,
        "facts": result.facts,
    }  # fmt: skip


def _print_table(
    columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...], title: str | None = None
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def _size(args: argparse.Namespace) -> int:
    from nemo_minitron.artifacts.checkpoint import read_config
    from nemo_minitron.core.size import model_size
    from nemo_minitron.families import axis_sizes, check_sizes, config_with_sizes, family_of

    path = Path(args.model).expanduser()
    if path.name == "config.json":
        path = path.parent
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", args.model):
        from nemo_minitron.bridge.hub import download_config

        path = download_config(args.model)
    config = read_config(path)
    family = family_of(config, str(path / "config.json"))
    sizes = axis_sizes(family, config, str(path / "config.json"))
    for text in args.sizes:
        axis, _, value = text.partition("=")
        if axis not in sizes or not value.isdecimal() or int(value) < 1:
            raise ValueError(f"size: expected AXIS=SIZE with an axis of {', '.join(sizes)}, found {text!r}")
        sizes[axis] = int(value)
    check_sizes(family, sizes, "size")
    if args.context < 1:
        raise ValueError(f"size: --context: expected at least 1, found {args.context}")
    size = model_size(family, config_with_sizes(family, config, sizes), args.context)
    facts = {**sizes, **asdict(size)}
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    rows = [(axis, f"{value:,}") for axis, value in sizes.items()]
    rows += [
        ("parameters", f"{size.parameters:,} ({size.parameters / 1e9:.3f} B)"),
        ("without embeddings", f"{size.non_embedding:,} ({size.non_embedding / 1e9:.3f} B)"),
        (f"FLOPs per token at {size.context} tokens", f"{size.flops_per_token:,}"),
        (f"KV-cache bytes per token ({size.cache_bytes} bytes each)", f"{size.kv_bytes_per_token:,}"),
    ]
    _print_table(("", str(args.model)), tuple(rows))
    return 0


def _families(args: argparse.Namespace) -> int:
    from nemo_minitron.families import families

    if args.json:
        listed = {
            name: {
                "architecture": family.architecture,
                "prunable": list(family.prunable),
                "axes": list(family.axes),
            }
            for name, family in families().items()
        }
        print(json.dumps(listed, indent=2))
        return 0
    rows = [(name, family.architecture, ", ".join(family.prunable)) for name, family in families().items()]
    _print_table(("model_type", "architecture", "axes that can be pruned"), tuple(rows))
    return 0


def _report(args: argparse.Namespace) -> int:
    from nemo_minitron.artifacts.workspace import locked
    from nemo_minitron.stages.report import rewrite

    if not args.workspace.is_dir():
        raise ValueError(f"{args.workspace}: no such workspace")
    with locked(args.workspace):
        _show(rewrite(args.workspace), args.json)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from nemo_minitron.artifacts.workspace import verify_tree

    if not args.path.is_dir():
        raise ValueError(f"{args.path}: no such folder")
    count, problems = verify_tree(args.path)
    if args.json:
        print(json.dumps({"artifacts": count, "problems": problems}, indent=2))
    else:
        print("\n".join([*problems, f"{count} artifacts checked, {len(problems)} problems"]))
    return 1 if problems else 0


_COMMANDS = {
    "run": _run,
    **dict.fromkeys(STAGES, _stage),
    "size": _size,
    "families": _families,
    "report": _report,
    "verify": _verify,
}
