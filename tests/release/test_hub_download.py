"""Models by hub id, fetched by the real huggingface_hub from a server on loopback."""

import json
import os
import subprocess
import sys

import pytest
from safetensors import safe_open

from tests.support.hub import COMMIT, WRITER, serve
from tests.support.models import make_model
from tests.support.runs import minitron


@pytest.fixture
def hub(tmp_path):
    """A hub with one sharded model, and a pickle that must not be fetched."""
    import transformers

    folder = make_model(tmp_path / "made", "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "served", max_shard_size="10KB")
    (tmp_path / "served" / "pytorch_model.bin").write_bytes(b"a pickle")
    assert (tmp_path / "served" / "model.safetensors.index.json").is_file()
    lines = [json.dumps({"body": f"line {i} of a data set on the hub"}) for i in range(200)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    with serve({"org/tiny": tmp_path / "served"}, {"org/lines": tmp_path / "data"}) as served:
        yield served


def run(hub, tmp_path, *words, **more):
    place = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
    place |= {"HF_HUB_ETAG_TIMEOUT": "3", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITER}
    return minitron(*words, env={**place, **more})


PRUNE = ["prune", "source.model=org/tiny", "plan.ffn=20", "score.importance=magnitude"]


def refused(done, *texts, code=2):
    """Asserts one clear line, and no token in it."""
    assert done.returncode == code, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr and all(text in line for text in texts), done.stderr
    assert WRITER not in done.stderr + done.stdout


def test_offline_only_the_cache_counts(hub, tmp_path):
    words = [*PRUNE, f"workspace={tmp_path / 'ws'}"]
    absent = run(hub, tmp_path, *words, HF_HUB_OFFLINE="1")
    refused(absent, "'org/tiny' is not in the hub's cache, and HF_HUB_OFFLINE is set")
    assert run(hub, tmp_path, *words).returncode == 0
    hub.requests.clear()
    again = [*PRUNE, f"workspace={tmp_path / 'ws2'}"]
    done = run(hub, tmp_path, *again, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert hub.requests == []


def test_a_gated_model_says_what_to_do(hub, tmp_path):
    hub.gated.add("org/tiny")
    words = [*PRUNE, f"workspace={tmp_path / 'ws'}"]
    refused(run(hub, tmp_path, *words, HF_TOKEN="hf_strangerstranger"), "is gated", "HF_TOKEN")
    assert not (tmp_path / "ws").exists()
    assert run(hub, tmp_path, *words).returncode == 0


def test_a_model_larger_than_the_disk_is_not_begun(hub, tmp_path):
    names = {line.rpartition("/")[2] for line in map(str, (tmp_path / "served").iterdir())}
    hub.sizes = {name: 10**16 for name in names if name.endswith(".safetensors")}
    done = run(hub, tmp_path, *PRUNE, f"workspace={tmp_path / 'ws'}")
    refused(done, "'org/tiny' takes", "GB are free in", "HF_HOME")
    assert not any(line.startswith("GET") and ".safetensors" in line for line in hub.requests)


def test_a_connection_that_breaks_goes_on_where_it_broke(hub, tmp_path):
    hub.cut = 1
    done = run(hub, tmp_path, *PRUNE, f"workspace={tmp_path / 'ws'}")
    assert done.returncode == 0, done.stderr
    assert hub.cut == 0


def test_a_damaged_file_is_fetched_again(hub, tmp_path):
    assert run(hub, tmp_path, *PRUNE, f"workspace={tmp_path / 'ws'}").returncode == 0
    blob = next((tmp_path / "cache").rglob("*.safetensors")).resolve()
    whole, words = blob.read_bytes(), [*PRUNE, f"workspace={tmp_path / 'ws2'}"]
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), b"\xff" + whole[1:], whole[:-100]):
        blob.write_bytes(damaged)
        refused(run(hub, tmp_path, *words), "arrived damaged", code=1)
    assert run(hub, tmp_path, *words).returncode == 0
    assert blob.read_bytes() == whole


def test_a_workspace_stays_with_the_commit_that_it_began_with(hub, tmp_path):
    words, pruned = (
        [*PRUNE, f"workspace={tmp_path / 'ws'}"],
        tmp_path / "ws" / "pruned" / "manifest.json",
    )
    assert run(hub, tmp_path, *words).returncode == 0
    before = pruned.read_bytes()
    (tmp_path / "served" / "README.md").write_text("a card that was edited meanwhile")
    hub.commits.append("f" * 40)
    done = run(hub, tmp_path, *words)
    assert done.returncode == 0 and pruned.read_bytes() == before, done.stderr
    done = run(hub, tmp_path, *words, "source.revision=main")  # asked for
    source = json.loads((tmp_path / "ws" / "teacher" / "source.json").read_text())
    assert done.returncode == 0 and source["revision"] == "f" * 40
    assert run(hub, tmp_path, *PRUNE, f"workspace={tmp_path / 'other'}").returncode == 0
    source = json.loads((tmp_path / "other" / "teacher" / "source.json").read_text())
    assert source["revision"] == "f" * 40


def test_prune_by_hub_id(hub, tmp_path):
    words = ["prune", "source.model=org/tiny", "plan.ffn=20", "score.importance=magnitude"]
    done = run(hub, tmp_path, *words, f"workspace={tmp_path / 'ws'}")
    assert done.returncode == 0, done.stderr
    with safe_open(tmp_path / "ws" / "pruned" / "model.safetensors", "pt") as file:
        assert file.get_slice("model.layers.0.mlp.up_proj.weight").get_shape() == [20, 24]
    manifest = (tmp_path / "ws" / "teacher" / "manifest.json").read_text()
    assert json.loads(manifest)["config"] == {"revision": COMMIT}
    assert "secret" not in manifest + done.stderr + done.stdout
    assert not any("pytorch_model.bin" in line for line in hub.requests)
    # a second workspace takes the files from the cache
    hub.requests.clear()
    again = run(hub, tmp_path, *words, f"workspace={tmp_path / 'ws2'}")
    assert again.returncode == 0, again.stderr
    assert not any(line.startswith("GET") and "safetensors" in line for line in hub.requests)


def test_size_reads_the_config_alone(hub, tmp_path):
    done = run(hub, tmp_path, "size", "org/tiny", "--json")
    assert done.returncode == 0, done.stderr
    assert not any("safetensors" in line for line in hub.requests)
    absent = run(hub, tmp_path, "size", "org/absent")
    assert absent.returncode == 2 and "org/absent" in absent.stderr


def test_no_such_model_or_revision_is_the_users_mistake(hub, tmp_path):
    words = ["prune", "plan.ffn=20", "score.importance=magnitude", f"workspace={tmp_path / 'ws'}"]
    for given in (["source.model=org/absent"], ["source.model=org/tiny", "source.revision=v9"]):
        done = run(hub, tmp_path, *words, *given)
        assert done.returncode == 2, done.stderr
        assert given[0].removeprefix("source.model=") in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "ws").exists()


