"""A user's own script: trainer, epochs, data sets, batches, archives, callbacks; and the examples as they stand."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.core.classes import ModelPT
from omegaconf import OmegaConf
from torch.nn import functional as F

import nemo_minitron
from nemo_minitron import (
    KnowledgeDistillation,
    LossWeights,
    MinitronModel,
    ModelTransform,
    Pruning,
    Student,
)
from nemo_minitron.cli.main import main
from nemo_minitron.losses.intermediate import IntermediateWeights
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.plugin.data_sets import data_set
from tests.plugin.test_transforms import plan_for
from tests.support.models import logits, make_model
from tests.support.split_script import Seen, fitted
from tests.support.two_ranks import module_on_two_ranks

ROOT = Path(__file__).parents[2]
OPTIM = {"name": "adamw", "lr": 1e-3, "sched": {"name": "CosineAnnealing", "warmup_steps": 2}}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}


def trained(teacher, corpus, trainer, callbacks=(), ckpt_path=None, **cfg):
    """A model after a fit, 26 samples in batches of 4: 6 batches an epoch."""
    lightning = Trainer(
        **{**QUIET, "enable_model_summary": False}, **trainer, callbacks=list(callbacks)
    )
    data = {"paths": str(corpus), "sequence_length": 16, "samples": 26, "batch_size": 4}
    model = MinitronModel.from_hf(
        teacher, **{"optim": OPTIM, "train_ds": data, **cfg}, trainer=lightning
    )
    lightning.fit(model, ckpt_path=ckpt_path)
    return model, lightning


@pytest.mark.parametrize("optim", [OPTIM, {"name": "adamw", "lr": 1e-3}])
@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        ({"max_epochs": 3}, 18),
        ({"max_epochs": 3, "max_steps": 100}, 18),
        ({"max_epochs": 3, "max_steps": 7}, 7),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, 6),
        ({"max_epochs": 2, "limit_train_batches": 4}, 8),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 6),
        ({"max_steps": 7}, 7),
    ],
)
def test_three_epochs_are_three_times_the_data(teacher, corpus, trainer, steps, optim):
    class Seen(Callback):
        def on_train_batch_start(self, trainer, module, batch, number):
            rows.setdefault(trainer.current_epoch, []).extend(map(tuple, batch.tolist()))

    rows: dict[int, list[tuple[int, ...]]] = {}
    _, lightning = trained(teacher, corpus, trainer, [Seen()], optim=optim)
    assert lightning.global_step == steps
    if trainer == {"max_epochs": 3}:
        assert [len(set(rows[epoch])) for epoch in range(3)] == [24, 24, 24]
        assert rows[0] != rows[1]  # drawn again
    assert {"learning_rate", "global_step"} <= set(lightning.callback_metrics)


def test_steps_that_an_epoch_would_cut_short_are_refused(teacher, corpus):
    trainer = {"max_steps": 6, "accumulate_grad_batches": 2, "limit_train_batches": 5}
    with pytest.raises(ValueError, match=r"^trainer\.limit_train_batches: .* such as 4, found 5$"):
        trained(teacher, corpus, trainer)
    _, lightning = trained(teacher, corpus, {**trainer, "max_steps": 2})  # its one epoch is shorter
    assert lightning.global_step == 2


class Ranks(Callback):
    """Notes what each rank reads."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_start(self, trainer, module, batch, number):
        with (self.folder / f"{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps([trainer.current_epoch, batch.tolist()]) + "\n")


def test_two_devices_need_no_flag_and_share_the_samples(teacher, corpus, tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests.plugin.test_nemo_script import Ranks, trained\n"
        "trainer = {'max_epochs': 2, 'devices': 2, 'strategy': 'ddp_fork'}\n"
        "trained(Path(sys.argv[1]), Path(sys.argv[2]), trainer, [Ranks(Path(sys.argv[3]))])"
    )  # in a process of its own: autograd has no threads there yet, which do not survive a fork
    command = [sys.executable, "-c", code, str(teacher), str(corpus), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = {(rank, epoch): set() for rank in range(2) for epoch in range(2)}
    for rank in range(2):
        for line in (tmp_path / f"{rank}.jsonl").read_text().splitlines():
            epoch, batch = json.loads(line)
            seen[rank, epoch] |= set(map(tuple, batch))
    assert {len(rows) for rows in seen.values()} == {12}
    assert all(len(seen[0, epoch] | seen[1, epoch]) == 24 for epoch in range(2))


def test_two_ranks_that_share_a_model_read_the_same_samples(corpus, tokenizer_folder, tmp_path):
    """As one rank does alone; and nothing is written before the parts are together."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "head_dim": 4}
    folder = make_model(tmp_path / "m", "llama", vocab_size=300, **sizes)
    for path in tokenizer_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    module_on_two_ranks("tests.support.split_script", folder, corpus, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["batches"] == second["batches"]
    seen = Seen()
    alone = fitted(folder, corpus, [seen])
    assert seen.batches == first["batches"] and len(seen.batches) == 3
    written = load_model(tmp_path / "hf0", dtype=torch.float32).state_dict()
    for name, tensor in alone.model.state_dict().items():
        assert torch.allclose(written[name], tensor, atol=1e-5), name
    for said in (first["said"], second["said"]):
        assert said.startswith("save_hf: the model is split over ranks") and "gather()" in said


def test_several_validation_sets_have_a_loader_and_a_name_each(teacher, corpus):
    files = [str(corpus / f"doc{i:02d}.txt") for i in range(2)]
    sets = {"paths": files, "sequence_length": 16, "samples": 8}
    model, lightning = trained(
        teacher, corpus, {"max_steps": 2}, validation_ds=sets, test_ds={**sets, "name": ["one", "other"]}
    )  # fmt: skip
    found = {name: float(value) for name, value in lightning.callback_metrics.items()}
    assert found["val_loss"] == found["doc00_val_loss"] != found["doc01_val_loss"]
    (tested,) = {
        json.dumps(row, sort_keys=True) for row in [lightning.test(model, verbose=False)[0]]
    }
    tested = {**json.loads(tested), **{k: float(v) for k, v in lightning.callback_metrics.items()}}
    assert tested["test_loss"] == tested["one_test_loss"] != tested["other_test_loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sise": 4}, "train_ds.batch_sise: unknown; here: batch_size"),
        ({"micro_batch_size": 4}, "train_ds.micro_batch_size: unknown; here: batch_size"),
        ({"is_tarred": True}, "train_ds.is_tarred: unknown; known are paths, tokenizer"),
        ({"paths": None}, "train_ds.paths: missing"),
        ({"batch_size": 0}, "train_ds.batch_size: expected a whole number of at least 1, found 0"),
        ({"num_workers": "two"}, "train_ds.num_workers: expected a whole number"),
        ({"shuffle": "yes"}, "train_ds.shuffle: expected true or false, found 'yes'"),
    ],
)
def test_a_data_set_s_keys_are_honoured_or_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        data_set({"paths": "p", "tokenizer": "t", **changes}, "train_ds")


def test_order_and_workers_are_as_they_were_asked_for(teacher, corpus):
    data = {
        "paths": str(corpus),
        "sequence_length": 16,
        "samples": 8,
        "batch_size": 4,
        "shuffle": False,
    }
    model = MinitronModel.from_hf(
        teacher, train_ds={**data, "num_workers": 1}
    )  # and without a trainer
    loader = model.train_dataloader()
    assert loader.num_workers == 1 and len(loader) == 2
    assert [list(rows) for rows in loader.batch_sampler] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="train_ds: 26 samples are too few for a batch of 32"):
        trained(
            teacher, corpus, {"max_epochs": 1}, train_ds={**data, "samples": 26, "batch_size": 32}
        )


def test_batches_of_transformers_are_read_and_weighed_as_there(teacher):
    model = MinitronModel.from_hf(teacher)
    ids = torch.randint(0, 300, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # on the left: what is masked must not be seen
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 4] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    expected = load_model(teacher).train()(**batch).loss
    found = model.evaluate_objective(batch)
    assert torch.allclose(found.loss, expected, rtol=1e-5)
    without = model.evaluate_objective({"input_ids": ids, "labels": labels}).loss
    assert not torch.allclose(without, expected, rtol=1e-4)
    with pytest.raises(ValueError, match=r"expected token ids .* found \['ids'\]"):
        model.evaluate_objective({"ids": ids})


def test_archives_and_checkpoints_of_a_script_restore(teacher, corpus, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    _, plan = plan_for(make_model(tmp_path / "m", "llama", vocab_size=300))
    keeper = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    lightning = Trainer(
        **{**QUIET, "enable_checkpointing": True}, max_steps=2, callbacks=[keeper, ModelTransform()]
    )
    data = {"paths": str(corpus), "tokenizer": str(teacher), "sequence_length": 16, "samples": 8}
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    cfg = OmegaConf.create(
        {"hf_config": config, "optim": OPTIM, "train_ds": data}
    )  # as in a YAML file
    model = MinitronModel(cfg, lightning)
    model.model_transform = Pruning(plan)
    lightning.fit(model)
    model.save_to(str(tmp_path / "x.nemo"))
    expected = model.model.state_dict()
    again = [
        MinitronModel.restore_from(str(tmp_path / "x.nemo"), map_location="cpu"),
        ModelPT.restore_from(str(tmp_path / "x.nemo"), map_location="cpu"),
        MinitronModel.load_from_checkpoint(keeper.last_model_path, map_location="cpu"),
    ]
    for other in again:
        state = other.model.state_dict()
        assert type(other) is MinitronModel and state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


class Own(MinitronModel):
    """A class of the user's."""


def test_a_subclass_restores_as_itself(teacher, tmp_path):
    Own.from_hf(teacher).save_to(str(tmp_path / "own.nemo"))
    assert type(Own.restore_from(str(tmp_path / "own.nemo"), map_location="cpu")) is Own


class Tuning(LightningModule):
    def __init__(self, folder, runs=1):
        super().__init__()
        self.llm, self.runs = load_model(folder).train(), runs

    def training_step(self, batch, _):
        for _ in range(self.runs):
            loss = self.llm(**batch).loss
        return {"loss": loss, "mine": 1}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader([BATCH], batch_size=None)


BATCH = {
    "input_ids": torch.arange(24).reshape(2, 12) * 7 % 96,
    "attention_mask": torch.ones(2, 12, dtype=int),
}
BATCH["attention_mask"][0, :4] = 0
BATCH["labels"] = BATCH["input_ids"].masked_fill(BATCH["attention_mask"] == 0, -100)


def divergence(teacher, student):
    """The textbook's, over the tokens that are learned."""
    learned = BATCH["labels"][:, 1:] != -100
    rows = [
        model(**{k: BATCH[k] for k in ("input_ids", "attention_mask")}).logits[:, :-1]
        for model in (teacher, student)
    ]
    p, q = (F.log_softmax(row[learned].double(), -1) for row in rows)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("loss", ["replace", "add"])
def test_a_module_of_one_s_own_is_distilled(tmp_path, loss, order):
    folder = make_model(tmp_path / "m", "llama")
    _, plan = plan_for(folder)
    module = Tuning(folder)
    module.model_transform = Pruning(plan)
    other = load_model(folder).train()
    Pruning(plan)(other)
    expected = divergence(load_model(folder), other)
    ce = float(other(**BATCH).loss)
    inside = IntermediateWeights(("hidden",), layers=((-1, -1),))
    distillation = KnowledgeDistillation(folder, student=Student(loss=loss))
    lightning = Trainer(**QUIET, max_steps=1, callbacks=[ModelTransform(), distillation][::order])
    step = module.training_step
    lightning.fit(module)
    found = {name: float(value) for name, value in lightning.callback_metrics.items()}
    assert found["kd_divergence"] == pytest.approx(expected, rel=1e-4)
    assert found["kd_loss"] == pytest.approx(expected, rel=1e-4)
    assert "training_step" not in vars(module) and module.training_step == step
    assert not module.llm._forward_pre_hooks and not module.llm.model._forward_hooks
    expected += ce if loss == "add" else 0
    with torch.no_grad():  # SGD's one step shows the gradient's loss
        total = divergence(load_model(folder), other) + (
            float(other(**BATCH).loss) if loss == "add" else 0
        )
    assert total == pytest.approx(expected, rel=1e-4)
    changed = [
        n for n, p in module.llm.named_parameters() if not torch.equal(p, other.get_parameter(n))
    ]
    assert changed
    again = KnowledgeDistillation(folder, intermediate=inside)
    Trainer(**QUIET, max_steps=1, callbacks=[again]).fit(module)
    assert not hasattr(module, "projection")


class Validated(Tuning):
    """With the shortest of signatures, and two validation sets, of which the second generates."""

    def training_step(self, batch):
        return self.llm(**batch).loss

    def validation_step(self, batch, batch_idx, dataloader_idx):
        self.log("mine", self.llm(**batch).loss)
        if dataloader_idx == 1:
            self.llm(**batch)

    def val_dataloader(self):
        rows = torch.utils.data.DataLoader([BATCH], batch_size=None)
        return [rows, rows]


def test_a_module_of_one_s_own_tells_its_divergence_at_every_validation(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    module = Validated(make_model(tmp_path / "other", "llama", seed=3))
    before = module.validation_step
    distillation = KnowledgeDistillation(folder)
    lightning = Trainer(**QUIET, max_steps=1, num_sanity_val_steps=0, callbacks=[distillation])
    with pytest.warns(UserWarning, match="validation_step of Validated does not run its Llama"):
        lightning.fit(module)
    found = float(lightning.callback_metrics["val_divergence"])
    assert found == pytest.approx(divergence(load_model(folder), module.llm), rel=1e-4)
    assert {"mine/dataloader_idx_0", "kd_loss"} <= set(lightning.callback_metrics)
    assert not any("divergence" in name and "1" in name for name in lightning.callback_metrics)
    assert distillation.teacher_loss is not None and distillation.teacher_loss > 0
    assert module.validation_step == before and "validation_step" not in vars(module)


def test_without_labels_all_that_is_read_is_learned(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    module, plain = Tuning(folder), {"input_ids": BATCH["input_ids"]}
    module.training_step = lambda batch, _: module.llm(**batch).logits.sum()
    module.train_dataloader = lambda: torch.utils.data.DataLoader([plain], batch_size=None)
    student = load_model(make_model(tmp_path / "other", "llama", seed=3))
    module.llm = student
    rows = [
        F.log_softmax(m(**plain).logits[:, :-1].detach().double(), -1)
        for m in (load_model(folder), student)
    ]
    expected = float((rows[0].exp() * (rows[0] - rows[1])).sum(-1).mean())
    lightning = Trainer(**QUIET, max_steps=1, callbacks=[KnowledgeDistillation(folder)])
    lightning.fit(module)
    assert float(lightning.callback_metrics["kd_loss"]) == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_distilled_is_said_in_a_sentence(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    for module, message in (
        (
            Tuning(folder, runs=2),
            "the training_step of Tuning ran its LlamaForCausalLM 2 times, expected once",
        ),
        (Tuning(folder, runs=1), "vocabulary: the teacher has 96 entries, the student 300"),
    ):
        if "vocabulary" in message:
            module.llm = load_model(make_model(tmp_path / "other", "llama", vocab_size=300))
        with pytest.raises(ValueError, match=message):
            Trainer(**QUIET, max_steps=1, callbacks=[KnowledgeDistillation(folder)]).fit(module)
        assert "training_step" not in vars(module)
    nothing = Tuning(folder)
    nothing.llm = torch.nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match="KnowledgeDistillation: Tuning holds no Hugging Face model"
    ):
        Trainer(**QUIET, max_steps=1, callbacks=[KnowledgeDistillation(folder)]).fit(nothing)


def test_after_a_distillation_a_model_has_its_own_objective_back(teacher, corpus):
    distillation = KnowledgeDistillation(teacher, weights=LossWeights(1.0, 0.5))
    model, lightning = trained(teacher, corpus, {"max_steps": 1}, [distillation])
    assert "train_divergence" in lightning.callback_metrics
    assert model.objective == model.cross_entropy
    after = Trainer(**QUIET, max_steps=1)
    after.fit(model)
    assert "train_divergence" not in after.callback_metrics


def test_everything_public_is_there_and_costs_nothing_until_it_is_asked_for():
    for name in nemo_minitron.__all__:
        assert getattr(nemo_minitron, name) is not None
    assert set(nemo_minitron.__all__) <= set(dir(nemo_minitron))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        nemo_minitron.Nothing  # noqa: B018
    code = "import sys, nemo_minitron; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def commands(name):
    """The words of an example's command line on the page."""
    page = (ROOT / "docs" / "nemo.md").read_text()
    (text,) = re.findall(rf"^python (examples/{name}(?:.*\\\n)*.*)$", page, re.M)
    return shlex.split(text.replace("\\\n", " "))


def test_the_training_of_the_page_runs_as_it_stands_there(teacher, corpus, tmp_path, monkeypatch):
    for name in ("examples", "nemo_minitron"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my-llama").symlink_to(teacher)
    (tmp_path / "texts").symlink_to(corpus)
    (tmp_path / "held-out").mkdir()
    for name, source in zip("ab", sorted(corpus.glob("*.txt")), strict=False):
        (tmp_path / "held-out" / f"{name}.txt").symlink_to(source)
    other = make_model(tmp_path / "other", "llama", vocab_size=300, seed=7)
    MinitronModel.from_hf(other).save_to(str(tmp_path / "other.nemo"))
    small = ["model.train_ds.sequence_length=16", "+model.train_ds.samples=8", "model.validation_ds.sequence_length=16",
             "model.validation_ds.samples=4", "trainer.accelerator=cpu", "+exp_manager.seconds_to_sleep=0"]  # fmt: skip
    seen = {}

    class Looked(Trainer):
        def fit(self, model, *more, **named):
            if "+init_from_nemo_model=other.nemo" in sys.argv:
                seen["start"] = {k: v.clone() for k, v in model.model.state_dict().items()}
            super().fit(model, *more, **named)
            seen["names"] = set(self.callback_metrics)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning.pytorch.Trainer", Looked)
    words = [*commands("train.py"), *small, "+init_from_nemo_model=other.nemo"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")
    (archive,) = (tmp_path / "runs").rglob("model.nemo")
    assert {"val_loss", "a_val_loss", "b_val_loss"} <= seen["names"]
    expected = load_model(other, torch.float32).state_dict()
    assert all(torch.equal(seen["start"][name], expected[name]) for name in expected)
    trained = MinitronModel.restore_from(str(archive), map_location="cpu").model.state_dict()
    assert not torch.equal(trained["lm_head.weight"], expected["lm_head.weight"])
    (last,) = (tmp_path / "runs").rglob("*-last.ckpt")
    assert torch.load(last, weights_only=False)["global_step"] == 6  # three epochs of two batches


def test_another_model_s_archive_gives_its_weights_and_none_of_its_shape(teacher, tmp_path):
    other = make_model(tmp_path / "other", "llama", vocab_size=300, seed=7)
    MinitronModel.from_hf(other).save_to(str(tmp_path / "other.nemo"))
    model = MinitronModel.from_hf(make_model(tmp_path / "m", "llama", vocab_size=300))
    model.maybe_init_from_pretrained_checkpoint(
        OmegaConf.create({"init_from_nemo_model": str(tmp_path / "other.nemo")})
    )
    expected, found = load_model(other, torch.float32).state_dict(), model.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    wide = make_model(tmp_path / "wide", "llama", vocab_size=300, intermediate_size=48)
    with pytest.raises(RuntimeError, match="size mismatch"):
        MinitronModel.from_hf(wide).maybe_init_from_pretrained_checkpoint(
            OmegaConf.create({"init_from_nemo_model": str(tmp_path / "other.nemo")})
        )


def test_the_examples_run_as_the_page_says(teacher, corpus, tmp_path, monkeypatch):
    words = [
        f"workspace={tmp_path / 'run'}",
        f"source.model={teacher}",
        "score.importance=magnitude",
    ]
    assert main(["score", *words]) == 0 and main(["plan", *words, "plan.ffn=20"]) == 0
    plan, page = tmp_path / "run" / "plan", (ROOT / "docs" / "nemo.md").read_text()
    given = [
        f"hf_folder={teacher}", f"model.train_ds.paths={corpus}", "model.train_ds.sequence_length=16",
        "+model.train_ds.samples=8", f"model.validation_ds.paths={corpus}", "model.validation_ds.sequence_length=16",
        "model.validation_ds.samples=8", f"exp_manager.exp_dir={tmp_path / 'exp'}", "trainer.accelerator=cpu",
    ]  # fmt: skip
    assert "python examples/prune_and_distil.py" in page and "python examples/train.py" in page
    command = [sys.executable, "examples/prune_and_distil.py", f"plan={plan}", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (archive,) = (tmp_path / "exp").rglob("student.nemo")
    assert (
        json.loads((archive.parent / "hf" / "config.json").read_text())["intermediate_size"] == 20
    )
    code = "import sys; from nemo_minitron import MinitronModel; MinitronModel.restore_from(sys.argv[1], map_location='cpu')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(archive)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["own_module.py", str(teacher), str(plan), str(tmp_path / "out")]
    )
    runpy.run_path(str(ROOT / "examples" / "own_module.py"), run_name="__main__")
    assert torch.isfinite(logits(tmp_path / "out")).all()


class Stop(Callback):
    """Saves behind a step, as exp_manager does, and ends the process's work there."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


class Read(Callback):
    """Notes epoch, step and place in the epoch of every batch that is read, and what it is."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, number):
        at = (trainer.current_epoch, trainer.global_step, number)
        self.batches.append((*at, batch.tolist()))


@pytest.mark.parametrize(
    ("trainer", "step"),
    [
        ({"max_epochs": 3, "accumulate_grad_batches": 1}, 8),
        ({"max_epochs": 3, "accumulate_grad_batches": 1}, 6),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, 3),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, 2),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 4),
        ({"max_steps": 6, "accumulate_grad_batches": 2, "limit_train_batches": 4}, 3),
        ({"max_steps": 6, "accumulate_grad_batches": 2, "limit_train_batches": 4}, 2),
    ],
)
def test_a_training_of_epochs_goes_on_exactly_in_and_between_epochs(
    teacher, corpus, tmp_path, trainer, step
):
    before, after = Read(), Read()
    whole, lightning = trained(teacher, corpus, trainer, [before])
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trained(teacher, corpus, trainer, [Stop(step, tmp_path / "x.ckpt")])
    saved = str(tmp_path / "x.ckpt")
    resumed, again = trained(teacher, corpus, trainer, [after], ckpt_path=saved)
    assert after.batches == before.batches[-len(after.batches) :]
    assert again.global_step == lightning.global_step
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
