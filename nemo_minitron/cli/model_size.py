"""Commands that only look: sizes of a model, the families, the bytes of an artifact."""

import argparse
import contextlib
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.plain_text import plain


def print_table(
    columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...], title: str | None = None, left: int = 1
) -> None:
    """Prints a table, as wide as it needs to be where the output is no terminal.

    Args:
        columns: titles.
        rows: cells as text.
        title: above it.
        left: columns of words; those of numbers, to the right, follow.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None if title is None else Text(plain(title)))
    for i, column in enumerate(columns):
        table.add_column(Text(plain(column)), justify="left" if i < left else "right")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))  # text: a name is no markup
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

    own, wanted = _own_tables(args.sizes)
    if own:
        use_tables(own)
    path = _config_folder(args.model)
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
    config = config_with_sizes(family, config, sizes)
    cost = model_size(family, config, args.context)
    memory = _training_memory(args, family, config) if args.training else {}
    facts: dict[str, Any] = {**sizes, **asdict(cost)} | ({"training": memory} if memory else {})
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
    rows += [(f"training, each rank: {part}", f"{value / 2**30:,.1f} GiB") for part, value in memory.items()]
    print_table(("", str(args.model)), tuple(rows))
    return 0


def _config_folder(model: str) -> Path:
    """Where a model's config.json lies; a hub model's is fetched."""
    path = Path(model).expanduser()
    if path.name == "config.json":
        path = path.parent
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        from nemo_minitron.bridge.hub import download_config

        return download_config(model)
    return path


def _training_memory(args: argparse.Namespace, family: Any, config: Any) -> dict[str, int]:
    """Bytes on each rank, by what they are for."""
    from nemo_minitron.artifacts.checkpoint import read_config
    from nemo_minitron.core.footprint import Launch, training_footprint
    from nemo_minitron.families import family_of

    try:
        launch = Launch(
            args.ranks, args.shard, args.tensor_parallel, args.precision, args.tokens,
            args.activation_checkpointing, args.teacher_shard,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"size: --{error}") from error
    teacher = None
    if args.teacher:
        their = read_config(_config_folder(args.teacher))
        teacher = (family_of(their, args.teacher), their)
    found = training_footprint(family, config, launch, teacher)
    return {**asdict(found), "total": found.total}


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
        print("\n".join([*map(plain, problems), f"{count} artifacts checked, {len(problems)} problems"]))
    return 1 if problems else 0
