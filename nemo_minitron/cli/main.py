"""The command line: composes configurations, runs one stage or, imported late, the flow. Knows no tensor."""

import argparse
import contextlib
import errno
import json
import os
import select
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import nemo_minitron
from nemo_minitron.cli import family_tables, model_size, workspaces
from nemo_minitron.cli.endings import ended_by, sigterm_like_ctrl_c
from nemo_minitron.cli.tables import print_table
from nemo_minitron.launch.start_up import start_fast
from nemo_minitron.security.plain_text import plain
from nemo_minitron.stages.run import SEVERAL, STAGES, run_by_hand
from nemo_minitron.workspace.layout import Workspace

if TYPE_CHECKING:
    from nemo_minitron.config.config import Config
    from nemo_minitron.stages.result import Result

_HELP = {
    "run": "the whole pipeline, as a Prefect flow",
    "download": "find, fetch and check the model to compress",
    "pretrain": "train a small model from random weights",
    "correct": "train the teacher on the distillation data",
    "score": "importance of channels, heads, neurons and layers",
    "measure-layers": "what each kind of layer takes on this machine, by its sizes",
    "screen": "candidates of a search, measured in memory as they are cut",
    "sensitivity": "loss against the share kept of each axis, and without each layer",
    "plan": "decide what stays",
    "prune": "write the smaller checkpoint",
    "logits": "run the teacher once, and keep a few entries per token",
    "distill": "train the pruned model against its teacher",
    "evaluate": "measure all models, write the report",
    "export": "write the Hugging Face folder",
    "size": "parameters, FLOPs per token and KV-cache bytes, from config.json alone",
    "families": "supported architectures and their axes",
    "report": "(re)write report.html",
    "verify": "re-hash an artifact or a workspace",
}


class _Parser(argparse.ArgumentParser):
    """Names in its messages are text, as in all others."""

    def error(self, message: str) -> NoReturn:
        super().error(plain(message))


def parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The command line's grammar: the whole, and that of each command."""
    top = _Parser(
        prog="minitron",
        description="Smaller language models out of bigger ones: score, prune, distil, evaluate, export.",
    )
    top.add_argument(
        "--version", action="version", version=f"nemo_minitron {nemo_minitron.__version__}"
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in ("run", *STAGES):
        command = commands.add_parser(name, help=_HELP[name], description=_HELP[name])
        command.add_argument(
            "--config-name",
            "-cn",
            default="config",
            metavar="NAME",
            help="configuration to start from",
        )
        command.add_argument(
            "--config-dir",
            "--config-path",
            "-cd",
            "-cp",
            metavar="DIR",
            help="folder with configurations of your own",
        )
        command.add_argument(
            "--keys", action="store_true", help="print every configuration key and stop"
        )
        command.add_argument(
            "--cfg", action="store_true", help="print the composed configuration and stop"
        )
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="overrides in Hydra's grammar"
        )
    _add_size(commands)
    families = commands.add_parser(
        "families", help=_HELP["families"], description=_HELP["families"]
    )
    families.add_argument(
        "names",
        nargs="*",
        metavar="MODEL_TYPE",
        help="these only; families.path=TABLE adds your own",
    )
    families.add_argument(
        "--prove", action="store_true", help="prove the tables on tiny models (seconds each)"
    )
    families.add_argument("--json", action="store_true")
    for name, operand in (("report", "workspace"), ("verify", "path")):
        command = commands.add_parser(name, help=_HELP[name], description=_HELP[name])
        command.add_argument(operand, metavar=operand.upper(), type=Path)
        command.add_argument("--json", action="store_true")
    workspaces.add_parsers(commands)
    return top, commands.choices


