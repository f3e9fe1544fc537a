"""What is copied or shown out of a folder lies in it."""

import hashlib

import pytest

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.side_files import copy_side_files, side_files
from nemo_minitron.release.hub_download import check_hashes
from nemo_minitron.security.links import leads_out
from nemo_minitron.workspace.condition import damage
from nemo_minitron.workspace.manifest import read_manifest, write_manifest
from nemo_minitron.workspace.pictures import pictures_in


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "home" / "id_rsa"
    path.parent.mkdir()
    path.write_text("of the user's")
    return path


@pytest.mark.parametrize(
    "name", ["LICENSE", "tokenizer.json", "generation_config.json", "NOTICE.txt"]
)
def test_a_side_file_that_is_a_link_out_of_the_model_is_refused_with_both_ends(
    model_folder, secret, name
):
    folder = model_folder()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    for read in (side_files, open_checkpoint):
        with pytest.raises(ValueError, match=rf"{name}: a link to .*id_rsa, outside of"):
            read(folder)


def test_a_link_inside_the_folder_and_a_folder_that_is_a_link_are_fine(model_folder, tmp_path):
    folder = model_folder()
    (folder / "LICENSE-2.0").write_text("terms")
    (folder / "LICENSE").symlink_to("LICENSE-2.0")
    (tmp_path / "same").symlink_to(folder)
    (tmp_path / "copy").mkdir()
    copy_side_files(tmp_path / "same", tmp_path / "copy")
    assert (tmp_path / "copy" / "LICENSE").read_text() == "terms"
    assert not (tmp_path / "copy" / "LICENSE").is_symlink()


def cached(cache, name, content, shared):
    """A file in the hub's cache; with ``shared`` as huggingface_hub 2.4 lays Xet files out."""
    repository = cache / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / ("c" * 40), repository / "blobs"
    snapshot.mkdir(parents=True, exist_ok=True)
    blobs.mkdir(exist_ok=True)
    etag = hashlib.sha256(content).hexdigest()
    store = blobs / etag
    if shared:
        store = (
            cache / "blobs" / "ab" / ("ab" + "0" * 62)
        )  # not a hash that can be made from the contents
        store.parent.mkdir(parents=True, exist_ok=True)
        (blobs / etag).symlink_to(f"../../blobs/ab/{store.name}")
    store.write_bytes(content)
    (snapshot / name).symlink_to(f"../../blobs/{etag}")
    return snapshot, store


@pytest.mark.parametrize("shared", [False, True])
def test_the_hubs_cache_consists_of_links_that_stay_inside(tmp_path, secret, shared):
    snapshot, store = cached(tmp_path, "LICENSE", b"terms", shared)
    assert [path.name for path in side_files(snapshot)] == ["LICENSE"]
    check_hashes(snapshot)
    (snapshot / "NOTICE").symlink_to(secret)
    with pytest.raises(ValueError, match="NOTICE: a link to"):
        side_files(snapshot)
    (snapshot / "NOTICE").unlink()
    store.write_bytes(b"terns")  # bit rot
    with pytest.raises(ConnectionError, match="LICENSE: arrived damaged; deleted"):
        check_hashes(snapshot)
    assert not store.exists()  # else the next download would take it from there
    assert not any(snapshot.iterdir())


def test_an_artifact_whose_file_lies_elsewhere_is_damaged(tmp_path, secret):
    folder = tmp_path / "artifact"
    (folder / "plots").mkdir(parents=True)
    for name in ("a.json", "plots/hidden.png"):
        (folder / name).write_text("of the user's")
    manifest = write_manifest(folder, "scores", {}, [], "2026")
    assert damage(folder, manifest) is None
    (folder / "plots" / "hidden.png").unlink()
    (folder / "plots" / "hidden.png").symlink_to(secret)
    assert "plots/hidden.png lies outside of the folder" in damage(folder, read_manifest(folder))
    (folder / "plots" / "own.png").write_bytes(b"")
    assert [path.name for path in pictures_in(folder)] == ["own.png"]


def test_a_link_into_the_workspace_from_beside_it_is_not_inside(tmp_path):
    for name in ("run", "run2"):
        (tmp_path / name).mkdir()
    (tmp_path / "run2" / "file").write_text("")
    (tmp_path / "run" / "file").symlink_to("../run2/file")
    assert leads_out(tmp_path / "run" / "file", tmp_path / "run")
