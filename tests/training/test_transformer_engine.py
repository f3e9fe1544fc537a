"""Layers exchanged for another engine's. Transformer Engine needs CUDA: here torch's own layers take over."""

import contextlib
import copy
import importlib.util
import json

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import nn

from nemo_minitron.families import families, fill
from nemo_minitron.models.causal_lm import layers_of, load_model
from nemo_minitron.plugin.model import MinitronModel
from nemo_minitron.plugin.trainer import Options
from nemo_minitron.proofs.tiny_models import tiny_model
from nemo_minitron.training.fp8_recipes import check_tokens
from nemo_minitron.training.loss_guard import BadStep
from nemo_minitron.training.transformer_engine import (
    LayerReplacement,
    Norm,
    ReplacementLayers,
    norm_formula,
    transformer_engine,
)
from tests.support.models import logits, make_model
from tests.support.nemo_training import run
from tests.support.transformer_engine import install
from tests.support.two_ranks import module_on_two_ranks


class Scaled(nn.Linear):
    """A linear layer with something beside its parameters in the state, which grows, as Transformer Engine's."""

    seen = 0

    def forward(self, x):
        self.seen += 1
        return super().forward(x)

    def get_extra_state(self):
        return torch.ones(self.seen)

    def set_extra_state(self, state):
        raise RuntimeError("Refusing to load pickled state")  # as 2.16 and later


class Formula(nn.Module):
    def __init__(self, norm, width, bias):
        super().__init__()
        self.norm, self.weight = norm, nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x):
        return self.norm(x, self.weight, self.bias)


def kit(norms=True):
    def norm(old, formula):
        if not norms:  # one of its own class, so that the results are the same to the byte
            return copy.deepcopy(old)
        return Formula(formula, old.weight.shape[0], formula.layer)

    def linear(old):
        return Scaled(old.in_features, old.out_features, bias=old.bias is not None, device="meta")

    return ReplacementLayers(linear, norm, contextlib.nullcontext)


BOUND = {"nemotron_h", "granitemoehybrid", "helium", "olmoe"}
"""Families whose hidden channels are bound to heads: they keep the usual tiny sizes."""


@pytest.mark.parametrize("name", sorted(families()))
def test_every_familys_norms_are_known_and_its_layers_exchanged_without_a_trace(tmp_path, name):
    family = families()[name]
    sizes = {} if name in BOUND else {family.axes["hidden"].config[0]: 64}
    try:
        folder = tiny_model(
            family, {**sizes, **(family.proofs[0] if family.proofs else {})}, tmp_path / "m"
        )
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    model = load_model(folder, dtype=torch.float32)
    keys, tokens = set(model.state_dict()), torch.arange(12)[None] % 90
    with torch.no_grad():
        before = model(tokens).logits
    index = family.axes["layers"].index
    for tap in (tap for tap in family.taps["hidden"] if tap.side == "output"):
        with contextlib.suppress(AttributeError):  # a hybrid's layers differ
            assert norm_formula(model.get_submodule(fill(tap.module, {index: 0}))) is not None
    exchange = LayerReplacement(model, family, kit())
    if name != "cohere2":  # LayerNorm without a bias, which TE's layer always has: it stays
        assert exchange.norms >= len(layers_of(model, family))
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, before, atol=1e-4)
    assert set(model.state_dict()) == keys
    model.load_state_dict(model.state_dict(), strict=True)
    with exchange.undone():
        assert set(model.state_dict()) == keys
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, before)


def test_gains_around_zero_and_means_are_told_apart():
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

    assert norm_formula(LlamaRMSNorm(8, 1e-6)) == Norm(False, False, 1e-6)
    assert norm_formula(Gemma2RMSNorm(8, 1e-6)) == Norm(False, True, 1e-6)
    assert norm_formula(NemotronLayerNorm1P(8)) == Norm(True, True, 1e-5)
    assert norm_formula(nn.LayerNorm(8)) == Norm(True, False, 1e-5)
    for other in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Conv1d(1, 1, 1), nn.Embedding(8, 8)):
        assert norm_formula(other) is None


def test_what_listens_to_a_layer_listens_to_its_successor():
    model = load_model_in_memory()
    heard = []
    layer = model.model.layers[0]
    layer.input_layernorm.register_forward_hook(lambda *_: heard.append("norm"))
    layer.mlp.up_proj.register_forward_pre_hook(lambda *_: heard.append("linear"))
    LayerReplacement(model, families()["llama"], kit())
    assert isinstance(layer.mlp.up_proj, Scaled)
    model(torch.arange(4)[None])
    assert heard == ["norm", "linear"]


