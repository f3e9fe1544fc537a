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
    assert "expected hf://owner/name[/config][:split], found 'hf://lines'" in unclear.stderr
    hub.failures = 100
    assert "ConnectionError: 'org/lines': the hub cannot be reached" in read(code).stderr
