"""Odd command lines get one line, or what they ask for; ``make fuzz`` tries thousands."""

import re
from collections import Counter

from nemo_minitron.cli.main import main
from tests.support.fuzz_command_line import cases
from tests.support.fuzz_workspace import PYTHON
from tests.support.fuzzing import SEED, some, tally


def test_odd_command_lines_end_with_one_line(capsys, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    outcomes: Counter[str] = Counter()
    for words in some(cases(SEED), 120):
        try:
            code = main(words)
        except SystemExit as usage:  # argparse's own: options that are none, --help
            code = int(usage.code or 0)
        said = capsys.readouterr().err
        assert code in (0, 2), (words, said)
        lines = [line for line in said.splitlines() if re.match(r"minitron( [\w-]+)?: ", line)]
        assert (len(lines) == 1) == (code == 2), (words, said)
        assert not PYTHON.search(said) and "\x1b" not in said, (words, said)
        outcomes["refused" if code else "done"] += 1
    assert list((tmp_path / "here").iterdir()) == []
    assert set(outcomes) == {"refused", "done"}
    tally("command lines", outcomes)
