"""docs/paper.md, from benchmarks/results/paper/*.json: ``python -m benchmarks.paper.page``."""

import importlib
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.duel import RESULTS
from benchmarks.paper.profiles import PROFILES
from benchmarks.paper.verdict import UNSEEN, Claim, Judged, judge
from nemo_minitron.evaluation.report import markdown

EXPERIMENTS = (
    "family_cost", "aggregation", "losses", "start", "side_by_side", "head_merge", "token_factor", "candidates",
    "iterations", "correction", "depth", "in_steps",
)  # fmt: skip
"""Modules of this package, in the order in which they run."""
FOLDER = RESULTS / "paper"
_DOCS = Path(__file__).parents[2] / "docs"
_SHOWN = (
    "pruned",
    "loss",
    "accuracy",
    "pruned_accuracy",
    "factor",
    "correlation",
    "percent",
    "ratio",
    "step",
)
_TITLES = {
    "pruned": "after the cut", "loss": "after training", "accuracy": "right answers",
    "pruned_accuracy": "right answers after the cut",
}  # fmt: skip


def result_path(profile: str, experiment: str) -> Path:
    """Where the results of an experiment lie."""
    return FOLDER / f"{profile}-{experiment}.json"


def read(profile: str, experiment: str) -> dict[str, Any]:
    """Results of an experiment: ``rows``, variant to a list of what was measured of each seed; {} where there are none."""
    path = result_path(profile, experiment)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def page() -> str:
    """The page's text; writes its pictures."""
    lines = [_HEAD]
    measured = [
        name for name in PROFILES if name != "smoke" and list(FOLDER.glob(f"{name}-*.json"))
    ]
    for profile in measured or ["quick"]:
        lines += [
            f"## Profile `{profile}`\n",
            f"{_profile(profile)}\n",
            "### Verdicts\n",
            _verdicts(profile),
            "",
        ]
        for experiment in EXPERIMENTS:
            lines += [*_section(profile, experiment)]
    return "\n".join(lines).rstrip() + "\n"


_HEAD = """# The papers' claims, measured

Made by `make paper` (`python -m benchmarks.paper`); `python -m benchmarks.paper.page` rewrites this page from
`benchmarks/results/paper/`. Every experiment is a module of `benchmarks/paper/`, whose docstring is its protocol; it goes through
configurations and stages as a user's run does. Models are small and trained here, so that a verdict is about this scale: what does
not show with a model of half a million parameters may hold with a billion, and the other way round.

One rule decides (`benchmarks/paper/verdict.py`): of each seed the difference between two variants of one teacher is taken, positive
where the claim is right. It *holds* where the mean is above the one-sided 95 % bound of Student's distribution, *does not hold* where it is
below minus the bound, and is *not visible at this scale* else. A claim to be the best of several holds where it holds against each of
them, and does not hold where one of them is better beyond a bound that allows for their number; shown is the difference to the one that is best over all
seeds. Losses are held-out cross-entropy in nats per token; [P1] and [P2] are the papers of [papers](papers.md). With many claims some
verdicts of a rule at 95 % are chance.

`--profile night` takes longer, `--profile gpu` trains teachers of 100 M parameters on a GPU; with `--minutes 8` a call ends in time, and the
same call goes on where it was. What has been trained lies in `runs/paper/PROFILE`.

Small scripts without our package look for contradictions of our making: `benchmarks/paper/checks/`.

A model of your own, its neurons cut to two thirds by each technique's criterion, 48 x 512 calibration tokens of a text of yours:
`python -m benchmarks.paper --model FOLDER --data FILE ...` (`--steps 100` distils, too). Seen so with SmolLM2-135M (ffn 1536 to 1024, mixed
prose), held-out loss before any training: teacher 3.481, ours 4.414, Model-Optimizer 0.43 itself 4.452, magnitude 13.31. The row
`model-optimizer` is its published formula, which gives the ranking of ours on the same samples; why Model-Optimizer itself came out otherwise has not been traced.
"""


def _profile(name: str) -> str:
    profile = PROFILES[name]
    words = dict(word.split("=", 1) for word in profile.words)
    model, length, batch = (
        profile.models["nemotron"],
        words["data.train.sequence_length"],
        words["distill.batch_size"],
    )
    teacher = words["pretrain.trainer.max_steps"]
    named = [(kind, of) for kind, of in profile.sizes.items() if kind != "glu"]
    return (
        f"Teachers: Nemotron (squared ReLU) with {model['num_hidden_layers']} layers of width {model['hidden_size']}, "
        f"{model['intermediate_size']} neurons, {model['num_attention_heads']} heads in {model['num_key_value_heads']} groups, "
        f"vocabulary {model['vocab_size']}; side by side a Llama with {profile.models['llama']['intermediate_size']} neurons. "
        f"{profile.seeds} seeds, each a teacher of its own ({int(teacher):,} steps of {batch} x {length} tokens of the standard library). "
        f"Students: {profile.steps} steps, {profile.short} where many variants are compared, on the same batches. "
        f"Cuts: {', '.join(f'{kind} ({_sizes(of)})' for kind, of in named)}; side by side, one axis at a time, {_sizes(profile.sizes['glu'])}."
    )


