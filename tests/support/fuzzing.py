"""How many damaged inputs a test tries: a few with the others, thousands in ``make fuzz``."""

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SEED = int(os.environ.get("FUZZ_SEED", "0"))


def some(cases: Iterable[Any], few: int) -> Iterator[Any]:
    """The first of endless cases: ``few``, or as many as FUZZ says."""
    return itertools.islice(cases, examples(few))


def examples(few: int) -> int:
    """How many examples of a property hypothesis draws: ``few``, or as many as FUZZ says."""
    return int(os.environ.get("FUZZ", few))


def tally(kind: str, outcomes: Counter[str]) -> None:
    """Adds a line on what became of the cases to the file that FUZZ_TALLY names."""
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    if "FUZZ_TALLY" in os.environ:
        with Path(os.environ["FUZZ_TALLY"]).open("a", encoding="utf-8") as file:
            file.write(f"{kind} (seed {SEED}): {sum(outcomes.values())} inputs: {told}\n")