def test_a_hub_in_trouble_is_a_failure_not_a_mistake(hub, tmp_path):
    hub.failures = 100
    words = ["prune", "source.model=org/tiny", "plan.ffn=20", "score.importance=magnitude"]
    done = run(hub, tmp_path, *words, f"workspace={tmp_path / 'ws'}")
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    hub.failures = 0
    assert run(hub, tmp_path, *words, f"workspace={tmp_path / 'ws'}").returncode == 0


def test_a_data_set_by_hub_id(hub, tmp_path):
    code = (
        "from nemo_minitron.data.documents import documents, find_text\n"
        "texts = find_text(['hf://org/lines'], [], 'auto', 'body', 'data.calibration')\n"
        "print(texts.fingerprint)\n"
        "for text in documents(texts): print(text)\n"
    )
    place = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    environment = {**os.environ, **place, "HF_HOME": str(tmp_path / "cache")}

    def read(program):
        return subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
            check=False,
        )

    done = read(code)
    assert done.returncode == 0, done.stderr
    fingerprint, *lines = done.stdout.splitlines()
    assert len(fingerprint) == 64
    assert lines == [f"line {i} of a data set on the hub" for i in range(200)]
    absent = read(code.replace("org/lines", "org/none"))
    assert "ValueError: 'org/none': no such data set on the hub" in absent.stderr
    assert any(
        f"/resolve/{COMMIT}/" in line for line in hub.requests
    )  # what was fingerprinted is read
    unclear = read(code.replace("org/lines", "lines"))
    assert "expected hf://owner/name[@REV][/config][:split], found 'hf://lines'" in unclear.stderr
    hub.failures = 100
    assert "ConnectionError: 'org/lines': the hub cannot be reached" in read(code).stderr


