"""The export on its way out: uploaded to a stand-in for the hub, by the real huggingface_hub; and as .nemo."""

import hashlib
import shutil
import tarfile

import pytest

from tests.support.hub import COMMIT, WRITER, Made, serve
from tests.support.runs import minitron, settings


@pytest.fixture
def export(finished, tmp_path, teacher, corpus):
    """Runs 'minitron export' on a copy of a finished run against the stand-in."""
    workspace = shutil.copytree(finished[0], tmp_path / "run")
    with serve({}) as hub:
        environment = {
            "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITER,
        }  # fmt: skip

        def run(*words, **more):
            words = ("export", *settings(workspace, teacher, corpus), *words)
            done = minitron(*words, env=environment | more)
            assert WRITER not in done.stdout + done.stderr and "Traceback" not in done.stderr
            return done

        yield workspace, hub, run


def test_upload_to_a_branch_with_a_tag_private_and_a_second_one_sends_no_weights(export):
    workspace, hub, run = export
    words = ["export.push_to_hub=me/small", "export.revision=v1", "export.tag=first"]
    done = run(*words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"/me/small/commit/{COMMIT}" in done.stdout + done.stderr
    made = hub.made["me/small"]
    assert made.private and made.tags == {"first": COMMIT}
    assert made.branches["main"] == {}
    there = {p.name: p.read_bytes() for p in (workspace / "export").iterdir() if p.is_file()}
    del there["manifest.json"]
    assert made.branches["v1"] == there
    assert not any(
        WRITER.encode() in path.read_bytes() for path in workspace.rglob("*") if path.is_file()
    )
    hub.requests.clear()
    assert run(*words).returncode == 0
    assert not any(line.startswith("PUT") for line in hub.requests)
    # another repository, public: the hub has the contents already
    assert run("export.push_to_hub=me/other", "export.public=true").returncode == 0
    assert hub.made["me/other"].private is False
    assert not any(line.startswith("PUT") for line in hub.requests)


def test_a_tag_stays_what_it_is_and_nothing_private_gets_public(export):
    _, hub, run = export
    words = ["export.push_to_hub=me/small", "export.tag=first"]
    assert run(*words).returncode == 0
    made = hub.made["me/small"]
    moved = run(*words, "export.shard_size=10000")
    assert moved.returncode == 2 and f"export.tag=first stays with {COMMIT}" in moved.stderr
    assert made.tags == {"first": COMMIT} != made.heads["main"]
    refused = run(*words, "export.name=other")
    assert (
        refused.returncode == 2
        and f"export.tag=first is there and means {COMMIT}" in refused.stderr
    )
    hub.made["me/open"] = Made("me/open", private=False)
    refused = run("export.push_to_hub=me/open", "export.name=other")
    assert (
        refused.returncode == 2 and "'me/open' is public; set export.public=true" in refused.stderr
    )
    assert hub.made["me/open"].branches["main"] == {}
    refused = run("export.push_to_hub=me/small", "export.name=other", HF_HUB_OFFLINE="1")
    assert refused.returncode == 2 and "HF_HUB_OFFLINE is set" in refused.stderr


def test_nothing_of_an_earlier_export_stays_beside_the_weights(export):
    workspace, hub, run = export
    word = "export.push_to_hub=me/small"
    assert run(word).returncode == 0
    assert "model.safetensors" in hub.made["me/small"].branches["main"]
    owners = {"NOTES.md", "awq/model.safetensors", "other.safetensors", "small.Q4_K_M.gguf"}
    # of an export with another tokenizer, or with files that this one does not ask for
    earlier = {"tokenizer.model", "preprocessor_config.json", "small-Q8_0.gguf"}
    for name in owners | earlier:
        hub.made["me/small"].branches["main"][name] = b"old"
    assert run(word, "export.shard_size=10000").returncode == 0
    there = set(hub.made["me/small"].branches["main"])
    assert (
        "model.safetensors" not in there
    )  # it, and not the shards, is what transformers would load
    assert owners < there and not earlier & there
    assert "tokenizer.json" in there
    shards = {path.name for path in (workspace / "export").glob("*.safetensors")}
    assert len(shards) > 1 and shards == {name for name in there if name.startswith("model-")}


def test_an_upload_that_broke_off_goes_on_and_a_stranger_may_not_write(export):
    workspace, hub, run = export
    word = "export.push_to_hub=me/small"
    stranger = run(word, HF_TOKEN="hf_strangerstranger")
    assert (
        stranger.returncode == 2
        and "set HF_TOKEN to a token that may write there" in stranger.stderr
    )
    hub.lost = 1
    broken = run(word)
    assert broken.returncode != 0 and "export.push_to_hub: 'me/small'" in broken.stderr, (
        broken.stderr
    )
    assert hub.made["me/small"].branches["main"] == {}
    assert run(word).returncode == 0
    weights = (workspace / "export" / "model.safetensors").read_bytes()
    assert hub.made["me/small"].branches["main"]["model.safetensors"] == weights
    assert hashlib.sha256(weights).hexdigest() in hub.large


def test_a_weak_student_is_not_uploaded(export):
    _, hub, run = export
    assert run("export.push_to_hub=me/small", "evaluate.min_retention=50").returncode == 1
    assert hub.made == {} and not hub.requests


def test_a_nemo_archive_beside_it_restores_to_the_same_weights(finished, tmp_path, teacher, corpus):
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    from nemo_minitron.plugin.model import MinitronModel

    workspace = shutil.copytree(finished[0], tmp_path / "run")

    def run(*words):  # there is no hub in it
        return minitron("export", *settings(workspace, teacher, corpus), *words)

    stale = run("export.nemo=true")
    assert stale.returncode == 0, stale.stderr[-2000:]
    before = (workspace / "run.nemo").read_bytes()
    assert run("export.dtype=bfloat16").returncode == 0
    assert (
        run("export.nemo=true", "export.dtype=bfloat16").returncode == 0
    )  # of the export that is there now
    assert len((workspace / "run.nemo").read_bytes()) < len(before)
    restored = MinitronModel.restore_from(str(workspace / "run.nemo"), map_location="cpu")
    weights = load_file(workspace / "export" / "model.safetensors")
    found = restored.model.state_dict()
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    # and it is a source like any other
    again = workspace.parent / "again"
    words = [f"source.model={workspace / 'run.nemo'}", "score.importance=magnitude", "plan.ffn=8"]
    pruned = minitron("prune", *words, f"workspace={again}")
    assert pruned.returncode == 0, pruned.stderr[-2000:]
    with safe_open(again / "pruned" / "model.safetensors", "pt") as file:
        assert file.get_slice("model.layers.0.mlp.up_proj.weight").get_shape() == [8, 12]
    (unpacked,) = (again / "unpacked").glob("*/hf")
    source = load_file(unpacked / "model.safetensors")
    assert all(torch.equal(source[name], value) for name, value in weights.items())
    assert (unpacked / "README.md").read_bytes() == (
        workspace / "export" / "README.md"
    ).read_bytes()
    assert (unpacked / "tokenizer.json").read_bytes() == (
        workspace / "export" / "tokenizer.json"
    ).read_bytes()


def test_archives_of_others_are_refused(tmp_path):
    (tmp_path / "text.nemo").write_text("no archive")
    (tmp_path / "model_config.yaml").write_text("target: nemo.collections.nlp.models.GPT\n")
    with tarfile.open(tmp_path / "other.nemo", "w") as archive:
        archive.add(tmp_path / "model_config.yaml", "./model_config.yaml")
    for name, text in (("text", "not a .nemo archive"), ("other", "of another model class")):
        words = [f"source.model={tmp_path / name}.nemo", "score.importance=magnitude", "plan.ffn=8"]
        done = minitron("prune", *words, f"workspace={tmp_path / 'ws'}")
        assert done.returncode == 2 and text in done.stderr.strip().splitlines()[-1], done.stderr
        assert not (tmp_path / "ws").exists()
