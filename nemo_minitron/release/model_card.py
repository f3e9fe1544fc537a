"""The text of the model card; what comes from files stands in it as text, never as markup."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.evaluation.report import COMPARED, WRITTEN, columns, compared, markdown, table, written
from nemo_minitron.pruning.plan_file import Plan
from nemo_minitron.release.quickstart import QUICKSTART
from nemo_minitron.security import plain_text


def card_text(
    name: str,
    source: Mapping[str, Any],
    plan: Plan,
    report: Mapping[str, Any],
    failed: Sequence[tuple[str, str, str, str]] = (),
    licence: Mapping[str, str] | None = None,
) -> str:
    """Body of the card: what it is, quickstart, sizes, results, limits.

    Args:
        name: title.
        source: contents of the workspace's ``teacher/source.json``.
        plan: what was cut.
        report: what was measured.
        failed: rows of the quality gate that did not hold.
        licence: what the source's card says of its licence that does not fit into this card's front matter.
    """
    student, teacher = report["models"]["student"], report["models"]["teacher"]
    given = Path(source["given"]).expanduser()
    source = {**source, "given": given.name} if given.is_absolute() else source  # no path of this machine
    return f"""{_head(name, source, plan)}
{_warning(failed)}
## Quickstart

```python
{QUICKSTART}
```

{_results(plan, report)}
## Limits

The student has been trained on far less text than its teacher, and on the text of one distillation run only.
On that kind of text its perplexity is {student["perplexity"]:.3f} against the teacher's
{teacher["perplexity"]:.3f}; on other text it may have lost more. Free generation recovers later than multiple
choice: look at both. It inherits the teacher's biases and gaps. Measure it on your own task before you rely
on it.

{_licence(licence or {})}## Lineage

`minitron.json` lists every step with its configuration, inputs and fingerprints.
"""


def _licence(untaken: Mapping[str, str]) -> str:
    if not untaken:
        return ""
    told = "\n".join(f"- {plain_text.code(name)}: {plain_text.code(text)}" for name, text in untaken.items())
    return f"## Licence\n\nThe card of the source says of its licence:\n\n{told}\n\n"


def _head(name: str, source: Mapping[str, Any], plan: Plan) -> str:
    revision = f" at {plain_text.code(source['revision'])}" if source["revision"] else ""
    origin = f"{plain_text.code(source['given'])}{revision}"
    return f"""# {plain_text.markdown(name)}

A {plain_text.markdown(plan.model_type)} model of {plan.cost_after.parameters:,} parameters, pruned
from {origin} ({plan.cost_before.parameters:,} parameters) and distilled from its teacher
by the Minitron recipe ([arXiv 2407.14679](https://arxiv.org/abs/2407.14679),
[arXiv 2408.11796](https://arxiv.org/abs/2408.11796)) with nemo_minitron."""


def _results(plan: Plan, report: Mapping[str, Any]) -> str:
    sizes = [(axis, f"{plan.before[axis]:,}", f"{plan.after[axis]:,}") for axis in plan.before]
    sizes.append(("parameters", f"{plan.cost_before.parameters:,}", f"{plan.cost_after.parameters:,}"))
    return f"""## Sizes

{markdown(("axis", "before", "after"), tuple(sizes))}

## Results

Held-out text of {report["models"]["student"]["tokens"]:,} tokens. "perplexity retention" is the teacher's
perplexity over the model's.{_as_it_is(report)}{_limit(report)}

{markdown(columns(report), table(report))}

The same documents, each model against the teacher; p is how likely such a difference would be between models
that are equally good, "recovered gap" the share of what the cut lost:

{markdown(COMPARED, compared(report))}
{_written(report)}"""


def _as_it_is(report: Mapping[str, Any]) -> str:
    return (
        f" The distilled model was measured in {plain_text.code(report['dtype'])}." if report["dtype"] else ""
    )


def _limit(report: Mapping[str, Any]) -> str:
    limit = report["measured_on"]["task_limit"]
    if limit is None or not any(row.get("tasks") for row in report["models"].values()):
        return ""
    return f" Of each task only the first {limit:,} questions were asked."


def _warning(failed: Sequence[tuple[str, str, str, str]]) -> str:
    if not failed:
        return ""
    told = "; ".join(f"{name} is {found}, asked for was {asked}" for name, asked, found, _ in failed)
    return f"\n> **Exported by force: the quality gate failed.** {plain_text.markdown(told)}.\n"


def _written(report: Mapping[str, Any]) -> str:
    if "writing" not in report:
        return ""
    return f"""
Greedy continuations of held-out beginnings: the share that is word for word what the teacher writes, up to
the first difference; the share of runs of four tokens that stood there before; and the teacher's loss on
them, in nats a token:

{markdown(WRITTEN, written(report))}
"""
