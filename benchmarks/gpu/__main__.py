"""``python -m benchmarks.gpu PIECE ...``: measures on a GPU, prints a table, writes benchmarks/results/gpu-PIECE-*.json.

Every number is a ratio to a reference in the same run. ``--try`` runs the same code on the CPU with
tiny sizes, to see that it works before a GPU is at hand.
"""

import argparse
import datetime
import importlib
import json
import sys
from dataclasses import asdict

import torch

from benchmarks.duel import RESULTS
from benchmarks.gpu.clock import Row

PIECES = {
    "loss": "the fused loss against its four matrix products and whole logits",
    "step": "an 8B-shaped teacher and a 4B-shaped student, with loss and heads and without",
    "train": "minitron distill against a hand-written loop in plain PyTorch",
    "score": "minitron score against the plain forward pass",
    "teacher": "a teacher in fp8, in int8 and in the machine's memory against bf16",
    "te": "trainings by engine: plain, mixed, FSDP2, compiled, Transformer Engine",
    "profile": "what a training step spends its time on",
}


def line(row: Row) -> str:
    """A row as text."""
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    gib = "" if row.gib is None else f"{row.gib:.2f}"
    return f"{row.what:<44} {row.milliseconds:>10.1f} {ratio:>7} {gib:>7}  {row.note}".rstrip()


def table(rows: list[Row]) -> str:
    """The rows as text."""
    return "\n".join([f"{'':<44} {'ms':>10} {'ratio':>7} {'GiB':>7}", *map(line, rows)])


def main() -> int:
    """Runs the pieces that are named; all of them where none is."""
    listed = "\n".join(f"  {name:<8} {what}" for name, what in PIECES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pieces", nargs="*", metavar="PIECE", choices=[*PIECES, []])
    parser.add_argument("--try", dest="tiny", action="store_true")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here; --try runs it on the CPU", file=sys.stderr)
        return 2
    card = "cpu" if arguments.tiny else torch.cuda.get_device_name()
    date = datetime.date.today().isoformat()
    tables = []
    for piece in arguments.pieces or PIECES:
        rows: list[Row] = []
        for row in importlib.import_module(f"benchmarks.gpu.{piece}").rows(arguments.tiny):
            rows.append(row)  # written one by one: what has been measured is not lost
            print(line(row), flush=True)
            if not arguments.tiny:
                found: dict[str, object] = {"card": card, "date": date, "torch": torch.__version__}
                RESULTS.mkdir(exist_ok=True)
                path = RESULTS / f"gpu-{piece}-{card.replace(' ', '-')}.json"
                found |= {"rows": [asdict(each) for each in rows]}
                path.write_text(json.dumps(found, indent=2) + "\n")
        tables.append(f"{piece}: {PIECES[piece]} ({card})\n{table(rows)}")
    print("", *tables, sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
