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


def broken_contracts(folder: Path, module: str = "", imported: str = "") -> tuple[list[str], str]:
    """Names of the contracts that are broken, and what import-linter printed.

    Args:
        folder: an empty folder for the copy.
        module: a file of the package that gets one import more; empty: none does.
        imported: what it imports.
    """
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "nemo_minitron", folder / "nemo_minitron", ignore=ignored)
    shutil.copytree(ROOT / "flows", folder / "nemo_minitron" / "flows", ignore=ignored)
    shutil.copy(ROOT / "setup.cfg", folder)
    if module:
        with (folder / "nemo_minitron" / module).open("a", encoding="utf-8") as file:
            file.write(f"\nimport {imported}\n")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", "setup.cfg", "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "300", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    printed = done.stdout + done.stderr
    broken = re.findall(r"^(.+) BROKEN\b", printed, re.MULTILINE)
    assert (done.returncode == 0) == (not broken) and "kept" in printed, printed
    return broken, printed
