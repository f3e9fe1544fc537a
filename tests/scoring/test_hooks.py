"""One hooked pass against activations caught by hand and formulas written out.

On real tiny models with padding.
"""

from dataclasses import replace

import pytest
import torch
import transformers

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.families import Architecture, families
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.proofs.tiny_models import tiny_model
from nemo_minitron.scoring.calibration_sums import merge_sums, rankings
from nemo_minitron.scoring.hooks import Measures, Recorder
from nemo_minitron.scoring.importance import AGGREGATIONS, over_batch
from nemo_minitron.scoring.pass_in_memory import in_memory
from tests.support.models import INSTALLED, make_model
from tests.support.text_samples import padded

ALL = Measures(AGGREGATIONS, influence=(1, 2))


def score(folder, samples, measures=ALL, batch=2):
    checkpoint = open_checkpoint(folder)
    groups = [list(range(i, min(i + batch, len(samples)))) for i in range(0, len(samples), batch)]
    return in_memory(load_model(folder), checkpoint, samples, groups, measures)


def by_hand(folder, samples):
    """Hidden states of every module we need, straight from a plain forward pass."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    caught = {}

    def keep(name, side):
        def hook(_, args, kwargs, output):
            value = (args[0] if args else kwargs["hidden_states"]) if side == "in" else output
            caught[name] = value[0] if isinstance(value, tuple) else value

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(keep(f"{i}.in", "in"), with_kwargs=True)
        layer.register_forward_hook(keep(f"{i}.out", "out"), with_kwargs=True)
        layer.input_layernorm.register_forward_hook(keep(f"{i}.n1", "out"), with_kwargs=True)
        layer.post_attention_layernorm.register_forward_hook(
            keep(f"{i}.n2", "out"), with_kwargs=True
        )
        layer.mlp.register_forward_hook(keep(f"{i}.mlp", "in"), with_kwargs=True)
        for name in ("up_proj", "down_proj"):
            if hasattr(layer.mlp, name):
                side = "in" if name == "down_proj" else "out"
                getattr(layer.mlp, name).register_forward_hook(
                    keep(f"{i}.{name}", side), with_kwargs=True
                )
        layer.self_attn.o_proj.register_forward_hook(keep(f"{i}.att", "in"), with_kwargs=True)
    with torch.inference_mode():
        model(samples.tokens_NS[:, :-1], attention_mask=samples.valid_NS[:, :-1].long())
    return caught, model


def naive(values, how):
    """One aggregation along dimension 0, float64."""
    values = values.double()
    if how == "l2":
        return values.square().sum(0).sqrt()
    if how == "mean":
        return values.abs().mean(0)
    return (values - values.mean(0)).square().mean(0)


def aggregate(x, samples, batch, sequence):
    """First over the valid positions of each sample, then over samples ([P1] section 2.2)."""
    mask = samples.valid_NS[:, :-1]
    return naive(torch.stack([naive(x[b, mask[b]], sequence) for b in range(len(x))]), batch)


@pytest.mark.parametrize("name", ["llama", "nemotron"])
@pytest.mark.parametrize("sequence", AGGREGATIONS)
@pytest.mark.parametrize("batch", AGGREGATIONS)
def test_every_axis_against_the_formula(tmp_path, name, batch, sequence):
    folder, samples = make_model(tmp_path / "m", name), padded()
    caught, model = by_hand(folder, samples)
    calibration = score(folder, samples)
    found = rankings(calibration, families()[name], batch, sequence, "block_influence")

    def same(result, x):
        expected = aggregate(x, samples, batch, sequence)
        return torch.allclose(result, expected, rtol=2e-4, atol=1e-6 * float(expected.max()))

    hidden = [caught[f"{i}.{n}"] for i in range(3) for n in ("n1", "n2")]
    expected = sum(aggregate(x, samples, batch, sequence) for x in hidden)
    assert torch.allclose(found["hidden"], expected, rtol=2e-4)
    for i in range(3):
        assert same(found["ffn"][i], caught[f"{i}.down_proj"])
        heads = (
            caught[f"{i}.att"].unflatten(-1, (model.config.num_attention_heads, -1)).norm(dim=-1)
        )
        assert same(found["heads"][i], heads)


def test_block_influence_of_layers_and_of_blocks(tmp_path):
    folder, samples = make_model(tmp_path / "m", "llama"), padded()
    caught, _ = by_hand(folder, samples)
    calibration = score(folder, samples)
    mask = samples.valid_NS[:, :-1]
    for length, blocks in ((1, 3), (2, 2)):
        sums = calibration.depth["block_influence", length]
        assert len(sums.total) == blocks
        for i in range(blocks):
            pair = caught[f"{i}.in"].double(), caught[f"{i + length - 1}.out"].double()
            cosine = torch.nn.functional.cosine_similarity(*pair, dim=-1)[mask]
            assert (sums.count, float(sums.total[i])) == (
                len(cosine),
                pytest.approx(float(cosine.sum()), rel=1e-5),
            )


def test_neurons_before_their_activation(tmp_path):
    folder, samples = make_model(tmp_path / "m", "nemotron"), padded()
    caught, _ = by_hand(folder, samples)
    calibration = score(folder, samples, replace(ALL, pre_activation=True))
    for i in range(3):
        expected = aggregate(caught[f"{i}.up_proj"], samples, "l2", "mean")
        assert torch.allclose(
            over_batch(calibration.sums["ffn", "mean"], "l2")[i], expected, rtol=1e-4
        )
    assert not torch.allclose(
        over_batch(score(folder, samples).sums["ffn", "mean"], "l2"),
        over_batch(calibration.sums["ffn", "mean"], "l2"),
        rtol=0.01,
    )


@pytest.mark.parametrize("sequence", AGGREGATIONS)
def test_experts_and_their_neurons_against_the_formula(tmp_path, sequence):
    folder, samples = tiny_model(families()["mixtral"], {}, tmp_path / "m"), padded()
    caught, model = by_hand(folder, samples)
    calibration = score(folder, samples)
    mask = samples.valid_NS[:, :-1]
    for i, layer in enumerate(model.requires_grad_(False).model.layers):
        x = caught[f"{i}.mlp"]
        logits = torch.nn.functional.linear(x, layer.mlp.gate.weight)
        weights, chosen = torch.topk(logits.softmax(-1), 2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        for expert in range(4):
            gate, up = layer.mlp.experts.gate_up_proj[expert].chunk(2)
            neurons = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
            given = neurons @ layer.mlp.experts.down_proj[expert].T
            share = (weights * (chosen == expert)).sum(-1)
            came = (chosen == expert).any(-1)
            assert int(calibration.routed["experts"][i, expert]) == int((came & mask).sum())
            norm = (given * share[..., None]).norm(dim=-1)[..., None]
            expected = aggregate(norm.detach(), samples, "l2", sequence)[0]
            found = over_batch(calibration.sums["experts", sequence], "l2")[i, expert]
            assert float(found) == pytest.approx(float(expected), rel=1e-3)
            expected = aggregate((neurons * came[..., None]).detach(), samples, "l2", sequence)
            found = over_batch(calibration.sums["expert_ffn", sequence], "l2")[i, expert]
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_experts_over_their_own_tokens_and_each_texts_tokens(tmp_path):
    family = families()["mixtral"]
    folder = tiny_model(family, {}, tmp_path / "m")
    samples = replace(padded(), text_N=torch.tensor([0, 1, 1, 0]))
    caught, model = by_hand(folder, samples)
    calibration = score(folder, samples, replace(ALL, own_tokens=True, texts=2))
    found = rankings(calibration, family, "l2", "mean", "none", "own_tokens")["experts"]
    mask = samples.valid_NS[:, :-1]
    for i, layer in enumerate(model.requires_grad_(False).model.layers):
        x = caught[f"{i}.mlp"]
        weights, chosen = torch.topk((x @ layer.mlp.gate.weight.T).softmax(-1), 2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        for expert in range(4):
            gate, up = layer.mlp.experts.gate_up_proj[expert].chunk(2)
            given = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
            given = given @ layer.mlp.experts.down_proj[expert].T
            came = (chosen == expert).any(-1) & mask
            router = (weights * (chosen == expert)).sum(-1)
            expected = (router * given.norm(dim=-1))[came].mean()  # REAP
            assert float(found[i, expert]) == pytest.approx(float(expected), rel=1e-3)
            for text, rows in enumerate(([0, 3], [1, 2])):
                assert int(calibration.by_text[text, i, expert]) == int(came[rows].sum())
    # the other sums, and with them the ranking of before, are what they are without
    plain = score(folder, samples)
    assert torch.equal(
        rankings(calibration, family, "l2", "mean", "none")["experts"],
        rankings(plain, family, "l2", "mean", "none")["experts"],
    )
    assert set(calibration.sums) - set(plain.sums) == {("experts", "own_tokens")}


@pytest.mark.skipif("nemotron_h" not in INSTALLED, reason="transformers has no nemotron_h")
def test_mamba_heads_channels_and_state_against_the_formula(tmp_path):
    folder, samples = (
        tiny_model(families()["nemotron_h"], {"hybrid_override_pattern": "M*MM"}, tmp_path / "m"),
        padded(),
    )
    model, caught = load_model(folder), {}
    for i in (0, 2, 3):
        mixer = model.model.layers[i].mixer
        mixer.out_proj.register_forward_pre_hook(
            lambda _, args, i=i: caught.update({(i, "out"): args[0]})
        )
        mixer.in_proj.register_forward_hook(
            lambda _, args, out, i=i: caught.update({(i, "in"): out})
        )
    with torch.inference_mode():
        model(
            samples.tokens_NS[:, :-1],
            attention_mask=samples.valid_NS[:, :-1].long(),
            use_cache=False,
        )
    calibration = score(folder, samples)
    for i in (0, 2, 3):
        out = caught[i, "out"].unflatten(-1, (8, 6))  # 8 heads of 6 channels
        state = caught[i, "in"][..., 96:136].unflatten(
            -1, (4, 10)
        )  # behind gate and x: B and C of 2 groups
        for axis, values in (
            ("mamba_heads", out.norm(dim=-1)),
            ("mamba_head_dim", out.norm(dim=-2)),
            ("mamba_state", state.norm(dim=-2)),
        ):
            found = over_batch(calibration.sums[axis, "mean"], "l2")[i]
            assert torch.allclose(found, aggregate(values, samples, "l2", "mean"), rtol=1e-3), axis
    assert (
        over_batch(calibration.sums["mamba_heads", "mean"], "l2")[1].abs().max() == 0
    )  # the attention layer


@pytest.mark.parametrize("name", sorted(INSTALLED))
def test_watching_the_experts_changes_nothing(tmp_path, name):
    family = families()[name]
    folder = tiny_model(family, family.proofs[0], tmp_path / "m")
    model = load_model(folder)
    tokens = torch.randint(2, 96, (2, 12))
    recorder = Recorder(open_checkpoint(folder).architecture, ALL)
    with torch.inference_mode():
        before = model(tokens, use_cache=False).logits
        with recorder.attached(model):
            during = model(tokens, use_cache=False).logits
        after = model(tokens, use_cache=False).logits
    assert torch.allclose(before, during, atol=1e-4 * float(before.abs().max()))
    assert torch.equal(before, after)


def test_any_split_over_batches_and_runs_merges_to_the_whole(tmp_path):
    folder, samples = make_model(tmp_path / "m", "nemotron"), padded(8)
    whole = score(folder, samples, batch=8)
    checkpoint, model = open_checkpoint(folder), load_model(folder)
    parts = [
        in_memory(model, checkpoint, samples, groups, ALL)
        for groups in ([[5, 0], [7]], [[1, 2, 3, 4, 6]])
    ]
    for other in (score(folder, samples, batch=3), merge_sums(*parts)):
        assert dict(sorted(other.samples.items())) == whole.samples
        for key, sums in whole.sums.items():
            assert other.sums[key].samples == 8
            assert torch.allclose(other.sums[key].squares, sums.squares, rtol=1e-6)
        for key, sums in whole.depth.items():
            assert torch.allclose(other.depth[key].total, sums.total, rtol=1e-6)
    with pytest.raises(ValueError, match="share calibration sample 0"):
        merge_sums(parts[0], whole)


def test_hooks_are_gone_afterwards_also_after_an_error(tmp_path):
    model = load_model(make_model(tmp_path / "m", "llama"))
    recorder = Recorder(Architecture(families()["llama"], model.config.to_dict()), ALL)
    with pytest.raises(RuntimeError, match="stop"), recorder.attached(model):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
