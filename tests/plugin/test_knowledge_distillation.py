"""Distillation by hidden states: real NeMo, real Lightning, real tiny Hugging Face models."""

import pytest
import torch

pytest.importorskip("nemo")

from lightning.pytorch import Callback

from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.families import Architecture, families
from nemo_minitron.losses.fused_linear_loss import LossWeights
from nemo_minitron.losses.intermediate import IntermediateWeights
from nemo_minitron.models.captures import Captures
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.plugin.knowledge_distillation import KnowledgeDistillation
from nemo_minitron.plugin.trainer import newest_checkpoint
from nemo_minitron.workspace.training_log import read_log
from tests.support.chosen_families import READ
from tests.support.models import make_model
from tests.support.nemo_training import ALL, distillation, run


@pytest.mark.parametrize("checkpointing", [False, True])
def test_captured_states_are_those_that_transformers_gives_out(tmp_path, checkpointing):
    folder = make_model(tmp_path / "m", "llama", num_hidden_layers=3)
    model = load_model(folder)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    captures = Captures(
        model, Architecture(families()["llama"], model.config.to_dict()), ALL, [0, -1]
    )
    tokens_BS = torch.randint(0, 90, (2, 7))
    given = model(input_ids=tokens_BS, output_hidden_states=True, use_cache=False)
    found = captures.take()
    layers = model.model.layers
    assert torch.equal(found["embedding", 0, 0], given.hidden_states[0])
    assert torch.allclose(found["hidden", 0, 0], layers[1].input_layernorm(given.hidden_states[1]))
    assert torch.equal(
        found["hidden", 2, 0], given.hidden_states[3]
    )  # transformers' last is behind the norm
    query_BSU = layers[2].self_attn.q_proj(layers[2].input_layernorm(given.hidden_states[2]))
    assert torch.allclose(found["attention", 2, 0], query_BSU, atol=1e-6)
    assert {place[2] for place in found if place[0] == "attention"} == {0, 1, 2}
    attended = (
        given.hidden_states[0]
        + layers[0].self_attn(
            layers[0].input_layernorm(given.hidden_states[0]),
            position_embeddings=model.model.rotary_emb(
                given.hidden_states[0], torch.arange(7)[None]
            ),
            attention_mask=None,
        )[0]
    )
    assert torch.allclose(
        found["mlp_input", 0, 0], layers[0].post_attention_layernorm(attended), atol=1e-6
    )
    sum(state.square().mean() for state in found.values()).backward()
    assert captures.states == {}  # layers that run again in the backward pass leave nothing
    assert layers[2].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_fused_projections_are_taken_apart(tmp_path):
    model = load_model(make_model(tmp_path / "m", "phi3"))
    captures = Captures(
        model, Architecture(families()["phi3"], model.config.to_dict()), ["attention"], [0]
    )
    model(input_ids=torch.randint(0, 90, (1, 5)), use_cache=False)
    found = captures.take()
    whole = torch.cat([found["attention", 0, n] for n in range(3)], -1)
    assert whole.shape[-1] == model.model.layers[0].self_attn.qkv_proj.out_features


LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FITTING = {
    "deepseek_v3": {
        **ROUTED,
        "num_key_value_heads": 6,
        "head_dim": 64,  # of what is rotated
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
    },
    "glm4_moe": ROUTED,
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 8,
        "mamba_d_head": 6,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 8,
    },
    "falcon_h1": {
        "mamba_d_ssm": 48,
        "mamba_n_heads": 8,
        "mamba_d_head": 6,
        "mamba_n_groups": 2,
        "mamba_d_state": 10,
        "mamba_chunk_size": 8,
    },
    "nemotron_h": {"chunk_size": 8},
    "qwen3_next": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
}
"""What some families need beside the usual tiny sizes."""


@pytest.mark.parametrize("name", READ)
def test_every_family_distils_by_hidden_states(tmp_path, name):
    teacher = make_model(tmp_path / "teacher", name, seed=1, **FITTING.get(name, {}))
    attended = Architecture(families()[name], read_config(teacher)).present["heads"][0]
    weights = IntermediateWeights(ALL, layers=((attended, attended),), relation_heads=2)
    model = run(
        teacher,
        tmp_path / "state",
        2,
        [distillation(teacher, weights, name, LossWeights(1.0, 1.0))],
    )
    lines = [
        line for line in read_log(tmp_path / "state" / "metrics.jsonl") if "intermediate" in line
    ]
    assert lines[0]["intermediate"] == pytest.approx(0, abs=1e-4)  # the student is the teacher
    assert lines[1]["intermediate"] > 0
    assert not hasattr(model, "projection")


