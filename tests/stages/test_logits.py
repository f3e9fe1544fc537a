"""The cached teacher: written once, gone on with after a kill, and the student learns from it alone."""

import shutil

import pytest
import torch

from nemo_minitron.cli.main import main
from nemo_minitron.distillation import teacher_logits
from nemo_minitron.distillation.teacher_logits import TeacherLogits
from nemo_minitron.losses import loss_terms
from nemo_minitron.workspace.training_log import read_log
from tests.support.forks import CONSTANT
from tests.support.processes import until
from tests.support.runs import kill_group, prune, refused, started
from tests.support.two_ranks import on_two_ranks

CACHE = "distill.teacher_logits=cache"


def made(place, *more):
    for stage in ("prune", "logits", "distill"):
        assert main([stage, f"workspace={place}", *more]) == 0
    return read_log(place / "student" / "metrics.jsonl")


def test_all_entries_teach_what_the_teacher_beside_the_student_does(capsys, tmp_path, words):
    entries = 300  # the whole vocabulary
    cached = made(tmp_path / "cached", *words, CACHE, f"distill.cache.entries={entries}")
    online = made(tmp_path / "online", *words)
    assert [line["step"] for line in cached] == [line["step"] for line in online]
    for one, other in zip(cached, online, strict=True):
        for name in ("loss", "ce", "divergence", "val_loss", "val_divergence"):
            assert (name in one) == (name in other)
            assert name not in one or one[name] == pytest.approx(other[name], rel=2e-3, abs=2e-4), (
                name
            )
    out = capsys.readouterr().out
    assert "logits: 1,536 tokens, 1202 bytes each, 300 entries with 100.0% of the mass" in out
    assert main(["verify", str(tmp_path / "cached")]) == 0


@pytest.mark.parametrize("method", ["top_k", "sampling"])
def test_a_student_learns_from_a_few_entries_and_needs_no_teacher(capsys, tmp_path, words, method):
    place = tmp_path / "ws"
    shared = next(word for word in words if word.startswith("source.model=")).partition("=")[2]
    source = shutil.copytree(shared, tmp_path / "teacher")  # the other tests keep theirs
    words = [*words, CACHE, f"distill.cache.method={method}", "distill.cache.entries=8", "trainer.max_steps=40",
             "optim.lr=0.01", "distill.ce=0", f"source.model={source}"]  # fmt: skip
    for stage in ("prune", "logits"):
        assert main([stage, f"workspace={place}", *words]) == 0
    facts = TeacherLogits(place / "logits").facts
    assert facts["bytes_per_token"] == (34 if method == "top_k" else 16)
    if method == "top_k":
        rows = TeacherLogits(place / "logits")[range(facts["rows"])]  # of the training alone
        assert facts["mass"] == pytest.approx(float(rows.log_p_TK.exp().sum(-1).mean()), abs=1e-4)
    (source / "model.safetensors").unlink()
    capsys.readouterr()
    assert main(["distill", f"workspace={place}", *words, "source.model=null"]) == 0
    assert ("the teacher's own entropy together" in capsys.readouterr().err) == (
        method == "sampling"
    )
    lines = read_log(place / "student" / "metrics.jsonl")
    divergences = [line["val_divergence"] for line in lines if "val_divergence" in line]
    assert divergences[-1] < divergences[0]


def test_the_loss_from_cached_logits_is_compiled_where_that_is_asked_for(
    tmp_path, words, monkeypatch
):
    compiled, whole = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: whole(f, **how | {"backend": "eager"}))
    monkeypatch.setattr(
        loss_terms,
        "_compiled_terms",
        lambda: compiled.append(1) or loss_terms._block_terms_,
    )
    words = [*words, CACHE, "distill.cache.entries=8"]
    plain = made(tmp_path / "plain", *words)
    assert not compiled
    found = made(tmp_path / "compiled", *words, "training.compile=on")
    assert compiled
    assert [line.get("loss") for line in found] == pytest.approx(
        [line.get("loss") for line in plain]
    )


def test_killed_and_on_two_ranks_it_comes_out_the_same(tmp_path, words, monkeypatch):
    words = [*words, CACHE, "distill.cache.method=sampling", "distill.cache.entries=6"]
    straight, killed, ranks = (tmp_path / name for name in ("straight", "killed", "ranks"))
    small = 16 * 6 * 2 * 4  # four samples a part
    monkeypatch.setattr(teacher_logits, "PART_BYTES", small)
    monkeypatch.setenv(CONSTANT, f"{teacher_logits.__name__}:PART_BYTES:{small}")
    for place in (straight, killed, ranks):
        prune(place, *words)
    assert main(["logits", f"workspace={straight}", *words]) == 0
    process = started("logits", f"workspace={killed}", *words)
    state = killed / "logits" / "state"
    until(lambda: process.poll() is not None or len(list(state.glob("part-*"))) >= 3, every=0.001)
    kill_group(process)
    left = {
        path.name: path.stat().st_mtime_ns for path in (killed / "logits" / "state").glob("part-*")
    }
    assert not (killed / "logits" / "manifest.json").exists() and len(left) >= 3
    assert main(["logits", f"workspace={killed}", *words]) == 0
    parts = sorted((straight / "logits").glob("part-*"))
    assert len(parts) == 28  # 96 samples, and 16 of validation
    for part in parts:
        again = killed / "logits" / part.name
        assert again.read_bytes() == part.read_bytes()
        assert again.stat().st_mtime_ns == left.get(
            part.name, again.stat().st_mtime_ns
        )  # not made twice
    done = on_two_ranks("logits", f"workspace={ranks}", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all((ranks / "logits" / part.name).read_bytes() == part.read_bytes() for part in parts)


def test_whoever_is_killed_while_the_parts_are_hashed_finds_them_again(
    tmp_path, words, monkeypatch
):
    from nemo_minitron.stages import logits
    from nemo_minitron.workspace import resumable

    words = [f"workspace={tmp_path / 'ws'}", *words, CACHE, "distill.cache.entries=4"]
    assert main(["prune", *words]) == 0

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resumable, "write_manifest", killed)
        assert main(["logits", *words]) == 1
    taught = []
    whole = logits.write_part
    monkeypatch.setattr(logits, "write_part", lambda *given: (taught.append(given), whole(*given)))
    assert main(["logits", *words]) == 0 and not taught
    assert main(["verify", str(tmp_path / "ws")]) == 0


def test_what_does_not_fit_the_cache_is_said_so(capsys, tmp_path, words):
    place = f"workspace={tmp_path / 'ws'}"
    words = [*words, CACHE]
    assert main(["prune", place, *words]) == 0
    capsys.readouterr()
    assert "run 'minitron logits'" in refused(capsys, "distill", place, *words)
    line = refused(capsys, "logits", place, *words, "distill.cache.entries=1000")
    assert "expected at most the vocabulary's 300, found 1000" in line
    assert main(["logits", place, *words]) == 0
    capsys.readouterr()
    for more, message in [
        ("distill.divergence=jsd", "gives forward_kl, found distill.divergence=jsd"),
        ("distill.temperature=2", "made with temperature 1.0, found 2.0"),
        ("distill.intermediate.terms=[hidden]", "holds no hidden states"),
        (
            "data.train.samples=64",
            "made for other samples (96; this training reads 64); run 'minitron logits'",
        ),
        ("distill.cache.entries=4", "made with entries 64, found 4; run 'minitron logits' again"),
        ("data.validation.seed=7", "made with validation {"),
    ]:
        assert message in refused(capsys, "distill", place, *words, more)
