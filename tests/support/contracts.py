"""The import contracts of setup.cfg, looked at on a copy where flows/ lies inside of the package.

It is imported as ``nemo_minitron.flows``, and the contracts must see it under that name.
"""

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SECTION = "importlinter:contract:"


def _config() -> configparser.ConfigParser:
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    return config


def contracts() -> dict[str, str]:
    """Each contract's key in setup.cfg and its name."""
    config = _config()
    found = [section for section in config.sections() if section.startswith(_SECTION)]
    return {section.removeprefix(_SECTION): config[section]["name"] for section in found}


def listed(contract: str) -> set[str]:
    """The modules that a contract is about."""
    section = _config()[f"{_SECTION}{contract}"]
    found = next(section[key] for key in ("layers", "source_modules", "modules") if key in section)
    return set(re.findall(r"[\w.]+", found))


def copied(folder: Path) -> Path:
    """A copy of the package, with flows/ inside of it, into an empty folder."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "nemo_minitron", folder / "nemo_minitron", ignore=ignored)
    shutil.copytree(ROOT / "flows", folder / "nemo_minitron" / "flows", ignore=ignored)
    shutil.copy(ROOT / "setup.cfg", folder)
    return folder


def broken_contracts(copy: Path, module: str = "", imported: str = "") -> tuple[list[str], str]:
    """Names of the contracts that are broken, and what import-linter printed.

    Args:
        copy: of the package; import-linter keeps there what modules import as long as they are the same.
        module: a file of the package that gets one import more meanwhile; empty: none does.
        imported: what it imports.
    """
    file = copy / "nemo_minitron" / module
    before = file.read_text(encoding="utf-8") if module else ""
    if module:
        file.write_text(f"{before}\nimport {imported}\n", encoding="utf-8")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", "setup.cfg", "--cache-dir", str(copy / "cache")],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "300", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if module:
        file.write_text(before, encoding="utf-8")
    printed = done.stdout + done.stderr
    broken = re.findall(r"^(.+) BROKEN\b", printed, re.MULTILINE)
    assert (done.returncode == 0) == (not broken) and "kept" in printed, printed
    return broken, printed