def _sizes(sizes: Any) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items())


def _judged(profile: str, experiment: str) -> list[tuple[Claim, Judged | None]]:
    claims = importlib.import_module(f"benchmarks.paper.{experiment}").CLAIMS
    rows = read(profile, experiment).get("rows", {})
    return [(claim, judge(claim, rows)) for claim in claims]


def _verdicts(profile: str) -> str:
    rows = []
    for experiment in EXPERIMENTS:
        title = importlib.import_module(f"benchmarks.paper.{experiment}").TITLE
        every = [judged for _, judged in _judged(profile, experiment) if judged]
        found = [judged.verdict for judged in every]
        counts = [str(found.count(verdict)) for verdict in ("holds", "does not hold", UNSEEN)]
        seeds = sorted({len(judged.values) for judged in every if not judged.claim.exact})
        told = (
            " to ".join(str(count) for count in dict.fromkeys((seeds[0], seeds[-1])))
            if seeds
            else "–"
        )
        rows.append((title, told, *counts) if found else (title, "not measured yet", "", "", ""))
    return markdown(("experiment", "seeds", "holds", "does not hold", "not visible"), tuple(rows))


def _section(profile: str, experiment: str) -> Iterator[str]:
    module, found = (
        importlib.import_module(f"benchmarks.paper.{experiment}"),
        read(profile, experiment),
    )
    yield f"### {module.TITLE}\n"
    rows = found.get("rows", {})
    where = f"; {found['machine']}, torch {found['torch']}, {found['date']}" if rows else ""
    yield f"`benchmarks/paper/{experiment}.py`{where}\n"
    if not rows:
        yield "Not measured yet.\n"
        return
    table = []
    for claim, judged in _judged(profile, experiment):
        if judged is None:
            table.append((claim.text, claim.paper, "", "", "not measured yet"))
            continue
        ours = " / ".join(_number(value) for value in judged.values)
        seeds, of = len(judged.values), PROFILES[profile].seeds
        sofar = f" ({seeds} of {of} seeds so far)" if seeds < of and not claim.exact else ""
        spread = "" if judged.spread is None or claim.exact else f" ± {judged.spread:.3f}"
        table.append(
            (
                claim.text,
                claim.paper,
                ours,
                f"{_number(judged.mean)}{spread}",
                f"*{judged.verdict}*{sofar}",
            )
        )
    titles = ("claim", "the paper", "ours, per seed", "mean ± deviation", "verdict")
    yield markdown(titles, tuple(table)).replace(r"\*", "*")  # the verdict's own stress
    yield ""
    yield _rows(rows)
    yield ""
    if hasattr(module, "NOTE"):
        yield f"{module.NOTE}\n"
    if hasattr(module, "pictures"):
        yield from _pictures(module, profile, rows)


def _pictures(module: Any, profile: str, rows: Any) -> Iterator[str]:
    from benchmarks.paper.pictures import save

    folder = _DOCS / "paper"
    folder.mkdir(exist_ok=True)
    for name, figure in module.pictures(rows):
        save(figure, folder / f"{profile}-{name}.svg")
        yield f"![{module.TITLE}](paper/{profile}-{name}.svg)\n"


def _rows(rows: dict[str, list[dict[str, Any]]]) -> str:
    """What was measured: a line per variant, the seeds beside each other."""
    metrics = [
        m for m in _SHOWN if any(row.get(m) is not None for of in rows.values() for row in of)
    ]
    table = []
    for name, of in rows.items():
        cells = []
        for metric in metrics:
            values = [row[metric] for row in of if row.get(metric) is not None]
            mean = f" ({statistics.fmean(values):.3f})" if len(values) > 1 else ""
            cells.append(" / ".join(_number(value) for value in values) + mean)
        table.append((name, *cells))
    return markdown(("variant", *(_TITLES.get(m, m) for m in metrics)), tuple(table))


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    # + 0: not -0.000
    return f"{round(value, 3) + 0:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def main() -> None:
    """Writes docs/paper.md and its pictures."""
    (_DOCS / "paper.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
