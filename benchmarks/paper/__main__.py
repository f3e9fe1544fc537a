"""``python -m benchmarks.paper [EXPERIMENT ...] --profile quick``: measures, and writes docs/paper.md.

What has been measured is kept in runs/paper/PROFILE and not measured again; a run that was stopped goes on.
"""

import argparse
import datetime
import importlib
import json
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper import page, side_by_side
from benchmarks.paper.lab import ROOT, Lab, OutOfTime
from benchmarks.paper.page import EXPERIMENTS, result_path
from benchmarks.paper.profiles import PROFILES, Profile
from nemo_minitron.evaluation.report import markdown
from nemo_minitron.workspace.atomic import replacing


def machine(profile: Profile) -> str:
    """What it runs on."""
    if "trainer.accelerator=gpu" in profile.words:
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def run(name: str, profile: Profile, ends: float | None) -> None:
    """Measures an experiment with all seeds; its results are written after every row.

    Raises:
        OutOfTime: the piece's minutes are over.
        ValueError: the package refuses what the experiment asks for.
    """
    module: Any = importlib.import_module(f"benchmarks.paper.{name}")
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in range(profile.seeds):
        for variant, found in module.measure(Lab(profile, seed, ends)):
            of = rows.setdefault(variant, [])
            of += [{}] * (seed - len(of))  # a variant that an earlier seed did not need
            of.append(found)
            loss = "".join(f" {key} {found[key]:.4f}" for key in ("pruned", "loss") if key in found)
            print(f"{name}, seed {seed}, {variant}:{loss}", flush=True)
            _write(name, profile, rows)


def _write(name: str, profile: Profile, rows: dict[str, list[dict[str, Any]]]) -> None:
    if profile.name == "smoke":
        path = ROOT / "smoke" / "results" / f"{name}.json"
    else:
        path = result_path(profile.name, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = page.read(profile.name, name).get("rows", {}) if profile.name != "smoke" else {}
    if (
        sum(map(len, rows.values())) < sum(map(len, before.values()))
        and rows.keys() <= before.keys()
    ):
        return  # what an earlier run has written is not taken back while this one catches up
    told = {
        "experiment": name, "profile": profile.name, "machine": machine(profile),
        "date": datetime.date.today().isoformat(), "torch": torch.__version__,
    }  # fmt: skip
    lines = [  # a line for each variant and seed
        f"  {json.dumps(variant)}: [\n   "
        + ",\n   ".join(json.dumps(_short(row)) for row in of)
        + "]"
        for variant, of in rows.items()
    ]
    head = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in told.items())
    with replacing(path) as temporary:
        temporary.write_text(
            f'{{\n{head} "rows": {{\n' + ",\n".join(lines) + "}}\n", encoding="utf-8"
        )


def _short(value: Any) -> Any:
    """Numbers with seven digits."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, list):
        return [_short(each) for each in value]
    return {key: _short(each) for key, each in value.items()} if isinstance(value, dict) else value


def given(folder: Path, data: list[str], steps: int) -> None:
    """Side by side on a model of one's own: prints a table."""
    words = side_by_side.given_words(data)
    lab = Lab(replace(PROFILES["quick"], name="given", seeds=1, words=("evaluate.tasks=[]",)), 0,
              given=(folder.resolve(), words))  # fmt: skip
    keys = ("pruned", "loss") if steps else ("loss",)
    table = []
    for name, found in side_by_side.measure_given(lab, steps):
        table.append((name, *(f"{found[key]:.4f}" if key in found else "" for key in keys)))
        print(*table[-1], flush=True)
    titles = {"pruned": "loss after the cut", "loss": "after training" if steps else "loss"}
    print(f"\n{markdown(('', *(titles[key] for key in keys)), tuple(table))}")


def main() -> int:
    """Runs the experiments that are named; all of them where none is."""
    listed = "\n".join(
        f"  {name:<14} {importlib.import_module(f'benchmarks.paper.{name}').TITLE}"
        for name in EXPERIMENTS
    )
    parser = argparse.ArgumentParser(
        "benchmarks.paper", description=f"{__doc__}\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", choices=[*EXPERIMENTS, []])
    parser.add_argument("--profile", choices=PROFILES, default="quick")
    parser.add_argument(
        "--minutes", type=float, help="begin nothing new after so many; the next call goes on"
    )
    parser.add_argument("--model", type=Path, help="side by side on the model in this folder")
    parser.add_argument(
        "--data", nargs="+", default=[], help="its text: files that data.train.paths takes"
    )
    parser.add_argument("--steps", type=int, default=0, help="its steps of distillation")
    args = parser.parse_args()
    if args.model is not None:
        if not args.data:
            parser.error("--model: needs --data, files of text")
        given(args.model, args.data, args.steps)
        return 0
    profile = PROFILES[args.profile]
    if "trainer.accelerator=gpu" in profile.words and not torch.cuda.is_available():
        print("benchmarks.paper: --profile gpu: no CUDA device here", file=sys.stderr)
        return 2
    ends = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    refused = 0
    for name in args.experiments or EXPERIMENTS:
        try:
            run(name, profile, ends)
        except OutOfTime:
            print(
                f"{name}: {args.minutes:g} minutes are over; the same command goes on", flush=True
            )
            break
        except RuntimeError as error:
            from nemo_minitron.training.preemption import Preempted, TimeOver

            if not isinstance(error, Preempted):
                raise
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            refused += not isinstance(error, TimeOver)
            break
        except ValueError as error:
            refused += 1
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    if args.profile != "smoke":
        page.main()
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