def test_a_split_model_is_not_kept_whole_beside_and_comes_back_as_it_is():
    """What FSDP2 does: other parameters take the places of the new layers'."""
    model = load_model_in_memory()
    whole = sum(p.numel() for p in model.parameters())
    exchange = LayerReplacement(model, families()["llama"], kit())
    held = [old for _, _, old, _ in exchange._places]
    assert not any(list(old.parameters()) for old in held)
    layer = model.model.layers[0].mlp
    layer.up_proj.weight = nn.Parameter(torch.full_like(layer.up_proj.weight, 2.0))
    with exchange.undone():
        assert type(layer.up_proj) is nn.Linear and bool((layer.up_proj.weight == 2).all())
        assert sum(p.numel() for p in model.parameters()) == whole
    assert isinstance(layer.up_proj, Scaled) and bool((layer.up_proj.weight == 2).all())


def load_model_in_memory():
    from nemo_minitron.models.causal_lm import new_model
    from tests.support.models import SIZES

    config = {
        **SIZES,
        "hidden_size": 48,
        "intermediate_size": 32,
        "head_dim": 16,
        "model_type": "llama",
    }
    return new_model(config, 0)


class Give(Callback):
    """Gives the model a kit, as ``training.transformer_engine`` does where that can run."""

    def setup(self, trainer, pl_module, stage):
        pl_module.replacement_layers = kit(norms=False)


def test_a_training_with_other_layers_resumes_and_ends_as_the_same_hugging_face_model(
    tmp_path, capfd
):
    wide = {"hidden_size": 48, "intermediate_size": 32, "head_dim": 16}
    folder = make_model(tmp_path / "m", "llama", **wide)
    plain = run(folder, tmp_path / "plain", 6)
    given = run(folder, tmp_path / "given", 6, [Give()])
    said = capfd.readouterr().err
    assert "21 linear layers and 6 norms exchanged\n" in said
    assert any(isinstance(module, Scaled) for module in given.modules())
    outs = []
    for name, model in (("plain", plain), ("given", given)):
        (tmp_path / f"{name}-hf").mkdir()
        model.save_hf(tmp_path / f"{name}-hf")
        outs.append((tmp_path / f"{name}-hf" / "model.safetensors").read_bytes())
    assert outs[0] == outs[1]
    given.save_to(str(tmp_path / "m.nemo"))
    back = MinitronModel.restore_from(str(tmp_path / "m.nemo"), map_location="cpu")
    assert not any(isinstance(module, Scaled) for module in back.modules())
    with torch.no_grad():
        assert torch.equal(
            back.model.eval()(torch.arange(20)[None]).logits, logits(tmp_path / "plain-hf")
        )

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                raise BadStep(5, "stop")

    with pytest.raises(BadStep):  # a checkpoint of step 3 stays
        run(folder, tmp_path / "parts", 6, [Give(), Stop()])
    resumed = run(folder, tmp_path / "parts", 6, [Give()])
    ours, theirs = given.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="it is installed"
)
def test_without_transformer_engine_one_line_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"not usable here.*nemo-minitron\[te\]"):
        transformer_engine(fp8=True)
    folder = make_model(tmp_path / "m", "llama")
    with pytest.raises(
        ValueError, match=r"training.transformer_engine: Transformer Engine is not usable"
    ):
        run(folder, tmp_path / "s", 2, options=Options(transformer_engine="on"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            Options(transformer_engine="fp8", activation_checkpointing=True),
            "use on, or no checkpointing",
        ),
        (
            Options(transformer_engine="on", shard=True, tensor_parallel=2),
            "does not divide|not split",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(make_model(tmp_path / "m", "llama"), tmp_path / "s", 2, options=options)


@pytest.mark.parametrize(
    ("capability", "recipe", "message"),
    [
        ((8, 0), "auto", r"training.transformer_engine=fp8: .*cannot run it here \(Device compute capability 8.9 or "
         r"higher required for FP8 execution\); use training.transformer_engine=on"),
        ((9, 0), "mxfp8", r"training.fp8_recipe=mxfp8: .* \(Device compute capability 10.0 or higher"),
        ((8, 9), "block", r"training.fp8_recipe=block: .* \(FP8 block scaled GEMM requires"),
    ],
)  # fmt: skip
def test_what_a_card_has_not_is_refused_by_name(monkeypatch, capability, recipe, message):
    install(monkeypatch, capability)
    with pytest.raises(ValueError, match=message):
        transformer_engine(True, recipe)
    assert transformer_engine(False).fp8 is None  # the layers alone run there


@pytest.mark.parametrize(
    ("capability", "recipe", "expected"),
    [((8, 9), "auto", ("delayed", 16)), ((10, 0), "auto", ("mxfp8", 32)), ((12, 0), "auto", ("current", 16)),
     ((9, 0), "block", ("block", 128)), ((10, 0), "current", ("current", 16))],
)  # fmt: skip
@pytest.mark.parametrize("old", [False, True])
def test_a_recipe_is_the_one_that_was_asked_for(monkeypatch, capability, recipe, expected, old):
    device = install(monkeypatch, capability, old)
    if old and recipe == "block":
        with pytest.raises(ValueError, match=r"fp8_recipe=block: .* \(2.3.0 is too old\)"):
            transformer_engine(True, recipe)
        return
    made = transformer_engine(True, recipe)
    assert (made.fp8.name, made.multiple) == expected
    with made.context():
        assert device.recipe == made.fp8.kind
    assert device.recipe is None


WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}


def test_a_training_in_fp8_exchanges_what_its_recipe_takes_and_no_more(
    tmp_path, capfd, monkeypatch
):
    device = install(monkeypatch, (10, 0))
    folder = make_model(tmp_path / "m", "llama", num_key_value_heads=1, **WIDE)
    plain = run(folder, tmp_path / "plain", 2)
    given = run(folder, tmp_path / "given", 2, options=Options(transformer_engine="fp8"))
    said = capfd.readouterr().err
    assert (
        "15 linear layers and 6 norms exchanged, products in FP8 (mxfp8); 6 linear layers stay: their widths are "
        "no multiples of 32" in said
    )
    assert device.seen == {"MXFP8BlockScaling"}
    ours, theirs = plain.model.state_dict(), given.model.state_dict()
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in ours)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(transformer_engine="fp8", fp8_recipe="block"),
         r"fp8_recipe=block: a micro-batch has 4 x 16 = 64 tokens, expected a multiple of 128; change data.train"),
        (Options(transformer_engine="on", compile="on"), "training.compile=on: not with training.transformer_engine"),
    ],
)  # fmt: skip
def test_what_fp8_does_not_take_is_refused_before_the_first_step(
    tmp_path, monkeypatch, options, message
):
    install(monkeypatch, (9, 0))
    folder = make_model(tmp_path / "m", "llama", num_key_value_heads=1, **WIDE)
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "s", 2, options=options)


