"""The shape of the house.

Imports go down only, nothing foreign is loaded, and an installed wheel stands on its own.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nemo_minitron
from tests.support.contracts import broken_contracts, contracts, copied, listed

ROOT = Path(__file__).parent.parent
SOURCES = [
    path for folder in ("nemo_minitron", "flows") for path in sorted((ROOT / folder).rglob("*.py"))
]


def tool(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **options)


CONTRACTS = contracts()
# by contract, one import that it refuses and no other does: the module, and what it would import
REFUSED = {
    "layers": ("pruning/cost.py", "nemo_minitron.evaluation.report"),
    "pure": ("workspace/manifest.py", "transformers"),
    "prefect": ("launch/failures.py", "prefect"),
    "nemo": ("data/documents.py", "lightning"),
    "nothing-trained": ("evaluation/speed.py", "nemo_minitron.training.sampler"),
    "subjects": ("release/hub_upload.py", "nemo_minitron.config.compose"),
    "values": ("config/plan_config.py", "nemo_minitron.families"),
    "stages": ("stages/distill.py", "nemo_minitron.stages.logits"),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return copied(tmp_path_factory.mktemp("contracts"))


def test_import_contracts_hold(copy):
    broken, printed = broken_contracts(copy)
    assert not broken, printed
    assert f"{len(CONTRACTS)} kept, 0 broken" in printed


@pytest.mark.parametrize("contract", CONTRACTS)
def test_each_contract_refuses_what_it_is_there_for(contract, copy):
    broken, printed = broken_contracts(copy, *REFUSED[contract])
    assert broken == [CONTRACTS[contract]], printed


def test_the_contracts_see_the_flows_under_the_name_they_are_imported_by(copy):
    broken, printed = broken_contracts(copy, "pruning/cost.py", "nemo_minitron.flows.tasks")
    assert {CONTRACTS["layers"], CONTRACTS["pure"], CONTRACTS["subjects"]} <= set(broken), printed


def test_every_package_stands_in_the_contracts():
    present = {
        f"nemo_minitron.{path.parent.name}"
        for path in (ROOT / "nemo_minitron").glob("*/__init__.py")
    }
    assert listed("layers") == present | {"nemo_minitron.flows"}
    assert listed("prefect") == present
    assert listed("nemo") == present - {"nemo_minitron.plugin", "nemo_minitron.training"} | {
        "nemo_minitron.flows"
    }
    upper = {f"nemo_minitron.{name}" for name in ("cli", "launch", "stages", "config")}
    assert listed("subjects") == present - upper
    sections = {
        f"nemo_minitron.config.{path.stem}"
        for path in (ROOT / "nemo_minitron/config").glob("[!_]*.py")
    }
    assert listed("values") == sections - {
        f"nemo_minitron.config.{name}" for name in ("compose", "reference", "value_types", "words")
    }
    from nemo_minitron.stages.run import STAGES

    assert listed("stages") == set(STAGES.values())


def test_no_two_modules_have_one_name():
    names = [path.name for path in SOURCES if not path.name.startswith("__")]
    assert sorted(names) == sorted(set(names))


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
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def calls():
    """Every call in the product: its file, what is called, and the call itself."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path.relative_to(ROOT).as_posix(), ast.unparse(node.func), node


def test_every_letter_of_a_tensors_name_stands_in_the_legend():
    legend = re.findall(
        r"(?:^|; |, | and )([A-Z1]) ", nemo_minitron.__doc__.split(":\n", 1)[1], re.M
    )
    used = {
        letter
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name | ast.arg | ast.Attribute)
        for found in [
            re.fullmatch(
                r"[a-z]\w*_([A-Z1]+)",
                getattr(node, "id", getattr(node, "arg", getattr(node, "attr", ""))),
            )
        ]
        if found
        for letter in found[1]
    }
    assert used == set(legend)


def test_no_family_is_special():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                assert "model_type ==" not in ast.unparse(node), path


LAYOUT = "nemo_minitron/workspace/layout.py"
ENDINGS = {".lock", ".json", ".log", ".nemo", "step="}
"""Pieces of names that other files have, too."""


def texts(node):
    """The constant texts in an expression, of an f-string each piece; docstrings are none."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def layout_names():
    """The names of a workspace's folders and files, and the endings of those that stages have, by the layout."""
    tree = ast.parse((ROOT / LAYOUT).read_text())
    values = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    joined = [node.right for node in ast.walk(tree) if isinstance(node, ast.BinOp)]
    return {text for node in [*values, *joined] for text in texts(node) if len(text) > 1}


def spelled(text, names):
    """Names of the layout that a module spells: any behind a slash, those of files and hidden ones anywhere."""
    tree = ast.parse(text)
    pieces = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            yield from (part for part in texts(node.right) if part in names - ENDINGS)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            others = ENDINGS if id(node) in pieces else ENDINGS - {".lock"}
            yield from (part for part in [node.value] if part in names - others)