@pytest.mark.parametrize("kept", [False, True])
def test_hidden_states_come_closer_and_the_projection_is_learned_but_not_kept(tmp_path, kept):
    teacher = make_model(tmp_path / "teacher", "llama", seed=1, num_hidden_layers=3)
    student = make_model(tmp_path / "student", "llama", seed=2, hidden_size=12, num_hidden_layers=2)
    weights = IntermediateWeights(ALL, layers=((-2, -1),), relation_heads=2)
    kept_H = torch.arange(12) + 2 if kept else None
    callback = distillation(teacher, weights, kept_H=kept_H)
    seen = []

    class Look(Callback):
        def on_train_start(self, trainer, module):
            seen.append(module.projection.weight.detach().clone())

        def on_train_end(self, trainer, module):
            seen.append(module.projection.weight.detach().clone())

    model = run(student, tmp_path / "state", 30, [callback, Look()])
    lines = [
        line for line in read_log(tmp_path / "state" / "metrics.jsonl") if "intermediate" in line
    ]
    assert lines[-1]["intermediate"] < 0.9 * lines[0]["intermediate"]
    assert lines[-1]["divergence"] < 0.8 * lines[0]["divergence"]
    for line in lines:
        assert line["alpha"] == pytest.approx(line["divergence"] / line["intermediate"], rel=1e-4)
        assert line["loss"] == pytest.approx(2 * line["divergence"], rel=1e-4)
    if kept:
        assert torch.equal(seen[0].nonzero()[:, 0].sort()[0], kept_H)
    assert not torch.equal(seen[0], seen[1])
    assert not any("projection" in name for name in model.state_dict())


def test_alpha_balances_against_the_loss_on_logits_alone(tmp_path):
    teacher = make_model(tmp_path / "teacher", "llama", seed=1)
    student = make_model(tmp_path / "student", "llama", seed=2)
    weights = IntermediateWeights(("hidden",), layers=((0, 0),))
    for name, mix in (("both", LossWeights(2.0, 1.0)), ("ce", LossWeights(0.0, 1.0))):
        run(student, tmp_path / name, 2, [distillation(teacher, weights, weights=mix)])
        for line in read_log(tmp_path / name / "metrics.jsonl"):
            if "alpha" in line:
                logits_loss = 2 * line["divergence"] if name == "both" else line["ce"]
                assert line["alpha"] * line["intermediate"] == pytest.approx(logits_loss, rel=1e-4)
                assert ("divergence" in line) == (
                    name == "both"
                )  # 0 would say that the models agree


def test_a_training_with_hidden_states_resumes_bit_for_bit(tmp_path):
    teacher = make_model(tmp_path / "teacher", "llama", seed=1)
    student = make_model(tmp_path / "student", "llama", seed=2, hidden_size=12)
    weights = IntermediateWeights(("hidden", "attention"), layers=((0, 0),), relation_heads=2)
    whole = run(student, tmp_path / "whole", 7, [distillation(teacher, weights)])
    state = tmp_path / "parts"

    class Stop(KnowledgeDistillation):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                raise KeyboardInterrupt

    first = distillation(teacher, weights)
    first.__class__ = Stop
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(student, state, 7, [first])
    saved = torch.load(newest_checkpoint(state / "nemo" / "checkpoints"), weights_only=False)
    assert "projection.weight" in saved["state_dict"]
    parts = run(student, state, 7, [distillation(teacher, weights)])
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("layers", "message"),
    [(((5, 0),), "expected -2 to 1, found 5"), (((0, -9),), "expected -2 to 1, found -9")],
)
def test_layers_that_are_not_there_are_refused(tmp_path, layers, message):
    teacher = make_model(tmp_path / "teacher", "llama", num_hidden_layers=2)
    weights = IntermediateWeights(("hidden",), layers=layers)
    with pytest.raises(ValueError, match=message):
        run(teacher, tmp_path / "state", 1, [distillation(teacher, weights)])


def test_what_is_put_into_the_teacher_is_in_evaluation_mode_too(tmp_path):
    """As layers of Transformer Engine's are, which begin in training mode."""
    teacher = make_model(tmp_path / "t", "llama", num_hidden_layers=2, attention_dropout=0.9)
    callback = distillation(teacher, None)
    callback.teacher.model.layers[0].train()
    run(make_model(tmp_path / "s", "llama", seed=1), tmp_path / "state", 2, [callback])
    assert not any(module.training for module in callback.teacher.modules())
