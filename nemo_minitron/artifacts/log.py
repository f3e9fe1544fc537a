"""metrics.jsonl: the log of a training, one JSON object per line."""

import json
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a training log, in order.

    None where there is no file, and a line cut off by a kill is left out.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]