def test_only_the_layout_spells_a_path_of_a_workspace():
    names = layout_names()
    assert {
        "teacher",
        "student",
        "source.json",
        ".lock",
        "variants",
        ".outcome.json",
        "plots",
        ".nemo",
    } <= names
    found = {}
    for path in SOURCES:
        file = path.relative_to(ROOT).as_posix()
        if file != LAYOUT and (own := sorted(set(spelled(path.read_text(), names)))):
            found[file] = own
    assert found == {}, "take the path from Workspace, or name it there"


@pytest.mark.parametrize(
    "line",
    ['workspace / "teacher"', 'Path(place) / "plan" / name', 'FILE = ".lock"', 'papers / f"{name}.outcome.json"',
     'open(f"{workspace}/" + "pareto.png")', 'root / f"state-{recipe}"'],
)  # fmt: skip
def test_a_path_that_is_spelled_is_seen(line):
    assert list(spelled(line, layout_names()))


def test_what_only_sounds_like_a_path_is_not():
    for line in (
        'kind = "teacher"',
        "total / 2",
        '"""Lies in manifest.json."""',
        'name == "plan"',
        'folder / "config.json"',
    ):
        assert list(spelled(line, layout_names())) == []


SINKS = re.compile(
    r"exec|eval|compile|__import__|(importlib\.)?import_module|importlib\.util\.(module_from|spec_from)\w+|"
    r"runpy\.\w+|.*\.(exec_module|load_module)|os\.(system|popen|exec\w*|spawn\w*|posix_spawn\w*)|"
    r"subprocess\.\w+|Popen|.*\.create_subprocess_\w+|(pickle|dill|marshal|shelve|cloudpickle|joblib)\.(?!\w+Error)\w+|"
    r".*Unpickler|torch\.(load|jit\.load|hub\.\w+)|(np|numpy)\.load|yaml\.(?!safe_)\w*load\w*|.*\.from_string|"
    r"(jinja2\.)?\w*Environment|Template|(hydra\.utils\.)?(instantiate|get_class|get_method|get_object)|"
    r".*\.(extract|extractall|unpack_archive)|.*simple_evaluate|TaskManager|.*entry_points"
)
"""Calls that can run text, unpickle, start programs, import by name, render templates or unpack archives."""
ADMITTED = {
    (
        "flows/embedded_server.py",
        "subprocess.Popen",
    ): "Prefect's server, for as long as the run lasts",
    ("nemo_minitron/__init__.py", "importlib.import_module"): "public names, listed there",
    ("nemo_minitron/config/words.py", "yaml.load"): "BaseLoader makes texts only",
    ("nemo_minitron/families/table.py", "yaml.load"): "the SafeLoader of libyaml",
    (
        "nemo_minitron/launch/start_up.py",
        "own['__loader__'].exec_module",
    ): "scipy.signal, where Python found it",
    (
        "nemo_minitron/data/chat_template_process.py",
        "subprocess.Popen",
    ): "the templates' own process",
    (
        "nemo_minitron/evaluation/lm_eval.py",
        "TaskManager",
    ): "tasks of evaluate.task_dir, which the user names",
    (
        "nemo_minitron/evaluation/lm_eval.py",
        "library().simple_evaluate",
    ): "runs them; !function is Python by design",
    (
        "nemo_minitron/evaluation/speed.py",
        "subprocess.run",
    ): "this package's module, arguments as JSON",
    (
        "nemo_minitron/evaluation/task_files.py",
        "yaml.load",
    ): "with a subclass of SafeLoader that makes texts only",
    (
        "nemo_minitron/launch/process_group.py",
        "subprocess.Popen",
    ): "a stage; and /bin/sh with a constant and numbers",
    ("nemo_minitron/launch/slurm.py", "subprocess.run"): "Slurm's programs, job numbers checked",
    (
        "nemo_minitron/launch/slurm.py",
        "ImmutableSandboxedEnvironment",
    ): "this package's own template; words of the command are quoted in it",
    ("nemo_minitron/launch/slurm.py", "environment.from_string"): "the same",
    (
        "nemo_minitron/training/checkpoint_safety.py",
        "_DataUnpickler",
    ): "knows descriptions of tensors only",
    ("nemo_minitron/stages/run.py", "importlib.import_module"): "by a name of the table above it",
    ("nemo_minitron/release/quickstart.py", "subprocess.run"): "a constant; folders as arguments",
    (
        "nemo_minitron/evaluation/report_page.py",
        "ImmutableSandboxedEnvironment",
    ): "this package's own template",
    ("nemo_minitron/evaluation/report_page.py", "environment.from_string"): "the same",
    (
        "nemo_minitron/release/model_card.py",
        "ImmutableSandboxedEnvironment",
    ): "this package's own template; what comes from files is escaped in it",
    ("nemo_minitron/release/model_card.py", "environment.from_string"): "the same",
}
"""What remains of them, and why it is safe; docs/security.md says what is trusted."""


