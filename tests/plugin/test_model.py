"""The NeMo model: real NeMo, real Lightning, real tiny Hugging Face models."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("nemo")

from lightning.pytorch import Callback, Trainer

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.families import families
from nemo_minitron.losses.divergences import Divergence
from nemo_minitron.losses.fused_linear_loss import LossWeights
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.plugin.experiment import manage
from nemo_minitron.plugin.knowledge_distillation import KnowledgeDistillation
from nemo_minitron.plugin.model import MinitronModel
from nemo_minitron.plugin.model_transform import ModelTransform
from nemo_minitron.plugin.nemo_archive import nemo_archive
from nemo_minitron.plugin.trainer import (
    Options,
    _apply,
    check_trainer,
    newest_checkpoint,
    train,
)
from nemo_minitron.plugin.transforms import DepthPruning
from nemo_minitron.proofs.tiny_models import tiny_model
from nemo_minitron.pruning.plan_file import Plan
from nemo_minitron.training.loss_guard import BadStep, Spikes
from nemo_minitron.training.preemption import Preempted
from nemo_minitron.training.sampler import ConsumedSampler, Schedule
from nemo_minitron.workspace.training_log import read_log
from tests.support.models import logits, make_model
from tests.support.nemo_training import EXP, OPTIM, recipe, run, timeless, tokens


def test_training_learns_and_logs(tmp_path):
    folder = make_model(tmp_path / "m", "nemotron")
    run(folder, tmp_path / "state", 30)
    lines = read_log(tmp_path / "state" / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 30
    assert losses[-1] < 0.6 * losses[0]
    assert [line["step"] for line in lines if "val_loss" in line] == list(range(2, 31, 2))
    rates = [line["lr"] for line in lines if "lr" in line]
    assert max(rates) == pytest.approx(2e-2)
    assert rates[-1] < 1e-3


DROPOUT = dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.3)


@pytest.mark.parametrize(
    ("accumulate", "family", "more"),
    [
        (1, "llama", {}),
        (2, "llama", {}),
        (2, "starcoder2", {}),
        (2, "llama", {"limit_train_batches": 4}),  # stopped in the second epoch
        (2, "llama", {"limit_train_batches": 1 / 3, "max_epochs": 5}),  # at the end of the first
    ],
)
def test_steps_done_in_two_parts_are_bit_for_bit_those_done_in_one(
    tmp_path, accumulate, family, more
):
    folder = make_model(tmp_path / "m", family, **(DROPOUT if family == "starcoder2" else {}))
    options = {"accumulate_grad_batches": accumulate, **more}
    whole = run(folder, tmp_path / "whole", 9, **options)
    if more:  # a limit alone changes nothing
        plain = run(folder, tmp_path / "plain", 9, accumulate_grad_batches=accumulate)
        assert timeless(tmp_path / "plain") == timeless(tmp_path / "whole")
        assert all(map(torch.equal, plain.model.parameters(), whole.model.parameters()))
    state = tmp_path / "parts"

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(folder, state, 9, [Stop()], **options)
    assert newest_checkpoint(state / "nemo" / "checkpoints").name.startswith("step=3")
    parts = run(folder, state, 9, **options)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name
    assert timeless(tmp_path / "whole") == timeless(state)


def test_a_training_goes_on_with_smaller_micro_batches_as_if_nothing_had_happened(tmp_path):
    """As after running out of memory: half of the samples at a time, twice as many times, the same steps."""
    folder = make_model(tmp_path / "m", "llama")
    whole = run(folder, tmp_path / "whole", 9)
    state = tmp_path / "parts"

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(folder, state, 9, [Stop()])
    smaller = recipe(9, accumulate_grad_batches=2, val_check_interval=4)
    parts = train(
        load_model(folder, dtype=torch.float32), read_config(folder), folder,
        dataclasses.replace(smaller, batch_size=2), tokens(), tokens(8, seed=1), state, (), frozenset(),
    )  # fmt: skip
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(value, parts.model.state_dict()[name], atol=2e-5), name
    before, after = timeless(tmp_path / "whole"), timeless(state)
    assert [line["step"] for line in after] == [line["step"] for line in before]
    losses = [
        [line["val_loss"] for line in lines if "val_loss" in line] for lines in (before, after)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("pattern", ["M*-M", "E*-M"])
def test_a_nemotron_h_as_on_the_hub_trains_saves_and_becomes_an_archive(tmp_path, pattern):
    """Its config.json says hybrid_override_pattern, which transformers takes and does not keep."""
    changes = {"hybrid_override_pattern": pattern}
    folder = tiny_model(families()["nemotron_h"], changes, tmp_path / "m")
    given = read_config(folder)
    hub = {
        key: value
        for key, value in given.items()
        if key not in ("layers_block_type", "layer_types")
    }
    (folder / "config.json").write_text(json.dumps({**hub, **changes}))
    assert "hybrid_override_pattern" not in load_model(folder).config.to_dict()
    model = run(folder, tmp_path / "state", 1)
    saved = tmp_path / "saved"
    saved.mkdir()
    model.save_hf(saved)
    assert read_config(saved)["hybrid_override_pattern"] == pattern
    with torch.inference_mode():
        expected = model.model.eval()(torch.arange(20)[None]).logits
    assert torch.equal(logits(saved), expected)
    model.save_to(str(tmp_path / "m.nemo"))
    DepthPruning(Plan("", {"layers": 4}, {}, (0, 1, 3), (2,), None, None, {}))(model.model)
    short = tmp_path / "short"
    short.mkdir()
    model.save_hf(short)
    assert "hybrid_override_pattern" not in read_config(short)
    assert open_checkpoint(short).architecture.sizes["layers"] == 3
    assert logits(short).shape == expected.shape


def test_a_validation_that_was_cut_off_is_made_up_for(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    options = {"val_check_interval": 3}  # where checkpoints are, too
    run(folder, tmp_path / "whole", 7, **options)
    state = tmp_path / "parts"

    class Stop(Callback):
        def on_validation_batch_start(self, trainer, *_):
            if trainer.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(folder, state, 7, [Stop()], **options)
    assert not [line for line in read_log(state / "metrics.jsonl") if "val_loss" in line]
    run(folder, state, 7, **options)
    assert timeless(tmp_path / "whole") == timeless(state)


def test_distillation_pulls_the_student_to_the_teacher_and_leaves_the_teacher_alone(tmp_path):
    teacher_folder = make_model(tmp_path / "teacher", "llama", seed=1)
    student_folder = make_model(
        tmp_path / "student", "llama", seed=2, hidden_size=12, num_hidden_layers=2
    )
    teacher = load_model(teacher_folder)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distillation = KnowledgeDistillation(
        teacher, families()["llama"], LossWeights(), chunk_tokens=16
    )
    model = run(student_folder, tmp_path / "state", 40, [distillation])
    lines = [
        line for line in read_log(tmp_path / "state" / "metrics.jsonl") if "divergence" in line
    ]
    assert lines[-1]["divergence"] < 0.5 * lines[0]["divergence"]
    assert lines[0]["loss"] == pytest.approx(lines[0]["divergence"])
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any("teacher" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("precision", "stored"),
    [("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32), ("64-true", torch.float64)],
)
def test_another_precision_distils_too(tmp_path, precision, stored):
    teacher = load_model(make_model(tmp_path / "teacher", "llama", seed=1), dtype=torch.bfloat16)
    student = make_model(tmp_path / "student", "llama", seed=2, hidden_size=12)
    distillation = KnowledgeDistillation(
        teacher, families()["llama"], LossWeights(1.0, 0.1, Divergence(temperature=2.0))
    )
    model = run(student, tmp_path / "state", 20, [distillation], precision=precision)
    lines = [
        line for line in read_log(tmp_path / "state" / "metrics.jsonl") if "divergence" in line
    ]
    assert lines[-1]["divergence"] < 0.8 * lines[0]["divergence"]
    (tmp_path / "hf").mkdir()
    model.save_hf(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {stored}
    assert read_config(tmp_path / "hf")["dtype"] == str(stored).removeprefix("torch.")


def test_distillation_refuses_another_vocabulary(tmp_path):
    teacher = load_model(make_model(tmp_path / "teacher", "llama", vocab_size=90))
    student = make_model(tmp_path / "student", "llama")
    with pytest.raises(ValueError, match="teacher has 90 entries, the student 96"):
        run(
            student,
            tmp_path / "state",
            2,
            [KnowledgeDistillation(teacher, families()["llama"], LossWeights())],
        )


def test_a_loss_that_is_not_finite_stops_the_training_before_it_is_saved(tmp_path):
    folder = make_model(tmp_path / "m", "llama")

    class Poison(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            if trainer.global_step == 4:
                with torch.no_grad():
                    module.model.lm_head.weight[0, 0] = float("nan")

    with pytest.raises(FloatingPointError, match="step 5"):
        run(folder, tmp_path / "state", 9, [Poison()])
    saved = torch.load(
        newest_checkpoint(tmp_path / "state" / "nemo" / "checkpoints"), weights_only=False
    )
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())


def test_nemo_archive_round_trips_with_tokenizer(tmp_path, teacher):
    model = MinitronModel.from_hf(teacher)
    path = nemo_archive(model, tmp_path / "model.nemo")
    restored = MinitronModel.restore_from(str(path), map_location="cpu")
    for name, value in model.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name])
    assert restored.side_files == model.side_files
    assert "tokenizer.json" in restored.side_files
    (tmp_path / "hf").mkdir()
    restored.save_hf(tmp_path / "hf")
    assert torch.equal(logits(tmp_path / "hf"), logits(teacher))
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (
        teacher / "tokenizer.json"
    ).read_bytes()


def test_the_config_is_carried_through_training_unchanged(tmp_path):
    import json

    folder = make_model(tmp_path / "m", "llama")
    config = read_config(folder)
    config["a_key_of_the_users"] = {"kept": [1, 2]}
    (folder / "config.json").write_text(json.dumps(config))
    model = run(folder, tmp_path / "state", 2)
    (tmp_path / "hf").mkdir()
    model.save_hf(tmp_path / "hf")
    written = read_config(tmp_path / "hf")
    assert {key: written[key] for key in config} == config
    assert set(load_file(tmp_path / "hf" / "model.safetensors")) == set(
        load_file(folder / "model.safetensors")
    )


def test_nemo_config_sets_up_data_by_itself(teacher, corpus):
    data = {
        "paths": [str(corpus)], "exclude": [], "format": "auto", "text_key": "text", "sequence_length": 16,
        "samples": 12, "seed": 0, "batch_size": 4, "tokenizer": str(teacher),
    }  # fmt: skip
    trainer = Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    model = MinitronModel.from_hf(
        teacher, OPTIM, trainer=trainer, train_ds=data, validation_ds=data
    )
    trainer.fit(model)
    assert trainer.global_step == 2
    assert torch.isfinite(trainer.callback_metrics["val_loss"])


def test_the_sampler_depends_on_seed_and_consumption_alone():
    def batches(consumed, rank=0, world=1, size=2):
        schedule = Schedule(consumed, 20, 20, rank, world)
        return list(ConsumedSampler(10, size, lambda: schedule, 7))

    assert batches(0)[6:] == batches(6)
    assert len(ConsumedSampler(10, 2, lambda: Schedule(6, 20, 20), 7)) == 20
    assert sorted(i for batch in batches(0)[:5] for i in batch) == list(range(10))
    assert batches(0)[:5] != batches(0)[5:10]
    # two ranks together see what one rank of twice the batch sees
    two = [a + b for a, b in zip(batches(0, 0, 2), batches(0, 1, 2), strict=True)]
    assert two[:10] == batches(0, size=4)[:10]


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"max_stepz": 3}, "trainer.max_stepz.*nearest: max_steps"),
        ({"max_steps": -1}, "expected a positive whole"),
        ({"max_steps": 3, "devices": 8}, "trains on one device, found 8"),
        (
            {"max_steps": 3, "accumulate_grad_batches": 2, "limit_train_batches": 0.5},
            "a multiple of accumulate_grad_batches=2, such as 2, found 0.5, which is 3 of 6 micro-batches",
        ),
        ({"max_steps": 3, "limit_train_batches": 0.1}, "found 0.1, which is 0 of 3 micro-batches"),
    ],
)
def test_trainer_keys_are_checked_first(trainer, message):
    with pytest.raises(ValueError, match=message):
        check_trainer(trainer)


def test_model_transform_is_applied_once_before_the_optimiser(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    calls = []

    class Once(ModelTransform):
        def setup(self, trainer, pl_module, stage):
            pl_module.model_transform = lambda model: calls.append(model) or model
            super().setup(trainer, pl_module, stage)
            super().setup(trainer, pl_module, stage)

    run(folder, tmp_path / "state", 1, [Once()])
    assert len(calls) == 1


def weights(model):
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def test_a_spike_is_not_learned_from_and_the_rest_is_as_if_it_had_never_come(tmp_path):
    folder = make_model(tmp_path / "m", "llama")

    class Spoil(Callback):
        """Makes one batch's loss a spike."""

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 6 and not skipped:
                with torch.no_grad():
                    module.model.lm_head.weight *= 30

    skipped: frozenset[int] = frozenset()
    options = Options(spikes=Spikes(3.0, 3))
    with pytest.raises(BadStep, match="a spike: the last 3 steps") as raised:
        run(folder, tmp_path / "state", 9, [Spoil()], options=options)
    assert raised.value.step == 6
    skipped = frozenset([6])
    rest = run(folder, tmp_path / "state", 9, [Spoil()], skipped, options=options)
    without = run(folder, tmp_path / "other", 9, [], skipped, options=options)
    plain = run(folder, tmp_path / "plain", 9)
    assert all(torch.equal(value, weights(without)[name]) for name, value in weights(rest).items())
    assert not all(
        torch.equal(value, weights(plain)[name]) for name, value in weights(rest).items()
    )


