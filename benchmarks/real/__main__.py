"""``python -m benchmarks.real PIECE ...``: published small models through the whole recipe, by the README's commands.

Models come from packages of the package index, by name; they, texts and workspaces lie in runs/real, and a call that was
stopped goes on there. Results: benchmarks/results/real-*.json; ``--tables`` writes them into README.md and docs/.
"""

import argparse
from pathlib import Path

from benchmarks.real.pieces import PIECES
from benchmarks.real.tables import show, write_tables
from benchmarks.real.texts import write_texts
from benchmarks.real.tools import CPU, GPU, Run

GROUPS = {
    "smollm2": ("smollm2-100m", "smollm2-70m"),
    "vocab": ("smollm2-vocab", "gemma-vocab"),
}
"""Names for several pieces."""


def main() -> None:
    """Runs the pieces that are named; all of them where none is."""
    listed = "\n".join(f"  {name:<14} {what}" for name, (_, what) in PIECES.items())
    groups = "\n".join(f"  {name:<14} {' '.join(parts)}" for name, parts in GROUPS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{listed}\n{groups}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pieces", nargs="*", metavar="PIECE", choices=[*PIECES, *GROUPS, []])
    parser.add_argument("--gpu", action="store_true", help="a thousand steps on a CUDA device")
    parser.add_argument(
        "--root", type=Path, default=Path("runs/real"), help="models, texts, workspaces"
    )
    parser.add_argument("--prose", nargs="+", default=[], metavar="FILE", help="text of your own (.jsonl, .jsonl.gz with "
                        "a text each line, or plain) instead of the docstrings of Python's library")  # fmt: skip
    parser.add_argument("--german", metavar="FOLDER", help="of .mo files; default: the system's")
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="for every command"
    )
    parser.add_argument(
        "--tables", action="store_true", help="write what is measured into README.md and docs/"
    )
    given = parser.parse_args()
    run = Run(
        given.root,
        GPU if given.gpu else CPU,
        tuple(given.prose),
        given.german,
        tuple(given.override),
    )
    if given.pieces or not given.tables:
        write_texts(run.root / "text", run.prose, run.german)
    for name in given.pieces or ([] if given.tables else PIECES):
        for piece in GROUPS.get(name, (name,)):
            run.write(piece, PIECES[piece][0](run, piece))
            print(show(run.profile, piece), flush=True)
    if given.tables:
        write_tables(run.profile)


if __name__ == "__main__":
    main()
