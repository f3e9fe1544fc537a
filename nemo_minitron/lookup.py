"""Commands that only look: sizes of a model, the families, the bytes of an artifact."""

import argparse
import contextlib
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path


def print_table(
    columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...], title: str | None = None
) -> None:
    """Prints a table, as wide as it needs to be where the output is no terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def size(args: argparse.Namespace) -> int:
    """``minitron size``: what a model costs, from its config.json alone."""
    from nemo_minitron.artifacts.checkpoint import read_config
    from nemo_minitron.core.cut import Cut, cut_config
    from nemo_minitron.core.size import model_size
    from nemo_minitron.families import axis_sizes, check_sizes, config_with_sizes, family_of, use_tables

    path = Path(args.model).expanduser()
    if path.name == "config.json":
        path = path.parent
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", args.model):
        from nemo_minitron.bridge.hub import download_config

        path = download_config(args.model)
    own, wanted = _own_tables(args.sizes)
    if own:
        use_tables(own)
    config = read_config(path)
    family = family_of(config, str(path / "config.json"))
    sizes = axis_sizes(family, config, str(path / "config.json"))
    for text in wanted:
        axis, _, value = text.partition("=")
        if axis not in sizes or not value.isdecimal() or int(value) < 1:
            raise ValueError(f"size: expected AXIS=SIZE with an axis of {', '.join(sizes)}, found {text!r}")
        sizes[axis] = int(value)
    check_sizes(family, sizes, "size")
    if args.context < 1:
        raise ValueError(f"size: --context: expected at least 1, found {args.context}")
    if sizes["layers"] < axis_sizes(family, config)["layers"]:  # of unlike layers, the first
        config = cut_config(Cut(family, config, {}, tuple(range(sizes["layers"]))))
    cost = model_size(family, config_with_sizes(family, config, sizes), args.context)
    facts = {**sizes, **asdict(cost)}
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    rows = [(axis, f"{value:,}") for axis, value in sizes.items()]
    rows += [
        ("parameters", f"{cost.parameters:,} ({cost.parameters / 1e9:.3f} B)"),
        ("without embeddings", f"{cost.non_embedding:,} ({cost.non_embedding / 1e9:.3f} B)"),
        ("active per token", f"{cost.active:,} ({cost.active / 1e9:.3f} B)"),
        (f"FLOPs per token at {cost.context} tokens", f"{cost.flops_per_token:,}"),
        (f"KV-cache bytes per token ({cost.cache_bytes} bytes each)", f"{cost.kv_bytes_per_token:,}"),
    ]
    print_table(("", str(args.model)), tuple(rows))
    return 0


def _own_tables(words: list[str]) -> tuple[str | None, list[str]]:
    """The value of families.path among a command's words, and the other words."""
    prefix = "families.path="
    own = [word.removeprefix(prefix) for word in words if word.startswith(prefix)]
    return (own[-1] if own else None), [word for word in words if not word.startswith(prefix)]


def families(args: argparse.Namespace) -> int:
    """``minitron families``: the tables and, on request, their proofs."""
    from nemo_minitron.families import families, use_tables

    own, names = _own_tables(args.names)
    if own:
        use_tables(own)
    unknown = sorted(set(names) - set(families()))
    if unknown:
        raise ValueError(f"families: no family {unknown[0]!r}; there are: {', '.join(sorted(families()))}")
    chosen = {name: family for name, family in families().items() if not names or name in names}
    if args.prove:
        from nemo_minitron.bridge.proof import proof_table

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
    rows = [(name, family.architecture, ", ".join(family.prunable)) for name, family in chosen.items()]
    print_table(("model_type", "architecture", "axes that can be pruned"), tuple(rows))
    return 0


def verify(args: argparse.Namespace) -> int:
    """``minitron verify``: re-hashes an artifact or a workspace."""
    from nemo_minitron.artifacts.workspace import verify_tree

    if not args.path.is_dir():
        raise ValueError(f"{args.path}: no such folder")
    count, problems = verify_tree(args.path)
    if args.json:
        print(json.dumps({"artifacts": count, "problems": problems}, indent=2))
    else:
        print("\n".join([*problems, f"{count} artifacts checked, {len(problems)} problems"]))
    return 1 if problems else 0