def test_what_counts_as_usual_is_remembered_by_checkpoints(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    run(folder, tmp_path / "state", 3, options=Options(spikes=Spikes(3.0, 3)))
    saved = torch.load(
        newest_checkpoint(tmp_path / "state" / "nemo" / "checkpoints"), weights_only=False
    )
    losses = [
        line["loss"] for line in read_log(tmp_path / "state" / "metrics.jsonl") if "loss" in line
    ]
    assert saved["callbacks"]["LossGuard"]["losses"] == pytest.approx(losses)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_is_validated_resumed_and_comes_out(tmp_path, accumulate):
    folder = make_model(tmp_path / "m", "llama")
    seen = []

    class Watch(Callback):
        def on_train_start(self, trainer, module):
            seen.append(weights(module))

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if (batch_idx + 1) % accumulate == 0:
                seen.append(weights(module))

    options = {"options": Options(ema_decay=0.5), "accumulate_grad_batches": accumulate}
    model = run(folder, tmp_path / "whole", 7, [Watch()], **options)
    expected = seen[0]
    for step in seen[1:]:
        expected = {name: 0.5 * value + 0.5 * step[name] for name, value in expected.items()}
    result = weights(model)
    for name, value in expected.items():
        assert torch.allclose(result[name], value, atol=1e-6), name

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(folder, tmp_path / "parts", 7, [Stop()], **options)
    parts = weights(run(folder, tmp_path / "parts", 7, **options))
    assert all(torch.equal(value, parts[name]) for name, value in result.items())
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")


def test_an_average_in_bfloat16_moves_by_thousandths(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    before = load_model(folder, dtype=torch.float32).state_dict()
    model = run(
        folder, tmp_path / "state", 20, precision="bf16-true", options=Options(ema_decay=0.99)
    )
    after = weights(model)
    moved = [
        (after[name].float() != value.bfloat16().float()).float().mean()
        for name, value in before.items()
    ]
    assert sum(moved) / len(moved) > 0.3


def test_an_average_of_weights_in_parts_is_refused():
    with pytest.raises(ValueError, match=r"training\.ema_decay: not with training\.parallel=shard"):
        settings = recipe(1, Options(ema_decay=0.9, shard=True))
        _apply(settings, None, torch.device("cpu"), None, None)


def test_nemo_leaves_the_signals_to_us_on_a_gpu_too(tmp_path, monkeypatch):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    manage(trainer, recipe(1).exp_manager, tmp_path)
    assert "PreemptionCallback" not in [type(callback).__name__ for callback in trainer.callbacks]


@pytest.mark.parametrize("norm", [None, 0.5])
def test_every_learned_token_weighs_the_same_however_a_step_is_cut(tmp_path, norm):
    folder = make_model(tmp_path / "m", "llama")
    samples = tokens()
    for row, sample in enumerate(samples):
        read = (5 * row) % 17  # so many tokens are read only, of some samples all but one
        sample[1:][:read] = ~sample[1:][:read]
    found = []
    for batch_size, accumulate in ((4, 1), (1, 4)):
        state = tmp_path / f"by-{batch_size}"
        state.mkdir()
        more = {
            "accumulate_grad_batches": accumulate,
            "gradient_clip_val": norm,
            "val_check_interval": 3 * accumulate,
        }
        cut = recipe(3, **more)
        # not Adam, which makes whole steps of the noise in gradients that are next to nothing
        cut = dataclasses.replace(cut, batch_size=batch_size, optim={"name": "sgd", "lr": 0.1})
        model = load_model(folder, dtype=torch.float32)
        train(model, read_config(folder), folder, cut, samples, samples[:8], state, (), frozenset())
        found.append(
            (
                model.state_dict(),
                [x["val_loss"] for x in read_log(state / "metrics.jsonl") if "val_loss" in x],
                [x["loss"] for x in read_log(state / "metrics.jsonl") if "loss" in x],
            )
        )
    for name, value in found[0][0].items():
        assert torch.allclose(found[1][0][name], value, atol=1e-5), name
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5) and found[0][1]
    assert (
        found[1][2] == pytest.approx(found[0][2], rel=1e-5) and found[0][2]
    )  # of the step, not of its last part


def test_nemos_own_average_is_refused_because_it_never_comes_out(tmp_path, monkeypatch):
    monkeypatch.setitem(EXP, "ema", {"enable": True})
    with pytest.raises(ValueError, match=r"use training\.ema_decay"):
        run(make_model(tmp_path / "m", "llama"), tmp_path / "state", 1)


def test_activation_checkpointing_changes_nothing_but_cost(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    plain = weights(run(folder, tmp_path / "plain", 3))
    options = Options(activation_checkpointing=True)
    checked = weights(run(folder, tmp_path / "checked", 3, options=options))
    assert all(torch.equal(value, checked[name]) for name, value in plain.items())


@pytest.mark.slow  # the C++ compiler's minute; tests/training/test_compilation.py has all but code of its making
def test_compiling_changes_nothing_but_cost(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    plain = weights(run(folder, tmp_path / "plain", 3))
    compiled = weights(run(folder, tmp_path / "compiled", 3, options=Options(compile="on")))
    assert all(torch.allclose(value, compiled[name], atol=1e-4) for name, value in plain.items())
    # it was compiled
    assert not all(torch.equal(value, compiled[name]) for name, value in plain.items())


def test_the_log_tells_throughput_and_the_teachers_loss_once(tmp_path):
    teacher = load_model(make_model(tmp_path / "teacher", "llama", seed=1))
    student = make_model(tmp_path / "student", "llama", seed=2, hidden_size=12)
    distillation = KnowledgeDistillation(teacher, families()["llama"], LossWeights())
    run(student, tmp_path / "state", 4, [distillation], options=Options(peak_tflops=0.001))
    lines = read_log(tmp_path / "state" / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    for line in steps:
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.001, rel=1e-3)
        flops = line["tflops"] * 1e12 / line["tokens_per_second"]
        assert flops == pytest.approx(
            model_flops(teacher) + 3 * model_flops(load_model(student)), rel=0.3
        )
    told = [line["teacher_val_loss"] for line in lines if "teacher_val_loss" in line]
    held = tokens(8, seed=1)
    with torch.no_grad():
        logits_TV = teacher(input_ids=held[:, :-1]).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits_TV, held[:, 1:].flatten())
    assert told == [pytest.approx(float(expected), rel=1e-5)]


def model_flops(model):
    """Two per weight that multiplies, without attention."""
    return 2 * sum(
        p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name
    )


def test_tensorboard_gets_losses_and_throughput(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setitem(EXP, "create_tensorboard_logger", True)
    run(make_model(tmp_path / "m", "llama"), tmp_path / "state", 3)
    events = EventAccumulator(str(tmp_path / "state" / "nemo"))
    events.Reload()
    assert {"train_loss", "val_loss", "tokens_per_second", "tflops", "tokens"} <= set(
        events.Tags()["scalars"]
    )


def test_what_is_not_to_be_learned_is_read_and_gives_no_loss(tmp_path):
    model = MinitronModel.from_hf(make_model(tmp_path / "m", "llama"))
    batch_BS = tokens(2, 9)
    marked_BS = batch_BS.clone()
    marked_BS[:, :4] = ~marked_BS[:, :4]
    marked_BS[1, 6] = ~marked_BS[1, 6]
    found = model.evaluate_objective(marked_BS).loss
    logits_BSV = model.model(input_ids=batch_BS[:, :-1]).logits
    losses_BS = torch.nn.functional.cross_entropy(
        logits_BSV.transpose(1, 2), batch_BS[:, 1:], reduction="none"
    )
    assert torch.allclose(found, losses_BS[marked_BS[:, 1:] >= 0].mean(), atol=1e-5)
    nothing = model.evaluate_objective(~batch_BS)
    assert float(nothing.loss.detach()) == 0


def test_what_signals_have_left_goes_when_the_training_goes_on(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    state = tmp_path / "state"

    class Stop(Callback):
        def __init__(self, step):
            self.step = step

        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == self.step - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    for step in (4, 5, 7, 8):
        with pytest.raises(Preempted):
            run(folder, state, 9, [Stop(step)])
        checkpoints = state / "nemo" / "checkpoints"
        assert newest_checkpoint(checkpoints).name == f"step={step}.ckpt"
        # that, the one it went on from, and the last that was due
        assert len(list(checkpoints.glob("*.ckpt"))) <= 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_ends_the_training_behind_the_step(tmp_path):
    class Finaliser:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)  # "Exception ignored in ..."

    class Press(Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append(trainer.global_step)
            if trainer.global_step == 3:
                Finaliser()

    seen, before = [], signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            run(make_model(tmp_path / "m", "llama"), tmp_path / "state", 9, [Press()])
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [0, 1, 2, 3]


def test_an_argument_that_the_optimiser_does_not_take_is_named_with_what_removes_it(tmp_path):
    given = dataclasses.replace(recipe(2), optim={**OPTIM, "name": "sgd", "betas": [0.9, 0.95]})
    folder = make_model(tmp_path / "m", "llama")
    model, samples = load_model(folder, dtype=torch.float32), tokens()
    with pytest.raises(ValueError, match=r"^optim.betas: sgd takes no .*'~optim.betas' removes it"):
        train(model, read_config(folder), folder, given, samples, samples[:8], tmp_path / "state")