def _add_size(commands: Any) -> None:
    size = commands.add_parser("size", help=_HELP["size"], description=_HELP["size"])
    size.add_argument(
        "model", metavar="MODEL", help="model folder, config.json, GGUF file, or hub id"
    )
    size.add_argument(
        "sizes", nargs="*", metavar="axis=size", help="hidden= ffn= heads= kv_heads= layers= ..."
    )
    size.add_argument(
        "--context", type=int, default=4096, help="tokens of context that FLOPs assume"
    )
    size.add_argument("--json", action="store_true")
    plan = size.add_argument_group("memory of a training")
    plan.add_argument("--training", action="store_true", help="estimate what each rank needs")
    plan.add_argument("--ranks", type=int, default=1, help="processes")
    plan.add_argument("--shard", action="store_true", help="training.parallel=shard (FSDP2)")
    plan.add_argument("--tensor-parallel", type=int, default=1, help="training.tensor_parallel")
    plan.add_argument("--precision", default="bf16-mixed", help="trainer.precision")
    plan.add_argument(
        "--tokens", type=int, default=4096, help="tokens of a micro-batch on each rank"
    )
    plan.add_argument("--activation-checkpointing", action="store_true")
    plan.add_argument(
        "--teacher", metavar="MODEL", help="a teacher besides: folder, config.json, or hub id"
    )
    plan.add_argument("--teacher-shard", action="store_true", help="distill.teacher_place=shard")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0 done, 2 the user's input is wrong (one line says what), 1 it failed or Ctrl-C was pressed, 143
        SIGTERM came.
    """
    if arguments is None:  # this process is ours
        start_fast()
    raw = sys.argv[1:] if arguments is None else arguments
    top, commands = parser()
    if (
        raw and raw[0] in commands
    ):  # a command on its own lets options and overrides stand in any order
        args = commands[raw[0]].parse_intermixed_args(raw[1:], argparse.Namespace(command=raw[0]))
    else:
        args = top.parse_args(raw)
    args.words = ["minitron", *raw]
    try:
        with sigterm_like_ctrl_c():
            code = _COMMANDS[args.command](args)
            sys.stdout.flush()
            return code
    except BaseException as error:
        return _ended(args.command, error)


def _ended(command: str, error: BaseException) -> int:
    """Says in one line why a command ends without a result; returns its exit status.

    Raises:
        BaseException: an exit that nobody asked for by a signal; or all, where tracebacks are asked
            for.
    """
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return 1
    ended = ended_by(error)
    if ended is not None:
        print(f"minitron {command}: {plain(ended[0])}", file=sys.stderr)
        return ended[1]
    # a name that is too long stands where the user wrote it
    if isinstance(error, ValueError) or getattr(error, "errno", None) == errno.ENAMETOOLONG:
        print(f"minitron {command}: {_one_line(error)}", file=sys.stderr)
        return 2
    if not isinstance(error, Exception) or os.environ.get("MINITRON_TRACEBACK"):
        raise error
    text = f"{type(error).__name__}: {_one_line(error)}"
    print(f"minitron {command}: failed: {text} (MINITRON_TRACEBACK=1 shows where)", file=sys.stderr)
    return 1


def _nobody_reads() -> bool:
    """Whether who read standard output, such as ``head``, is gone; Python then ends quietly."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(state & select.POLLERR for _, state in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _one_line(error: BaseException) -> str:
    from nemo_minitron.security.masking import masked

    return plain(masked(str(error)))


def _config(args: argparse.Namespace) -> "Config":
    from nemo_minitron.config.compose import load_config

    return load_config(args.config_name, args.overrides, args.config_dir)


def _shows_only(args: argparse.Namespace) -> bool:
    if args.keys:
        from nemo_minitron.config.config import Config
        from nemo_minitron.config.option import describe, meaning

        for name, item, _ in describe(Config):
            print(f"{name}: {meaning(item)}")
        return True
    if args.cfg:
        from omegaconf import OmegaConf

        from nemo_minitron.security.masking import masked

        print(masked(OmegaConf.to_yaml(OmegaConf.structured(_config(args)))), end="")
        return True
    return False


