"""The papers' recipes, by their numbers and run whole on models of the same shape, 32 times as narrow."""

import math
import shutil

import pytest

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config.compose import load_config
from nemo_minitron.evaluation.report import read_report
from nemo_minitron.families import Architecture, families
from nemo_minitron.pruning.cost import model_size
from nemo_minitron.pruning.plan_file import read_plan
from nemo_minitron.pruning.target_sizes import target_sizes
from nemo_minitron.stages.run import run_stage
from nemo_minitron.workspace.layout import Workspace, metrics_in
from nemo_minitron.workspace.manifest import read_manifest
from nemo_minitron.workspace.training_log import read_log
from tests.support.models import make_model

SCALE = 32
"""What widths are divided by; heads, KV groups and layers that are dropped by number stay as many."""
NEMOTRON = {
    "model_type": "nemotron", "vocab_size": 256000, "hidden_size": 6144, "intermediate_size": 24576,
    "num_hidden_layers": 32, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
    "hidden_act": "relu2", "tie_word_embeddings": False,
}  # fmt: skip
MINITRON_8B = {**NEMOTRON, "hidden_size": 4096, "intermediate_size": 16384}
LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": False,
}  # fmt: skip
MISTRAL_NEMO = {
    "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 14336,
    "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": False, "sliding_window": None,
}  # fmt: skip
P1, P2 = {"lr": 2e-4, "min": 4.5e-7, "warm": 40, "context": 4096}, {"lr": 1e-4, "context": 8192}
RECIPES = {
    # source, sizes afterwards, billions of parameters, settings, samples in a step, billions of tokens
    "minitron_8b": (NEMOTRON, {"hidden": 4096, "ffn": 16384, "heads": 48}, 8.272, P1, 1152, 94),
    "minitron_4b": (MINITRON_8B, {"hidden": 3072, "ffn": 9216, "heads": 24}, 4.191, P1, 1152, 94),
    "llama3.1_4b_width": (LLAMA, {"hidden": 3072, "ffn": 9216, "heads": 32}, 4.513,
                          {**P2, "min": 1e-5, "warm": 40}, 1152, 94),
    "llama3.1_4b_depth": (LLAMA, {"hidden": 4096, "ffn": 14336, "layers": 16}, 4.540,
                          {**P2, "min": 1e-5, "warm": 40}, 1152, 94),
    "mistral_nemo_8b": (MISTRAL_NEMO, {"hidden": 4096, "ffn": 11520, "layers": 40}, 8.414,
                        {**P2, "min": 4.5e-7, "warm": 60}, 768, 380),
}  # fmt: skip
"""[P1] tables 2 and 3, section 4; [P2] tables 1 and 2."""


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_the_papers_numbers(name):
    source, sizes, billions, settings, batch, tokens = RECIPES[name]
    config = load_config("config", [f"recipe={name}"])
    model = Architecture(families()[source["model_type"]], source)
    targets = target_sizes(model, config.plan)
    assert {axis: targets[axis] for axis in sizes} == sizes
    assert {axis: targets[axis] for axis in ("kv_heads", "head_dim", "vocab")} == {
        "kv_heads": 8, "head_dim": 128, "vocab": source["vocab_size"],
    }  # fmt: skip
    assert round(model_size(model.resized(targets)).parameters / 1e9, 3) == billions
    rate, trainer = config.optim, config.trainer
    assert (rate["lr"], rate["sched"]["min_lr"], rate["sched"]["warmup_steps"]) == (
        settings["lr"], settings["min"], settings["warm"],
    )  # fmt: skip
    assert rate["sched"]["name"] == "CosineAnnealing" and rate["name"] == "adamw"
    lengths = {
        getattr(config.data, part).sequence_length
        for part in ("train", "calibration", "validation")
    }
    assert lengths == {settings["context"]}
    assert trainer["accumulate_grad_batches"] * config.distill.batch_size == batch
    trained = trainer["max_steps"] * batch * settings["context"] / 1e9
    assert trained == pytest.approx(tokens, rel=0.01)
    # importance: 1024 samples, l2 over samples of the mean over positions; logits alone teach
    how = config.score.aggregation
    assert (config.score.importance, how.batch, how.sequence) == ("activation", "l2", "mean")
    assert config.data.calibration.samples == 1024
    assert (config.distill.divergence, config.distill.kl, config.distill.ce) == ("forward_kl", 1, 0)
    assert config.distill.temperature == 1 and config.distill.intermediate.terms == []


def test_the_teacher_of_mistral_nemo_is_corrected_first():
    config = load_config("config", ["recipe=mistral_nemo_8b"])
    own = config.correct
    assert own.enabled and own.optim["sched"]["warmup_steps"] == 120
    assert own.optim["lr"] == pytest.approx(config.optim["lr"] / 5)
    batch = config.trainer["accumulate_grad_batches"] * own.batch_size
    assert own.trainer["max_steps"] * batch * 8192 / 1e9 == pytest.approx(100, rel=0.01)


