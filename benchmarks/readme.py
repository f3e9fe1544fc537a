"""Writes the demo's table into README.md, from runs/demo/report/report.json (``make demo`` first)."""

import re
from pathlib import Path

from nemo_minitron.evaluation.report import columns, markdown, read_report, table

ROOT = Path(__file__).parents[1]
_LEFT_OUT = ("prefill tok/s", "decode tok/s", "peak MB")
"""Of a machine, not of the models."""


def main() -> None:
    """Replaces what stands between the two marks."""
    report = read_report(ROOT / "runs" / "demo" / "report")
    rows = tuple(row for row in table(report) if row[0] not in _LEFT_OUT)
    text = markdown(columns(report), rows)
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new, found = re.subn(
        r"(<!-- demo -->\n).*?(<!-- /demo -->)",
        lambda m: f"{m[1]}{text}\n{m[2]}",
        old,
        flags=re.DOTALL,
    )
    if not found:
        raise SystemExit(f"{readme}: the marks <!-- demo --> and <!-- /demo --> are gone")
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
