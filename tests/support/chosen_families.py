"""Which families, and which of their configurations, the costly tests take.

A table is proven under each of its configurations, and what stands on tables (scoring, distilling) is tested with
every family. That takes seconds for each, and more tables come. Tables are built of few kinds of parts, though: a row's
axes, what an axis is ranked by, where an activation is read. So ``make test`` takes the fewest families that have every
kind between them, all of their configurations, and of all others the first configuration, which proves each row that
the family's models have by default. A table with a part of a new kind is chosen by itself. What scores and distils
sees of a table only what it reads and how norms and logits are made; for it, fewer families have every kind.
That a proof bites is seen on the first row of each kind. ``make families`` takes what is left; it is slow, and run when
tables or what stands on them change.
"""

import os
from collections.abc import Callable, Iterator, Mapping

from nemo_minitron.families import Family
from tests.support.models import INSTALLED

WHICH = os.environ.get("FAMILIES", "chosen")
"""``chosen``, or ``others``: those that are not."""


def read(family: Family) -> set[object]:
    """The kinds of parts that scoring and distilling see: where activations are read, norms, logits."""
    found: set[object] = {
        (name, tap.side, tap.dim) for name, taps in family.taps.items() for tap in taps
    }
    return found | {tuple(family.logits), ("norms", family.zero_centred_norms)}


def kinds(family: Family) -> set[object]:
    """The kinds of parts that a table is built of."""
    found: set[object] = {(row.dims, len(row.placeholders)) for row in family.rows}
    found |= {
        (axis.name, axis.scope, axis.within, axis.inexact is not None, bool(axis.lists))
        for axis in family.axes.values()
    }
    return found | {("fold", fold.offset != 0) for fold in family.folds} | read(family)


def cover(tables: Mapping[str, Family], kinds_of: Callable[[Family], set[object]]) -> Iterator[str]:
    """The fewest families, but for a few, that have every kind; Llama, the plainest, is the first."""
    left = {name: kinds_of(family) for name, family in tables.items()}
    best = "llama"
    while left[best]:
        yield best
        covered = left[best]
        left = {name: found - covered for name, found in left.items()}
        best = max(sorted(left), key=lambda name: len(left[name]))


def _taken(kinds_of: Callable[[Family], set[object]]) -> list[str]:
    chosen = set(cover(INSTALLED, kinds_of))
    return sorted(INSTALLED.keys() - chosen if WHICH == "others" else chosen)


CHOSEN = _taken(kinds)
"""Families whose tables the costly tests take."""
READ = _taken(read)
"""Families that the costly tests of scoring and distilling take."""
CASES = [
    (name, number)
    for name, family in sorted(INSTALLED.items())
    for number in range(len(family.proofs))
    if name in CHOSEN or (number == 0 and WHICH != "others")
]
"""Families, and the numbers of the configurations under which they are proven."""


def _first_of_their_kind() -> Mapping[str, set[object]]:
    """Of the chosen families the rows whose kind no family before them has."""
    seen: set[object] = set()
    found: dict[str, set[object]] = {}
    for name in cover(INSTALLED, kinds):
        rows = INSTALLED[name].rows
        found[name] = {
            (row.pattern, row.dims) for row in rows if (row.dims, len(row.placeholders)) not in seen
        }
        seen |= {(row.dims, len(row.placeholders)) for row in rows}
    return found


_FIRST = _first_of_their_kind()
ROWS = {
    name: rows
    for name, family in INSTALLED.items()
    if (
        rows := {
            (row.pattern, row.dims)
            for row in family.rows
            if ((row.pattern, row.dims) in _FIRST.get(name, ())) == (WHICH != "others")
        }
    )
}
"""Rows, by their family, without whose axes the proofs must fail: to see that takes a model for each axis."""
