"""The families' page: its table of proofs, and the counts that it and the README name."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import transformers
import yaml

from nemo_minitron.families import families
from nemo_minitron.proofs.proof import COLUMNS, Row, proof_table

MARKS = ("<!-- proofs -->", "<!-- end of proofs -->")


def markdown(rows: Sequence[Row]) -> str:
    """The table of proofs as docs/families.md has it, between its marks."""
    head = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    made = f"Made by `make docs`, with transformers {transformers.__version__}."
    return "\n".join([MARKS[0], made, "", *head, *lines, MARKS[1]])


COUNTED = re.compile(r"\d+ families, \d+ configurations of published models")


def counted(root: Path) -> str:
    """How many families there are, and how many published config.json files prove them."""
    files = (root / "tests" / "families" / "real_configs").glob("*.yaml")
    configs = sum(len(yaml.safe_load(file.read_text(encoding="utf-8"))) for file in files)
    return f"{len(families())} families, {configs} configurations of published models"


def _write(page: Path) -> None:
    root = page.resolve().parents[1]
    for counts in (page, root / "README.md"):
        said = COUNTED.sub(counted(root), counts.read_text(encoding="utf-8"))
        counts.write_text(said, encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    start, end = text.index(MARKS[0]), text.index(MARKS[1]) + len(MARKS[1])
    _, rows, failed = proof_table(families())
    if failed:
        raise SystemExit(f"{failed} proofs fail: minitron families --prove")
    page.write_text(text[:start] + markdown(rows) + text[end:], encoding="utf-8")


if __name__ == "__main__":
    _write(Path(sys.argv[1]))