def _stage(args: argparse.Namespace) -> int:
    if _shows_only(args):
        return 0
    config = _config(args)
    _tell_what_is_left_to_run(config)
    # progress bars go to the error output: standard output is for the result
    with contextlib.redirect_stdout(sys.stderr):
        result = run_by_hand(
            args.command, config, args.words, _before(args.command, config), _notes
        )
    if result is None:
        return 0
    _show(result, args.json)
    _notes(result)
    return 0


def _tell_what_is_left_to_run(config: "Config") -> None:
    """Says which keys only ``minitron run`` and the flows heed; of several ranks the first says it."""
    if os.environ.get("RANK", "0") != "0":
        return
    here = (
        "in this process"
        if "RANK" not in os.environ
        else "in the processes that torchrun has started"
    )
    if config.launch.kind != "inline":
        print(
            f"note: launch.kind={config.launch.kind}: minitron run launches stages; this one runs {here}",
            file=sys.stderr,
        )
    if config.track.mlflow is not None:
        print(
            "note: track.mlflow: minitron run tracks its stages; this one is not tracked",
            file=sys.stderr,
        )


def _before(command: str, config: "Config") -> list[str]:
    """Stages that cost next to nothing, brought up to date before one that is run on its own.

    The pointer to the source model; the plan, where its sizes are given; a ranking that needs no
    data.
    """
    names = (
        ["download"]
        if config.source.model is not None and command not in ("download", "pretrain")
        else []
    )
    from nemo_minitron.pruning.target_sizes import explicit_targets, needs_scores

    if command in ("plan", "prune") and explicit_targets(config.plan):
        if needs_scores(config.plan) and config.score.importance != "activation":
            names.append("score")
        if command == "prune":
            names.append("plan")
    return names


def _notes(result: "Result") -> None:
    for note in result.notes:
        print(f"note: {plain(note)}", file=sys.stderr)


def _run(args: argparse.Namespace) -> int:
    if _shows_only(args):
        return 0
    config = _config(args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"not under torchrun; run the stages that compute with it: {', '.join(SEVERAL)}"
        )
    from nemo_minitron.workspace.locks import locked_and_lent

    # held from before Prefect starts, which takes seconds: of two runs the first one keeps it
    with locked_and_lent(Path(config.workspace), config.launch.wait):
        from nemo_minitron.flows.local import run_here

        with contextlib.redirect_stdout(sys.stderr):
            results = run_here(config, args.words)
    if args.json:
        print(json.dumps([_json(result) for result in results], indent=2))
        return 0
    from nemo_minitron.evaluation.report import PAGE

    evaluated = [result for result in results if result.stage == "evaluate"]
    for result in evaluated:
        print_table(result.columns, result.rows, result.headline)
    workspace = Workspace(Path(config.workspace))
    exported = [result.folder for result in results if result.stage == "export"]
    model = exported[-1] if exported else workspace.export
    print(f"report  {plain(workspace.report / PAGE)}\nmodel   {plain(model)}")
    return 0


def _show(result: "Result", as_json: bool) -> None:
    if as_json:
        print(json.dumps(_json(result), indent=2))
        return
    if result.columns:
        print_table(result.columns, result.rows)
    print(f"{result.stage}: {plain(result.headline)}" + ("" if result.made else " (already done)"))


def _json(result: "Result") -> dict[str, Any]:
    return {
        "stage": result.stage, "folder": str(result.folder), "made": result.made, "headline": result.headline,
        "facts": result.facts, "notes": list(result.notes),
    }  # fmt: skip


def _report(args: argparse.Namespace) -> int:
    from nemo_minitron.stages.rewrite_report import rewrite
    from nemo_minitron.workspace.locks import locked

    if not args.workspace.is_dir():
        raise ValueError(f"{args.workspace}: no such workspace")
    with locked(args.workspace):
        _show(rewrite(args.workspace), args.json)
    return 0


_COMMANDS = {
    "run": _run,
    **dict.fromkeys(STAGES, _stage),
    "size": model_size.size,
    "families": family_tables.families,
    "report": _report,
    "verify": workspaces.verify,
    **workspaces.COMMANDS,
}
