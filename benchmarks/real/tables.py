"""Tables of what was measured, for the screen, README.md and docs/."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.real.tools import Profile, result_of
from nemo_minitron.evaluation.report import markdown

ROOT = Path(__file__).parents[2]
_KINDS = {
    "prose": "English prose",
    "code": "Python source",
    "german": "German (messages of programs)",
}
_CUT = ("gemma", "smollm2-100m", "smollm2-70m")
_VOCABULARIES = ("smollm2-vocab", "gemma-vocab")
_CHEAPEST = 24
"""Rows of the table of cuts."""


def found(profile: Profile, piece: str) -> dict[str, Any] | None:
    """What was measured in a piece; None: nothing yet."""
    path = result_of(profile, piece)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _when(told: dict[str, Any]) -> str:
    return f"{told['machine']}, {told['cores']} cores, {told['date']}"


def _millions(count: float) -> str:
    return f"{count / 1e6:.1f} M"


def cut_table(profile: Profile) -> str:
    """One line for each model that was cut in width and depth, and one for each vocabulary."""
    titles = ("model", "parameters", "steps x tokens", "bits per byte: whole", "pruned", "distilled",
              "right of 4: whole", "pruned", "distilled")  # fmt: skip
    rows, when = [], {}
    for piece in _CUT:
        if (told := found(profile, piece)) is None:
            continue
        before, pruned, after = (told["models"][name] for name in ("teacher", "pruned", "student"))
        when[_when(told)] = None
        rows.append((
            f"{told['model']}, {' '.join(told['plan'])}",
            f"{_millions(before['parameters'])} to {_millions(after['parameters'])}",
            f"{told['steps']} x {told['tokens'] // told['steps']}",
            *(f"{each['bits_per_byte']:.3f}" for each in (before, pruned, after)),
            *(f"{each['choice']:.2f} ± {each['choice_stderr']:.2f}" for each in (before, pruned, after)),
        ))  # fmt: skip
    for piece in _VOCABULARIES:
        if (told := found(profile, piece)) is None:
            continue
        when[_when(told)] = None
        count = told["parameters"]
        prose = told["texts"]["prose"]
        rows.append((
            f"{told['model']}, vocab={told['entries'][1]}",
            f"{_millions(count['teacher'])} to {_millions(count['student'])}",
            f"{told['steps']} x {told['tokens'] // told['steps']}",
            *(f"{prose[name]['bits_per_byte']:.3f}" for name in ("teacher", "pruned", "student")),
            "–", "–", "–",
        ))  # fmt: skip
    return f"{markdown(titles, tuple(rows))}\n\nHeld-out English prose, and which of four continuations is the right one; {'; '.join(when)}."


def vocabulary_table(told: dict[str, Any]) -> str:
    """Bits and tokens per byte of each kind of text; sizes and speed."""
    titles = (
        "held-out text",
        "bits per byte: whole",
        "cut",
        "distilled",
        "tokens per byte: whole",
        "cut",
    )
    rows = []
    for kind, row in told["texts"].items():
        rows.append((
            _KINDS[kind],
            *(f"{row[name]['bits_per_byte']:.3f}" for name in ("teacher", "pruned", "student")),
            *(f"{row[name]['tokens_per_byte']:.3f}" for name in ("teacher", "student")),
        ))  # fmt: skip
    count, size, speed = told["parameters"], told["bfloat16_bytes"], told["decode"]
    before, after = speed["teacher"], speed["student"]
    tokens = after["tokens_per_second"] / before["tokens_per_second"]
    characters = after["characters_per_second"] / before["characters_per_second"]
    return (
        f"{markdown(titles, tuple(rows))}\n\n"
        f"{told['model']}: {told['entries'][0]:,} to {told['entries'][1]:,} entries, "
        f"{_millions(count['teacher'])} to {_millions(count['student'])} parameters, "
        f"{size['teacher'] / 1e6:.0f} to {size['student'] / 1e6:.0f} MB in bfloat16; {told['steps']} steps of "
        f"{told['tokens'] // told['steps']} tokens. Greedy decoding, one sequence, bfloat16: "
        f"{before['tokens_per_second']:.1f} to {after['tokens_per_second']:.1f} tokens a second ({tokens:.2f} x), "
        f"{characters:.2f} x as many characters of prose ({_when(told)})."
    )


def sensitivity_table(told: dict[str, Any]) -> str:
    """What one axis costs, the cheapest first."""
    titles = ("cut", "kept", "parameters saved", "held-out loss", "nats per 1 % saved")
    rows = [
        (f"{cut['axis']}={cut['size']}", f"{cut['share']:.0%}", f"{cut['saved']:.1%}", f"{cut['loss']:.3f}",
         f"{cut['price']:+.3f}")
        for cut in told["cuts"][:_CHEAPEST]
    ]  # fmt: skip
    return (
        f"{told['model']}, held-out loss of the whole model {told['loss']:.3f} ({_when(told)}):\n\n"
        f"{markdown(titles, tuple(rows))}"
    )


def screen_table(told: dict[str, Any]) -> str:
    """The best and the worst sizes of one number of parameters."""
    screened = told["screened"]
    rows = [
        (" ".join(f"{axis}={size}" for axis, size in one["sizes"].items()), _millions(one["parameters"]),
         f"{one['loss']:.3f}", f"{one['choice']:.2f}")
        for one in [*screened[:5], *screened[-2:]]
    ]  # fmt: skip
    return (
        f"{len(screened)} of {told['within']:,} sizes of about 70 % of {told['model']}'s parameters "
        f"({told['possible']:,} possible), measured as they are cut; the five best and the two worst "
        f"({_when(told)}):\n\n"
        f"{markdown(('sizes', 'parameters', 'held-out loss', 'right continuation of 4'), tuple(rows))}"
    )


_SHOWN = {"sensitivity": sensitivity_table, "screen": screen_table}


def show(profile: Profile, piece: str) -> str:
    """A piece's table."""
    told = found(profile, piece)
    assert told is not None
    if piece in _VOCABULARIES:
        return vocabulary_table(told)
    return _SHOWN[piece](told) if piece in _SHOWN else cut_table(profile)


def tables(profile: Profile) -> Iterator[tuple[Path, str, str]]:
    """File, mark and text of every table of what was measured."""
    if any(found(profile, piece) for piece in (*_CUT, *_VOCABULARIES)):
        yield ROOT / "README.md", "real", cut_table(profile)
    for piece in _VOCABULARIES:
        if told := found(profile, piece):
            yield ROOT / "docs/vocabulary.md", piece, vocabulary_table(told)
    for piece, table in _SHOWN.items():
        if told := found(profile, piece):
            yield ROOT / "docs/search.md", piece, table(told)


def write_tables(profile: Profile) -> None:
    """Replaces what stands between the marks in README.md, docs/vocabulary.md and docs/search.md."""
    for path, mark, text in tables(profile):
        replace(path, mark, text)


def replace(path: Path, mark: str, text: str) -> None:
    """Puts a text between ``<!-- mark -->`` and ``<!-- /mark -->``.

    Raises:
        ValueError: the marks are not there.
    """
    old = path.read_text(encoding="utf-8")
    marked = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    new, count = marked.subn(lambda m: f"{m[1]}{text}\n{m[2]}", old)
    if not count:
        raise ValueError(
            f"{path}: expected the marks <!-- {mark} --> and <!-- /{mark} -->, found none"
        )
    path.write_text(new, encoding="utf-8")
