"""The supported architectures, and the proofs of their tables."""

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_minitron.cli.tables import print_table

if TYPE_CHECKING:
    from nemo_minitron.families import Family, Wrapper


def split_own_tables(words: list[str]) -> tuple[str | None, list[str]]:
    """The value of families.path among a command's words, and the other words."""
    prefix = "families.path="
    own = [word.removeprefix(prefix) for word in words if word.startswith(prefix)]
    return (own[-1] if own else None), [word for word in words if not word.startswith(prefix)]


def families(args: argparse.Namespace) -> int:
    """``minitron families``: the tables and, on request, their proofs."""
    from nemo_minitron.families import families, use_tables, wrappers

    own, names = split_own_tables(args.names)
    if own:
        use_tables(own)
    known = [*families(), *wrappers()]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(
            f"families: no family {unknown[0]!r}; there are: {', '.join(sorted(known))}"
        )
    chosen = {name: family for name, family in families().items() if not names or name in names}
    around = {name: table for name, table in wrappers().items() if not names or name in names}
    if args.prove:
        return _prove(chosen, around, args.json)
    if args.json:
        listed: dict[str, Any] = {
            name: {
                "architecture": family.architecture,
                "prunable": list(family.prunable),
                "axes": list(family.axes),
            }
            for name, family in chosen.items()
        }
        for name, table in around.items():
            inside = [families()[family] for family in table.text.values()]
            listed[name] = {
                "architecture": table.architecture,
                "prunable": list(inside[0].prunable),
                "axes": list(inside[0].axes),
                "text": list(table.text),
            }
        print(json.dumps(listed, indent=2))
        return 0
    rows = [
        (name, family.architecture, ", ".join(family.prunable)) for name, family in chosen.items()
    ]
    rows += [
        (name, table.architecture, f"those of {' or '.join(table.text.values())}, which it holds")
        for name, table in around.items()
    ]
    print_table(("model_type", "architecture", "axes that can be pruned"), tuple(rows))
    return 0


def _prove(chosen: Mapping[str, "Family"], around: Mapping[str, "Wrapper"], as_json: bool) -> int:
    from nemo_minitron.proofs.proof import proof_table
    from nemo_minitron.proofs.wrapper_proof import wrapper_table

    failed = 0
    tables = []
    with contextlib.redirect_stdout(sys.stderr):
        for prove, of in ((proof_table, chosen), (wrapper_table, around)):
            if of:
                columns, rows, wrong = prove(of)  # type: ignore[operator]
                tables.append((columns, rows))
                failed += wrong
    if as_json:
        print(
            json.dumps(
                [dict(zip(c, row, strict=True)) for c, rows in tables for row in rows], indent=2
            )
        )
    else:
        for columns, rows in tables:
            print_table(columns, rows)
    return 1 if failed else 0
