"""Every stage that computes, on an accelerator: nothing is left on another device, and the numbers stay."""

import contextlib
import shutil

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("nemo")

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.config.compose import load_config
from nemo_minitron.distillation.teacher_logits_pass import Kept, teach
from nemo_minitron.evaluation.report import read_report
from nemo_minitron.evaluation.speed import Case, _measure
from nemo_minitron.families import Architecture, families
from nemo_minitron.losses import wide_matmul
from nemo_minitron.losses.fused_linear_loss import LossWeights, fused_linear_loss
from nemo_minitron.losses.intermediate import IntermediateWeights
from nemo_minitron.losses.projection import Projection
from nemo_minitron.models.causal_lm import head_of, load_model
from nemo_minitron.proofs.tiny_models import tiny_model
from nemo_minitron.scoring.hooks import Measures
from nemo_minitron.scoring.importance import AGGREGATIONS
from nemo_minitron.scoring.pass_in_memory import in_memory
from nemo_minitron.stages.run import run_stage
from nemo_minitron.workspace.training_log import read_log
from tests.support import accelerator
from tests.support.accelerator import DEVICE, NAME
from tests.support.chosen_families import READ
from tests.support.models import make_model
from tests.support.nemo_training import ALL, distillation
from tests.support.nemo_training import run as trained
from tests.support.runs import settings
from tests.support.text_samples import padded

THERE = [
    f"score.device={NAME}",
    f"evaluate.device={NAME}",
    f"trainer.accelerator={NAME}",
    f"trainer.strategy={NAME}",
]
SMALL = [
    "evaluate.speed=false", "evaluate.prompts=2", "evaluate.written_tokens=4", "evaluate.task_limit=8"
]  # fmt: skip
FEW = ["trainer.max_steps=4", "trainer.val_check_interval=4"]
INSIDE = [
    "distill.intermediate.terms=[embedding,hidden,mlp_input,attention]", "distill.intermediate.relation_heads=2",
    "distill.intermediate.layers=['-1:-1']",
]  # fmt: skip


@pytest.fixture
def both(tmp_path, teacher, corpus):
    """Runs stages on the CPU and on the accelerator; the workspaces."""

    def run(stages, *words, start=None):
        places = []
        for name, more in (("here", []), ("there", THERE)):
            place = tmp_path / name
            if start is not None:
                shutil.copytree(start, place)
            config = load_config("config", [*settings(place, teacher, corpus), *words, *more])
            with accelerator.accelerator() if more else contextlib.nullcontext():
                before = accelerator.operations
                for stage in stages:
                    run_stage(stage, config)
                assert not more or accelerator.operations > before + 1000
            places.append(place)
        return places

    return run


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, teacher, corpus):
    place = tmp_path_factory.mktemp("pruned") / "run"
    config = load_config("config", settings(place, teacher, corpus))
    for stage in ("download", "score", "plan", "prune"):
        run_stage(stage, config)
    return place


def scores(place):
    return load_file(place / "scores" / "scores.safetensors")


def curve(place, *names):
    return [
        line[name]
        for line in read_log(place / "student" / "metrics.jsonl")
        for name in names
        if name in line
    ]


def test_refuses_to_mix_as_a_gpu_does():
    with accelerator.accelerator():
        one = torch.ones(3, device=DEVICE)
        assert (one + 1).device == DEVICE and (one * 2).sum().item() == 6
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            one + torch.ones(3)
        assert torch.equal((one + torch.ones(3).to(DEVICE)).cpu(), torch.full((3,), 2.0))


