"""Which entries of a vocabulary stay: those that a text uses most, and all that any text needs.

An entry that a tokenizer builds of others stays only with these, so that wherever the tokenizer used kept
entries alone, it makes the same of a text as before.
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.pruning.cost import round_up

KEYS = ("plan.vocab", "plan.vocab_coverage")


@dataclass(frozen=True)
class Construction:
    """How a tokenizer makes its entries.

    Attributes:
        needed: ids without which a text could not be written, or would be read otherwise.
        parts: id to the ids of the two entries that it is merged from; absent: from none.
        tokens: all ids that stand for something; the others only pad the embedding.
    """

    needed: Set[int]
    parts: Mapping[int, tuple[int, int]]
    tokens: Set[int]

    def with_parts(self, entry: int, kept: Set[int]) -> set[int]:
        """An entry and all it is made of, without those in ``kept``."""
        found, open_ = set[int](), [entry]
        while open_:
            one = open_.pop()
            if one not in found and one not in kept:
                found.add(one)
                open_ += self.parts.get(one, ())
        return found


@dataclass(frozen=True)
class Vocabulary:
    """A choice of entries, and how it was made.

    Attributes:
        entries: how many stay.
        needed: how many of them any text needs.
        counted: tokens of the calibration text.
        covered: share of them that are entries that stay.
        asked: the key that asked for it, and its value.
    """

    entries: int
    needed: int
    counted: int
    covered: float
    asked: str

    def note(self) -> str:
        """The choice in a sentence."""
        return (
            f"the vocabulary keeps {self.entries:,} entries ({self.asked}), {self.needed:,} of which any "
            f"text needs; they cover {self.covered:.4%} of the calibration text's {self.counted:,} tokens; "
            "each removed token is written with several"
        )


def choose(
    counts_V: Tensor, construction: Construction, size: int | None, coverage: float | None
) -> tuple[Tensor, Vocabulary]:
    """Takes entries by their counts, on a tie the lower id, each with all that it is made of.

    Args:
        counts_V: how often the text uses each entry, Tensor of shape [vocabulary], int64.
        construction: the tokenizer's.
        size: how many entries to keep; rounded up as ``round_up`` says.
        coverage: instead, the share of the text's tokens that kept entries must make.

    Returns:
        The kept ids, ascending, int64, and what they are.

    Raises:
        ValueError: both or none is given, or more entries are needed than are asked for.
    """
    if (size is None) == (coverage is None):
        raise ValueError(f"{' and '.join(KEYS)}: give one of them, not both")
    rows, total = len(counts_V), int(counts_V.sum())
    counts = counts_V.tolist()
    kept = set[int]()
    for entry in construction.needed:
        kept |= construction.with_parts(entry, kept)
    needed = len(kept)
    order = _order(counts, construction.tokens)
    if size is None:
        assert coverage is not None
        _cover(kept, order, counts, construction, coverage * total)
        size = len(kept)
    wanted = round_up("vocab", size, rows)
    if needed > wanted:
        raise ValueError(
            f"plan.vocab: expected at least {needed:,}, which any text needs (bytes, special and added "
            f"tokens, what the chat template writes, and their parts), found {size:,}"
        )
    _fill(kept, order, construction, wanted)
    assert len(kept) == wanted, "an entry whose parts are all kept always fits"
    asked = f"{KEYS[0]}={size}" if coverage is None else f"{KEYS[1]}={coverage:g}"
    covered = sum(counts[entry] for entry in kept) / max(1, total)
    ids = torch.tensor(sorted(kept), dtype=torch.int64)
    return ids, Vocabulary(wanted, needed, total, round(covered, 6), asked)


def _order(counts: list[int], tokens: Set[int]) -> list[int]:
    """Entries from the most to the least used; those that stand for nothing last."""
    return sorted(range(len(counts)), key=lambda i: (i not in tokens, -counts[i], i))


def _cover(
    kept: set[int],
    order: Iterable[int],
    counts: list[int],
    construction: Construction,
    wanted: float,
) -> None:
    """Adds entries until those that are kept make so many tokens."""
    reached = sum(counts[entry] for entry in kept)
    for entry in order:
        if reached >= wanted:
            return
        more = construction.with_parts(entry, kept)
        reached += sum(counts[part] for part in more)
        kept |= more


def _fill(kept: set[int], order: list[int], construction: Construction, wanted: int) -> None:
    """Adds entries up to a number; what does not fit with its parts is passed over."""
    while len(kept) < wanted:
        for entry in order:
            more = construction.with_parts(entry, kept)
            if len(kept) + len(more) <= wanted:
                kept |= more
            if len(kept) == wanted:
                return