def narrow(folder, config, tokenizer, layers):
    """A model of the same shape, its widths divided, with a small vocabulary."""
    widths = {key: config[key] // SCALE for key in ("hidden_size", "intermediate_size", "head_dim")}
    own = {key: value for key, value in config.items() if key != "model_type"}
    own |= {**widths, "vocab_size": 300, "num_hidden_layers": layers}
    make_model(folder, config["model_type"], **own)
    for path in tokenizer.iterdir():
        shutil.copy(path, folder)
    return folder


def rates(steps, warm, lr, least):
    """Of every step but the first, whose rate is the first of these: linear to the peak, then half a cosine."""
    for step in range(1, steps + 1):
        if step < warm:
            yield lr * (step + 1) / (warm + 1)
        else:
            yield (
                least + (lr - least) * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
            )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_whole_on_a_model_of_its_shape(name, tmp_path, tokenizer_folder, corpus):
    source, sizes, _, settings, _, _ = RECIPES[name]
    layers = source["num_hidden_layers"] if "layers" in sizes and sizes["layers"] == 16 else 4
    model = narrow(tmp_path / "model", source, tokenizer_folder, layers)
    plan = load_config("config", [f"recipe={name}"]).plan
    steps, warm = 5, 2
    overrides = [
        f"recipe={name}", f"workspace={tmp_path / 'ws'}", f"source.model={model}", f"data.train.paths=['{corpus}']",
        *(f"plan.{axis}={getattr(plan, axis) // SCALE}" for axis in ("hidden", "ffn") if getattr(plan, axis)),
        *(f"data.{part}.sequence_length={settings['context'] // 512}" for part in ("train", "calibration", "validation")),
        "data.holdout=0.2", "data.calibration.samples=16", "data.validation.samples=8", "score.batch_size=8",
        f"trainer.max_steps={steps}", "trainer.accumulate_grad_batches=2", "trainer.accelerator=cpu",
        f"optim.sched.warmup_steps={warm}", "correct.trainer.max_steps=3", "correct.optim.sched.warmup_steps=1",
        "training.validate_every=5", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false",
        "evaluate.from_scratch=false", "evaluate.prompts=0", "evaluate.speed=false", "evaluate.tasks=[]",
    ]  # fmt: skip
    teacher = None
    if name == "minitron_4b":  # pruned from the 8B, taught by the 15B
        teacher = narrow(tmp_path / "teacher", NEMOTRON, tokenizer_folder, layers)
        overrides.append(f"distill.teacher={teacher}")
    config = load_config("config", overrides)
    corrected = ["correct"] if config.correct.enabled else []
    # the check of an export in a clean process takes as long as all else: once is enough
    last = ["export"] if name == "mistral_nemo_8b" else []
    for stage in ("download", *corrected, "score", "plan", "prune", "distill", "evaluate", *last):
        run_stage(stage, config)
    place = Workspace(tmp_path / "ws")
    result = open_checkpoint(place.export if last else place.student / "hf").architecture
    expected = {axis: sizes[axis] // (SCALE if axis in ("hidden", "ffn") else 1) for axis in sizes}
    if name == "mistral_nemo_8b":
        expected["layers"] = layers  # all stay
    assert {axis: result.sizes[axis] for axis in expected} == expected
    assert result.sizes["kv_heads"] == 8 and result.sizes["head_dim"] == 128 // SCALE
    if name == "llama3.1_4b_depth":
        assert read_plan(place.plan).layers_dropped == tuple(range(15, 31))
    # who was scored and pruned, and who taught
    cut = "correct" if corrected else "teacher"
    assert read_manifest(place.scores).inputs[0].path == cut
    assert read_manifest(place.pruned).inputs[0].path == cut
    taught = [item.path for item in read_manifest(place.student).inputs]
    assert taught[0] == "pruned" and taught[-1] == (str(teacher) if name == "minitron_4b" else cut)
    # context, aggregation and the rate of every step
    rows = [line["tokens"] for line in read_log(metrics_in(place.student)) if "lr" in line]
    assert rows == [2 * settings["context"] // 512 * (step + 1) for step in range(steps)]
    found = [line["lr"] for line in read_log(metrics_in(place.student)) if "lr" in line]
    assert found == pytest.approx([*rates(steps, warm, settings["lr"], settings["min"])])
    scored = read_manifest(place.scores).config
    assert scored["calibration"]["sequence_length"] == settings["context"] // 512
    report = read_report(place.report)["models"]
    assert set(report) == {"teacher", "pruned", "student"}
    assert report["student"]["parameters"] == model_size(result).parameters
