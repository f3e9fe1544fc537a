"""Seeded command lines with odd words: keys that are none, values that cannot be, options twice, no words at all."""

import itertools
import random
from collections.abc import Iterator

from nemo_minitron.config.bounds import HANDED_ON
from nemo_minitron.config.config import Config
from nemo_minitron.config.option import describe
from nemo_minitron.stages.run import STAGES

VALUES = (
    "", " ", "null", "0", "-1", "1", "1e400", "nan", "true", "[]", "[", "]", "{}", "{", "[1,2]", "[[]]", "'", '"', "\\",
    "a=b", "a,b", "${x}", "${oc.env:NOPE}", "${stdlib:}", "???", "模型", "\x1b[31m", "[bold]x[/]", "../..", "~", "/", "*",
    "x" * 5000, "!!python/object:os.system", "@file", "#", "%", "1_000", "0x10", "-", "--", "é" * 300, "1:2:3", "hf://x",
)  # fmt: skip
"""What a key gets. None is a folder or a model."""
_PREFIXES = ("", "", "", "", "+", "++", "~")
_OTHERS = (
    "--cfg",
    "--keys",
    "--json",
    "--config-name",
    "--config-dir",
    "-h",
    "--nope",
    "x",
    "",
    "=",
    "+",
    "~",
)
_PLAIN = ("size", "families", "verify", "report", "runs", "clean", "nope", "")


def cases(seed: int) -> Iterator[list[str]]:
    """Endless command lines that at most compose a configuration, or look at folders that are not there."""
    keys = (
        [name for name, _, _ in describe(Config)]
        + list(HANDED_ON)
        + ["trainer", "plan", "nope", "a.b"]
    )
    for number in itertools.count():
        draw = random.Random(f"{seed}-{number}")
        if draw.random() < 0.25:
            yield [
                draw.choice(_PLAIN),
                *draw.choices((*VALUES, *_OTHERS, "layers=3"), k=draw.randint(0, 3)),
            ]
            continue
        words = [
            f"{draw.choice(_PREFIXES)}{draw.choice(keys)}={draw.choice(VALUES)}"
            for _ in range(draw.randint(0, 3))
        ]
        if draw.random() < 0.2:
            words.insert(draw.randint(0, len(words)), draw.choice((*_OTHERS, *VALUES)))
        yield [draw.choice(("run", *STAGES)), "--cfg", *words]
