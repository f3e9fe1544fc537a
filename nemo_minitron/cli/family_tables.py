"""The supported architectures, and the proofs of their tables."""

import argparse
import contextlib
import json
import sys

from nemo_minitron.cli.tables import print_table


def split_own_tables(words: list[str]) -> tuple[str | None, list[str]]:
    """The value of families.path among a command's words, and the other words."""
    prefix = "families.path="
    own = [word.removeprefix(prefix) for word in words if word.startswith(prefix)]
    return (own[-1] if own else None), [word for word in words if not word.startswith(prefix)]


def families(args: argparse.Namespace) -> int:
    """``minitron families``: the tables and, on request, their proofs."""
    from nemo_minitron.families import families, use_tables

    own, names = split_own_tables(args.names)
    if own:
        use_tables(own)
    unknown = sorted(set(names) - set(families()))
    if unknown:
        raise ValueError(
            f"families: no family {unknown[0]!r}; there are: {', '.join(sorted(families()))}"
        )
    chosen = {name: family for name, family in families().items() if not names or name in names}
    if args.prove:
        from nemo_minitron.proofs.proof import proof_table

        with contextlib.redirect_stdout(sys.stderr):
            columns, rows, failed = proof_table(chosen)
        if args.json:
            print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2))
        else:
            print_table(columns, rows)
        return 1 if failed else 0
    if args.json:
        listed = {
            name: {
                "architecture": family.architecture,
                "prunable": list(family.prunable),
                "axes": list(family.axes),
            }
            for name, family in chosen.items()
        }
        print(json.dumps(listed, indent=2))
        return 0
    rows = [
        (name, family.architecture, ", ".join(family.prunable)) for name, family in chosen.items()
    ]
    print_table(("model_type", "architecture", "axes that can be pruned"), tuple(rows))
    return 0