def test_what_could_run_something_is_known_by_name():
    found = {(file, called) for file, called, _ in calls() if SINKS.fullmatch(called)}
    assert found - set(ADMITTED) == set(), (
        "a new way to run something: make it safe, then name it here"
    )
    assert set(ADMITTED) - found == set(), "it is gone: remove it here"
    for file, called, node in calls():
        assert not any(k.arg == "shell" for k in node.keywords), (file, called)
        if called.startswith("subprocess."):  # what a program asks, nobody answers
            assert any(k.arg in ("stdin", "input") for k in node.keywords), (file, called)


def test_no_code_that_comes_with_a_model_is_loaded():
    loads = 0
    for file, called, node in calls():
        if re.search(r"\.(from_pretrained|from_config)$", called):
            values = [k.value for k in node.keywords if k.arg == "trust_remote_code"]
            assert [ast.unparse(value) for value in values] == ["False"], (file, called)
            loads += 1
        else:
            assert not any(k.arg == "trust_remote_code" for k in node.keywords), (file, called)
    assert loads >= 6


def test_a_flow_that_waits_for_its_stages_processes_holds_no_torch():
    """Which takes 200 MB and a second or two."""
    code = "import sys, nemo_minitron.flows.compress; sys.exit('torch' in sys.modules)"
    done = tool(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


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


def test_an_installed_wheel_has_every_file(installed):
    places = {"nemo_minitron": "", "flows": "flows", "configs": "configs"}
    expected = {
        str(Path(place) / path.relative_to(ROOT / folder))
        for folder, place in places.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    package = installed / "nemo_minitron"
    held = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    assert held == expected, sorted(held ^ expected)


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
from nemo_minitron.cli.main import main
assert main(["families"]) == 0
assert main(["run", "--config-name", "demo", "--cfg"]) == 0
assert main(["run", "recipe=llama3.1_4b_width", "--cfg"]) == 0
import nemo_minitron.flows.compress as flow
assert flow.__file__.startswith({str(installed)!r})
from nemo_minitron.evaluation import report_page
from nemo_minitron.launch import slurm
from nemo_minitron.release import model_card
assert all(module._TEMPLATE.is_file() for module in (report_page, slurm, model_card))
from nemo_minitron.evaluation.lm_eval import check_tasks
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
    from nemo_minitron.config.reference import markdown

    assert (ROOT / "docs" / "configuration.md").read_text() == markdown(), "run make docs"


PAPERS = (ROOT / "docs" / "papers.md").read_text()
TAG = re.compile(r"\[P\d+\]")


def defined(source):
    """Names that a module defines: functions, classes, and methods behind their class's name."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (
                f"{node.name}.{part.name}"
                for part in node.body
                if isinstance(part, ast.FunctionDef)
            )


def test_every_function_that_the_papers_page_names_exists():
    rows = re.findall(r"^\|.*`nemo_minitron\..*\|$", PAPERS, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`nemo_minitron\.([\w.]+)`", row)]
    assert len(rows) >= 25
    for name in named:
        package, module, function = name.split(".", 2)
        folder = ROOT / package if package == "flows" else ROOT / "nemo_minitron" / package
        assert function in defined((folder / f"{module}.py").read_text()), name


def test_every_paper_cited_stands_on_the_papers_page():
    folders = [
        ROOT / name for name in ("nemo_minitron", "flows", "configs", "docs", "benchmarks", "tests")
    ]
    files = [
        file
        for folder in folders
        for file in folder.rglob("*")
        if file.suffix in (".py", ".md", ".yaml")
    ]
    text = {file: file.read_text() for file in files}
    tags = {tag for found in text.values() for tag in TAG.findall(found)}
    assert tags == {"[P1]", "[P2]"}
    titled = re.findall(
        r"^\| (.+?) \| .+ \| \[arXiv ([\d.]+)\]\(https://arxiv\.org/abs/\2\) \|$", PAPERS, re.M
    )
    assert tags <= {tag for tag, _ in titled}
    cited = {
        number for found in text.values() for number in re.findall(r"arXiv (\d{4}\.\d{5})", found)
    }
    assert cited == {number for _, number in titled}


def test_what_users_read_names_papers_by_their_number():
    shown = [*(ROOT / "configs").rglob("*.yaml"), ROOT / "docs" / "configuration.md"]
    assert [file for file in shown if TAG.search(file.read_text())] == []