@pytest.mark.parametrize(
    ("name", "positions", "rows", "message"),
    [
        ("delayed", 4, [4], None), ("delayed", 4, [4, 2], None), ("delayed", 6, [4], "4 x 6 = 24 tokens, expected a multiple of 16"),
        ("delayed", 4, [4, 1], "1 x 4 = 4 tokens, expected a multiple of 8; change data.validation"),
        ("mxfp8", 8, [4, 2], "2 x 8 = 16 tokens, expected a multiple of 32"),
    ],
)  # fmt: skip
def test_tokens_are_counted_by_the_rules_of_the_recipe(monkeypatch, name, positions, rows, message):
    """Where they pass, the stand-in computes them; where they do not, it refuses."""
    device = install(monkeypatch, (10, 0))
    made = transformer_engine(True, name)
    layer = made.linear(nn.Linear(64, 64)).to_empty(device="cpu")

    def step():
        with made.context():
            layer(torch.zeros(4, positions, 64))
            for count in rows:
                with torch.no_grad():
                    layer(torch.zeros(count, positions, 64))

    if message is None:
        check_tokens(made.fp8, 4, positions, rows, positions)
        step()
    else:
        with pytest.raises(AssertionError, match="FP8 execution requires"):
            step()
        with pytest.raises(ValueError, match=message):
            check_tokens(made.fp8, 4, positions, rows, positions)
    assert device.seen == {made.fp8.kind}


@pytest.mark.slow
def test_two_ranks_keep_no_second_copy_and_write_what_they_have_trained(tmp_path):
    """FSDP2 over gloo, stopped behind a checkpoint and gone on with."""
    folder = make_model(tmp_path / "m", "llama", num_key_value_heads=1, **WIDE)
    module_on_two_ranks("tests.support.sharded_layers", folder, tmp_path / "state", tmp_path)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank in told:
        assert rank["whole"] == [] and rank["fp8"] == ["DelayedScaling"]
        assert rank["said"].startswith(
            "save_to: the model is split over ranks; gather() and save_hf(folder)"
        )
    assert not list(tmp_path.glob("*.nemo"))
    plain = run(folder, tmp_path / "plain", 6, accumulate_grad_batches=2).model.state_dict()
    found, before = (
        load_file(tmp_path / "hf" / "model.safetensors"),
        load_model(folder).state_dict(),
    )
    for name, tensor in found.items():
        assert torch.allclose(tensor, plain[name], atol=1e-5), name
    assert not any(torch.equal(found[name], before[name]) for name in found if "proj" in name)
