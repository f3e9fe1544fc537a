"""The shape of the house.

Imports go down only, nothing foreign is loaded, and an installed wheel stands on its own.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("nemo_minitron", "flows") for path in sorted((ROOT / folder).rglob("*.py"))]


def tool(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **options)


def test_import_contracts_hold():
    lint = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    done = tool(lint, "--config", "setup.cfg", "--no-cache")
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_style_and_types():
    for command in (
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy", "--config-file", "setup.cfg"],
    ):
        done = tool(sys.executable, "-m", *command)
        assert done.returncode == 0, done.stdout + done.stderr


def test_modules_and_functions_stay_small():
    for path in SOURCES:
        text = path.read_text()
        assert text.count("\n") <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 52, f"{path}: {node.name}"


def test_no_family_is_special_and_nothing_is_unpickled_from_outside():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                assert "model_type ==" not in ast.unparse(node), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("pickle.load", "pickle.loads", "torch.load", "eval", "exec"), (
                    path,
                    called,
                )
                assert not any(k.arg == "trust_remote_code" for k in node.keywords), path


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked into a folder of its own; dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(
            ".git",
            ".venv",
            ".oldest",
            ".consumers",
            ".prefect",
            ".*cache",
            "runs",
            "build",
            "*.egg-info",
            "__pycache__",
        ),
    )
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder),
        str(source)], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    shutil.unpack_archive(wheel, target, "zip")
    return target


def test_an_installed_wheel_finds_its_tables_configurations_and_flows(installed, tmp_path):
    names = {path.name for path in installed.iterdir()}
    assert "flows" not in names
    assert "configs" not in names
    code = f"""
import sys
sys.path.insert(0, {str(installed)!r})
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import nemo_minitron
assert nemo_minitron.__file__.startswith({str(installed)!r}), nemo_minitron.__file__
from nemo_minitron.cli import main
assert main(["families"]) == 0
assert main(["run", "--config-name", "demo", "--cfg"]) == 0
assert main(["run", "recipe=llama3.1_4b_width", "--cfg"]) == 0
import nemo_minitron.flows.compress as flow
assert flow.__file__.startswith({str(installed)!r})
from nemo_minitron.stages.report import _TEMPLATE
assert _TEMPLATE.is_file()
from nemo_minitron.bridge.lm_eval import check_tasks
check_tasks(["xlsum_en"], None)
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


def test_the_configuration_page_is_current():
    from nemo_minitron.stages.config_page import markdown

    assert (ROOT / "docs" / "configuration.md").read_text() == markdown(), "run make docs"
