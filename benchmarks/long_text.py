"""A text as one file and as ten thousand: time and peak memory of reading it all, and of scoring a little of it.

The text is Python's standard library, repeated up to a size. ``python -m benchmarks.long_text [MEGABYTES]``
"""

import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from benchmarks.duel import RESULTS
from nemo_minitron.cli.tables import print_table
from nemo_minitron.data.tokenizer import train_tokenizer
from nemo_minitron.workspace.manifest import write_json
from tests.support.models import make_model

FILES = 10_000
READ = """
import sys
from pathlib import Path
from nemo_minitron.data.documents import documents, find_text
from nemo_minitron.data.tokenisation import tokenised
from nemo_minitron.data.windows import windows
from nemo_minitron.models.causal_lm import load_tokenizer
texts = find_text([sys.argv[2]], [], "auto", "text", "data.train", "train", 0.05)
stream = tokenised(documents(texts), load_tokenizer(Path(sys.argv[1])), "data.train")
print(sum(1 for _ in windows(stream, 1024)), "windows")
"""
SCORE = """
from nemo_minitron.cli.main import main
assert main() == 0
"""
PEAK = """
import os, re
used = os.times()
with open("/proc/self/status") as status:  # of this program alone; getrusage inherits the parent's
    print(used.user + used.system, re.search(r"VmHWM:\\s+(\\d+)", status.read())[1])
"""


def write_texts(folder: Path, megabytes: int) -> tuple[Path, Path]:
    """Writes the text as one file, and as ``FILES`` files."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    sources = "\n".join(
        path.read_text("utf-8", "ignore")
        for path in sorted(stdlib.rglob("*.py"))
        if "site-packages" not in path.parts
    ).replace("\0", "")
    size = megabytes * 10**6
    text = (sources * (size // len(sources) + 1))[:size]
    (folder / "one.txt").write_text(text)
    (folder / "many").mkdir()
    each = len(text) // FILES
    for number in range(FILES):
        (folder / "many" / f"{number:05}.txt").write_text(text[number * each : (number + 1) * each])
    return folder / "one.txt", folder / "many"


def measured(code: str, words: list[str]) -> dict[str, float]:
    """Wall time, processor time and peak memory of a Python process of its own."""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code + PEAK, *words], stdout=subprocess.PIPE, text=True, check=True
    )
    seconds, peak = map(float, done.stdout.split()[-2:])
    return {
        "seconds": time.monotonic() - begun,
        "cpu_seconds": seconds,
        "peak_mib": peak / 1024,
    }


def main(megabytes: int) -> None:
    """Measures, prints and writes benchmarks/results/long-text.json."""
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = write_texts(folder, megabytes)
        model = make_model(folder / "model", "llama", vocab_size=4096)
        sample = [texts[0].read_text()[start : start + 10**5] for start in range(0, 10**7, 10**6)]
        train_tokenizer(sample, 4096, model)
        for path in texts:
            rows[f"read all, {path.stem}"] = measured(READ, [str(model), str(path)])
            rows[f"score 16 samples, {path.stem}"] = measured(SCORE, [
                "score", f"source.model={model}", f"workspace={folder / path.stem}-run",
                f"data.calibration.paths=[{path}]", "data.calibration.samples=16",
            ])  # fmt: skip
    shown = [(name, *(f"{value:,.1f}" for value in row.values())) for name, row in rows.items()]
    print_table((f"{megabytes} MB of text", "seconds", "CPU seconds", "peak MiB"), shown)
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "long-text.json", {"megabytes": megabytes, "files": FILES, "rows": rows})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
