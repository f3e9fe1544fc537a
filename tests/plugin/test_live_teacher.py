"""A teacher that is corrected while it teaches."""

import json

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F

from nemo_minitron.cli.main import main
from nemo_minitron.families import families
from nemo_minitron.losses.fused_linear_loss import LossWeights
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.plugin.knowledge_distillation import KnowledgeDistillation
from nemo_minitron.plugin.live_teacher import LiveTeacher, snapshots
from nemo_minitron.workspace.training_log import read_log
from tests.support.models import logits, make_model
from tests.support.nemo_training import run, tokens
from tests.support.runs import prune
from tests.support.two_ranks import weights


def test_a_correction_publishes_and_a_distillation_takes_it_over(tmp_path, words_often):
    words = [*words_often, "trainer.max_steps=6", "optim.lr=1e-2"]
    first, live, still = (tmp_path / name for name in ("first", "live", "still"))
    assert (
        main(
            [
                "correct",
                f"workspace={first}",
                "correct.publish_every=2",
                "correct.batch_size=2",
                *words,
            ]
        )
        == 0
    )
    assert snapshots(first / "live") == [4, 6]
    corrected = first / "correct" / "hf"
    assert torch.equal(logits(first / "live" / "step=6"), logits(corrected))
    assert not torch.equal(logits(first / "live" / "step=4"), logits(corrected))
    for place, more in (
        (live, f"distill.live_teacher={first}/live"),
        (still, f"distill.teacher={corrected}"),
    ):
        prune(place, *words)
        assert main(["distill", f"workspace={place}", more, *words]) == 0
    assert json.loads((live / "student" / "teachers.json").read_text()) == [
        {"step": 0, "snapshot": 6}
    ]
    assert all(torch.equal(weights(live)[name], tensor) for name, tensor in weights(still).items())


def test_a_folder_that_is_not_there_yet_is_said_so(capsys, tmp_path, words):
    """It may come, and it may be a typing mistake, with which no teacher would ever change."""
    words = [*words, f"workspace={tmp_path / 'w'}", "trainer.max_steps=1"]
    assert main(["prune", *words]) == 0
    assert main(["distill", *words, f"distill.live_teacher={tmp_path}/lvie"]) == 0
    said = capsys.readouterr().err
    assert f"distill.live_teacher: {tmp_path}/lvie is not there yet; until something is pub" in said


def test_what_does_not_go_with_a_live_teacher_is_refused(capsys, tmp_path, words_often):
    assert main(["prune", f"workspace={tmp_path}/w", *words_often]) == 0
    shard = ["training.parallel=shard", "distill.teacher_place=shard"]
    cached = ["distill.teacher_logits=cache"]
    words = [f"workspace={tmp_path}/w", *words_often, "trainer.max_steps=2"]
    assert main(["logits", *words]) == 0
    capsys.readouterr()
    for more, said in (
        (shard, "use device or cpu"),
        (cached, "distill.live_teacher changes; use online"),
    ):
        assert main(["distill", *words, "distill.live_teacher=x", *more]) == 2
        assert said in capsys.readouterr().err
    # without a correction of this workspace's own; with one, the teacher is corrected before
    assert main(["correct", *words, "correct.batch_size=2"]) == 0
    words = [*words, "correct.enabled=true"]
    assert main(["prune", *words]) == 0
    assert main(["distill", *words, "distill.live_teacher=x"]) == 2
    assert "choose one" in capsys.readouterr().err


class Publisher(Callback):
    """Publishes models at certain steps, as another process would; and may fall over."""

    def __init__(self, folder, due, fall=None):
        self.folder, self.due, self.fall = folder, due, fall

    def on_train_batch_end(self, trainer, *_):
        step = trainer.global_step
        if step in self.due and not (self.folder / f"step={self.due[step]}").exists():
            make_model(self.folder / f"step={self.due[step]}", "llama", seed=self.due[step])
        if step == self.fall:
            raise OSError("killed")


def taught(tmp_path, name, steps, published, due, fall=None):
    """One training under a live teacher: the model, and the seeds of the teachers of its last steps."""
    teacher = make_model(tmp_path / f"{name}-teacher", "llama", seed=100)
    student = make_model(tmp_path / f"{name}-student", "llama", seed=101, hidden_size=12)
    distillation = KnowledgeDistillation(load_model(teacher), families()["llama"], LossWeights())
    live = LiveTeacher(published, tmp_path / name, distillation, load_model)
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append((trainer.global_step, distillation.teacher.lm_head.weight[0, 0].item()))

    model = run(
        student,
        tmp_path / name,
        steps,
        [live, distillation, Watch(), Publisher(published, due, fall)],
    )
    return model, seen


def test_a_killed_training_learns_from_the_same_teachers_again(tmp_path):
    due = {2: 20, 4: 40, 5: 50}  # the checkpoint is behind step 3 and 6
    model, seen = taught(tmp_path, "straight", 8, tmp_path / "a", due)
    heads = {
        step: load_model(make_model(tmp_path / f"m{step}", "llama", seed=step))
        .lm_head.weight[0, 0]
        .item()
        for step in (100, 20, 40, 50)
    }
    order = [100, 100, 20, 20, 40, 50, 50, 50]
    assert seen == [(step + 1, heads[order[step]]) for step in range(8)]
    assert json.loads((tmp_path / "straight" / "teachers.json").read_text()) == [
        {"step": 2, "snapshot": 20}, {"step": 4, "snapshot": 40}, {"step": 5, "snapshot": 50},
    ]  # fmt: skip
    with pytest.raises(OSError, match="killed"):
        taught(tmp_path, "parts", 8, tmp_path / "b", due, fall=5)
    # it goes on behind step 3, where newer teachers lie about already
    resumed, again = taught(tmp_path, "parts", 8, tmp_path / "b", due)
    assert again == seen[3:]
    ours, theirs = model.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_log_tells_each_teacher_s_own_loss(tmp_path):
    folders = [make_model(tmp_path / f"t{seed}", "llama", seed=seed) for seed in (1, 2, 3)]
    distillation = KnowledgeDistillation(load_model(folders[0]), families()["llama"], LossWeights())
    due = {3: folders[1], 5: folders[2]}  # a validation is behind steps 2, 4, 6 and 8

    class Swap(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step in due:
                distillation.replace_teacher(load_model(due[trainer.global_step]))

    run(folders[0], tmp_path / "state", 8, [distillation, Swap()])
    lines = read_log(tmp_path / "state" / "metrics.jsonl")
    told = {line["step"]: line["teacher_val_loss"] for line in lines if "teacher_val_loss" in line}
    held_out = tokens(8, seed=1)  # what it was validated on
    with torch.no_grad():
        losses = [
            F.cross_entropy(
                load_model(folder)(held_out[:, :-1]).logits.flatten(0, 1), held_out[:, 1:].flatten()
            ).item()
            for folder in folders
        ]
    assert told == pytest.approx(dict(zip((2, 4, 6), losses, strict=True)), rel=1e-5)


def test_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="another model than the first"):
        distillation = KnowledgeDistillation(
            load_model(make_model(tmp_path / "a", "llama")), families()["llama"], LossWeights()
        )
        distillation.replace_teacher(
            load_model(make_model(tmp_path / "b", "llama", intermediate_size=32))
        )