def test_scores_cuts_trains_and_evaluates_as_on_the_cpu(both):
    here, there = both(["download", "score", "plan", "prune", "distill", "evaluate"], *SMALL, *FEW)
    for name, value in scores(here).items():
        torch.testing.assert_close(scores(there)[name], value, rtol=1e-4, atol=1e-5)
    assert curve(there, "loss", "val_loss") == pytest.approx(
        curve(here, "loss", "val_loss"), rel=1e-4
    )
    ours, theirs = read_report(here / "report")["models"], read_report(there / "report")["models"]
    for name in ("teacher", "pruned", "student"):
        assert theirs[name]["loss"] == pytest.approx(ours[name]["loss"], rel=1e-4)
        for task, values in ours[name]["tasks"].items():
            assert theirs[name]["tasks"][task] == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize(
    "words",
    [
        ["score.streaming=on", "score.depth=lm_loss", "score.blocks=[2]", "score.aggregation.also=[l2,var]",
         "score.neurons=pre_activation"],
        ["score.depth=task", "score.tasks=[held_out_choice]", "score.task_limit=8", "score.iterations=2"],
    ],
)  # fmt: skip
def test_every_way_to_score(both, words):
    here, there = both(["download", "score"], *words)
    found, expected = scores(there), scores(here)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "tolerance"),
    [
        ([*INSIDE, "distill.divergence=jsd", "distill.ce=0.5", "training.ema_decay=0.9"], 1e-4),
        ([*INSIDE, "distill.teacher_place=cpu", "distill.teacher_dtype=int8", "trainer.gradient_clip_val=0.5"], 1e-3),
        ([*INSIDE, "distill.teacher_place=offload"], 1e-4),
        (["training.activation_checkpointing=true", "distill.divergence=topk_kl",
          "distill.top_k=8", "trainer.accumulate_grad_batches=2"], 2e-2),
        (["trainer.precision=bf16-true", "distill.divergence=reverse_kl", "distill.temperature=2"], 2e-2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("widens", [False, True])
def test_every_way_to_distil(both, pruned, monkeypatch, words, tolerance, widens):
    low = "trainer.precision" in words[0]
    if widens and not low:
        pytest.skip("float32 stays as it is")
    if widens:
        monkeypatch.setattr(wide_matmul, "WIDENS", {NAME})
    here, there = both(["distill"], *FEW, *words, start=pruned)
    found, expected = curve(there, "loss", "val_loss"), curve(here, "loss", "val_loss")
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_without_float64(both, pruned, monkeypatch):
    monkeypatch.setattr(accelerator, "narrow", True)
    monkeypatch.setattr(wide_matmul, "NARROW", {NAME})
    here, there = both(["distill", "evaluate"], *SMALL, *FEW, *INSIDE, start=pruned)
    assert curve(there, "loss", "val_loss") == pytest.approx(
        curve(here, "loss", "val_loss"), rel=1e-4
    )


def test_scores_without_float64(both, monkeypatch):
    monkeypatch.setattr(accelerator, "narrow", True)
    monkeypatch.setattr(wide_matmul, "NARROW", {NAME})
    here, there = both(["download", "score"], "score.depth=lm_loss", "score.blocks=[2]")
    for name, value in scores(here).items():
        torch.testing.assert_close(scores(there)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", READ)
def test_every_family_is_scored_and_taught(tmp_path, monkeypatch, name):
    monkeypatch.setattr(accelerator, "narrow", True)  # the least that a device can do
    monkeypatch.setattr(wide_matmul, "NARROW", {NAME})
    family = families()[name]
    folder = tiny_model(family, family.proofs[0], tmp_path / "m")
    checkpoint, found = open_checkpoint(folder), []
    attended = Architecture(family, read_config(folder)).present["heads"][0]
    latent = "latent" in family.axes  # queries and keys made of latents: no relations to compare
    terms = tuple(term for term in ALL if not (latent and term == "attention"))
    inside = IntermediateWeights(terms, layers=((attended, attended),), relation_heads=2, alpha=1.0)
    for place, device in (("here", torch.device("cpu")), ("there", DEVICE)):
        with accelerator.accelerator() if device == DEVICE else contextlib.nullcontext():
            model = load_model(folder, torch.float32, device)
            calibration = in_memory(
                model,
                checkpoint,
                padded(),
                [[0, 1], [2, 3]],
                Measures(AGGREGATIONS, influence=(1,)),
            )
            where = {"accelerator": NAME, "strategy": NAME} if device == DEVICE else {}
            teacher = distillation(folder, inside, name, LossWeights(1.0, 1.0))
            trained(folder, tmp_path / place, 2, [teacher], **where)
        losses = [
            line["loss"] for line in read_log(tmp_path / place / "metrics.jsonl") if "loss" in line
        ]
        found.append(({key: sums.total for key, sums in calibration.sums.items()}, losses))
    (ours, our_losses), (theirs, their_losses) = found
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-4, atol=1e-5)
    assert their_losses[0] == pytest.approx(our_losses[0], rel=1e-4)
    assert their_losses[1] == pytest.approx(our_losses[1], rel=5e-2)


@pytest.mark.parametrize("method", ["top_k", "sampling"])
def test_a_teacher_s_logits_are_written_down_and_learned_from(tmp_path, method):
    folder = make_model(tmp_path / "m", "llama")
    samples_NS, found = torch.arange(2 * 9).reshape(2, 9), []
    for device in (torch.device("cpu"), DEVICE):
        with accelerator.accelerator():
            model = load_model(folder, torch.float32, device)
            assert head_of(model).device == device
            kept = Kept(method, 5, 1.0, seed=0)
            targets, _ = teach(
                model, families()["llama"], samples_NS, [0, 1], kept, 2, lambda _: None
            )
            assert targets.ids_TK.device.type == "cpu"
            states_TH = torch.ones(16, head_of(model).shape[1]).to(device)
            labels_T = torch.arange(16).to(device)
            student = Projection(states_TH, head_of(model))
            terms = fused_linear_loss(
                student, labels_T, LossWeights(), targets.to(device), chunk_tokens=4
            )
        found.append((targets.ids_TK, float(terms.loss)))
    assert torch.equal(found[0][0], found[1][0]) and found[1][1] == pytest.approx(
        found[0][1], rel=1e-5
    )


def test_speed_is_measured(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    with accelerator.accelerator():
        found = _measure(folder, NAME, [Case(2, 8, 3)])
    assert found["cases"][0]["decode_tokens_per_second"] > 0