LINES = [
    "data.calibration.paths=['hf://org/lines']", "data.calibration.text_key=body",
    "data.calibration.samples=8", "data.calibration.sequence_length=16", "score.device=cpu",
]  # fmt: skip
NEW = "f" * 40


def text_of(workspace):
    """How the scores' manifest names the text, and when they were made."""
    manifest = json.loads((workspace / "scores" / "manifest.json").read_text())
    (text,) = [item["path"] for item in manifest["inputs"] if item["path"].startswith("data.")]
    return text, manifest["finished"]


@pytest.mark.slow
def test_a_workspace_stays_with_the_commit_of_its_text(hub, tmp_path, teacher):
    place, own = {"HF_DATASETS_OFFLINE": "0"}, tmp_path / "ws"
    words = ["score", *LINES, f"source.model={teacher}", f"workspace={own}"]
    assert run(hub, tmp_path, *words, **place).returncode == 0
    first = text_of(own)
    assert first[0] == f"data.calibration (0 files, all; hf://org/lines at {COMMIT})"
    hub.commits.append(NEW)  # somebody pushes
    hub.requests.clear()
    done = run(hub, tmp_path, *words, **place)
    assert done.returncode == 0 and text_of(own) == first, done.stderr
    assert hub.requests == []
    named = f"data.calibration.paths=['hf://org/lines@{COMMIT}']"  # the same text
    done = run(hub, tmp_path, *words, named, HF_HUB_OFFLINE="1", **place)
    assert done.returncode == 0 and text_of(own) == first, done.stderr
    done = run(hub, tmp_path, *words, named.replace(COMMIT, "main"), **place)
    assert done.returncode == 0, done.stderr
    assert text_of(own)[0] == f"data.calibration (0 files, all; hf://org/lines at {NEW})"
    assert any(f"/resolve/{NEW}/" in line for line in hub.requests)


def test_whoever_asks_first_decides_for_variants_steps_and_threads(hub, tmp_path):
    code = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from nemo_minitron.data.documents import find_text
from nemo_minitron.flows import cascade, sweep
from nemo_minitron.config.compose import load_config
from nemo_minitron.workspace.layout import Workspace
from nemo_minitron.workspace.locks import locked
root = Workspace(Path(sys.argv[1]))
own = load_config("config", [f"workspace={root.step('1').root}", "plan.budget.params=1000"])
cascade._share(load_config("config", [f"workspace={root.root}"]), own)
rounds = [Workspace(root.step("1").round(20, name)) for name in "abcd"]
for each in rounds:
    sweep.share(root.step("1").root, each.root)
barrier = threading.Barrier(8)
def described(place):
    texts = find_text(["hf://org/lines"], [], "auto", "body", "x", notes=place.data_commits)
    return texts.described()
def ask(place):
    barrier.wait()
    return described(place)
with ThreadPoolExecutor(8) as pool:
    found = set(pool.map(ask, [*rounds, *rounds]))
with locked(rounds[0].root):
    found.add(described(root))
print(len(found), described(root), [path.name for path in root.data_commits.glob("*.json")])
print(described(Workspace(root.root.with_name("other"))))
def said(name, notes):
    try:
        return find_text([name], [], "auto", "body", "x", notes=notes).fingerprint
    except ValueError as error:
        return error
print(said("hf://org/lines@v9", root.data_commits), list(root.data_commits.glob("*v9*")))
(root.data_commits / "org--lines.json").write_text("{}")
print(said("hf://org/lines", root.data_commits))
other = Workspace(root.root.with_name("other"))
noted, anew = (said("hf://org/lines", notes) for notes in (other.data_commits, None))
print(noted != anew, noted == said(f"hf://org/lines@{described(other)[-41:-1]}", None))
with locked(other.root):
    pass
print(other.root.exists())
"""
    place = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
    hub.pushed = True
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "ws")],
        capture_output=True, text=True, env={**os.environ, **place}, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(hub.commits) > 2  # whoever asked was told of another one
    first, other, unknown, damaged, same, left = done.stdout.splitlines()
    assert first.startswith("1 x (0 files, all; hf://org/lines at ")
    assert first.endswith("['org--lines.json']")
    assert hub.commits.index(other[-41:-1]) > hub.commits.index(first.split()[7].rstrip(")"))
    assert unknown == "'org/lines': the data set on the hub has no revision 'v9' []"
    assert "ws/data_commits/org--lines.json: damaged" in damaged and "or remove it" in damaged
    assert same == "True True"  # without a workspace it is asked for anew
    assert left == "False"
