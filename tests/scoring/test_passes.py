"""Depth by what it costs, and scoring layer by layer: against models that were really cut, and against memory."""

from dataclasses import replace

import pytest
import torch

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.data.calibration_samples import Samples
from nemo_minitron.families import families
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.models.layer_control import LayerControl
from nemo_minitron.proofs.tiny_models import tiny_model
from nemo_minitron.scoring.depth import block_importance
from nemo_minitron.scoring.hooks import Measures
from nemo_minitron.scoring.importance import AGGREGATIONS
from nemo_minitron.scoring.pass_by_layer import layer_bytes, streamed
from nemo_minitron.scoring.pass_in_memory import check_isolation, in_memory
from tests.support.chosen_families import CHOSEN
from tests.support.models import INSTALLED, make_model, stream
from tests.support.text_samples import padded

DEPTH = Measures((), influence=(), losses=(1, 2))
GROUPS = [[0, 1], [2, 3]]


def loss_of(folder, samples):
    """Cross-entropy over valid next tokens, the plain way."""
    model = load_model(folder, torch.float32)
    tokens, valid = samples.tokens_NS, samples.valid_NS
    with torch.inference_mode():
        logits = model(tokens[:, :-1], attention_mask=valid[:, :-1].long(), use_cache=False).logits
    chosen = logits.double().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return float(-chosen[valid[:, 1:]].mean())


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_loss_without_layers_is_that_of_the_cut_model(tmp_path, name):
    family = families()[name]
    folder, samples = tiny_model(family, family.proofs[0], tmp_path / "m"), padded()
    calibration = in_memory(load_model(folder), open_checkpoint(folder), samples, GROUPS, DEPTH)
    whole = loss_of(folder, samples)
    for length in (1, 2):
        sums = calibration.depth["lm_loss", length]
        assert sums.base / sums.count == pytest.approx(whole, abs=1e-4)
        for first, rise in enumerate(block_importance("lm_loss", sums).tolist()):
            kept = tuple(layer for layer in range(4) if not first <= layer < first + length)
            cut = stream(folder, tmp_path / f"cut{length}-{first}", {}, kept)
            assert rise == pytest.approx(loss_of(cut, samples) - whole, abs=2e-4), (length, first)


def test_with_layers_gone_already(tmp_path):
    folder, samples = make_model(tmp_path / "m", "llama"), padded()
    checkpoint, gone = open_checkpoint(folder), frozenset({1})
    for calibration in (
        in_memory(load_model(folder), checkpoint, samples, GROUPS, DEPTH, gone),
        streamed(checkpoint, samples, GROUPS, DEPTH, torch.device("cpu"), 10**9, tmp_path, gone),
    ):
        sums = calibration.depth["lm_loss", 1]
        assert sums.base / sums.count == pytest.approx(
            loss_of(stream(folder, tmp_path / f"one{id(calibration)}", {}, (0, 2)), samples),
            abs=1e-4,
        )
        assert sums.total[1] == torch.inf
        alone = loss_of(stream(folder, tmp_path / f"two{id(calibration)}", {}, (2,)), samples)
        assert float(sums.total[0]) / sums.count == pytest.approx(alone, abs=1e-4)


def test_an_identity_layer_costs_nothing(tmp_path):
    from safetensors.torch import load_file, save_file

    folder, samples = make_model(tmp_path / "m", "llama"), padded()
    tensors = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{name}.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    measures = Measures(("mean",), influence=(1,), losses=(1,))
    calibration = in_memory(load_model(folder), open_checkpoint(folder), samples, GROUPS, measures)
    for metric in ("block_influence", "lm_loss"):
        importance = block_importance(metric, calibration.depth[metric, 1])
        assert float(importance[1]) == pytest.approx(0, abs=1e-6)
        assert importance.abs().argmin() == 1


@pytest.mark.parametrize("name", [n for n in CHOSEN if "layers" in families()[n].prunable])
def test_layer_by_layer_gives_the_scores_of_the_model_in_memory(tmp_path, name):
    family = families()[name]
    samples = replace(padded(), text_N=torch.tensor([0, 1, 1, 0]))
    for number, changes in enumerate(family.proofs):
        folder = tiny_model(family, changes, tmp_path / f"m{number}")
        checkpoint = open_checkpoint(folder)
        routed = "experts" in checkpoint.architecture.present
        texts = 2 if routed else 0
        measures = Measures(
            AGGREGATIONS, influence=(1,), losses=(1,), own_tokens=routed, texts=texts
        )
        whole = in_memory(load_model(folder), checkpoint, samples, GROUPS, measures)
        budget = 4000  # most of the hidden states go to disk
        found = streamed(
            checkpoint, samples, GROUPS, measures, torch.device("cpu"), budget, tmp_path
        )
        assert set(found.sums) == set(whole.sums)
        assert found.samples == whole.samples
        for key, sums in whole.sums.items():
            assert found.sums[key].samples == sums.samples
            assert torch.allclose(found.sums[key].squares, sums.squares, rtol=1e-6), key
            assert torch.allclose(found.sums[key].total, sums.total, rtol=1e-6), key
        for key, sums in whole.depth.items():
            assert torch.allclose(found.depth[key].total, sums.total, rtol=1e-6), key
            assert found.depth[key].count == sums.count
        for axis, counts in whole.routed.items():
            assert torch.equal(found.routed[axis], counts)
            assert torch.equal(whole.by_text.sum(0), counts)
            assert torch.equal(found.by_text, whole.by_text)


def test_streaming_refuses_what_needs_all_layers_at_once(tmp_path):
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "llama"))
    with pytest.raises(ValueError, match="needs the model in memory"):
        streamed(
            checkpoint,
            padded(),
            GROUPS,
            Measures(influence=(1, 2)),
            torch.device("cpu"),
            10**9,
            tmp_path,
        )


def test_a_layer_that_cannot_be_read_ahead_is_told_by_name(tmp_path):
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "llama"))
    path, last = tmp_path / "m" / "model.safetensors", "model.layers.2.mlp.up_proj.weight"
    entry = checkpoint.entries[last]
    entries = {**checkpoint.entries, last: replace(entry, start=path.stat().st_size - 10)}
    checkpoint, read = replace(checkpoint, entries=entries), []
    with pytest.raises(ValueError, match=r"model\.safetensors: ends early, in model\.layers\.2"):
        streamed(checkpoint, padded(), GROUPS, Measures(), torch.device("cpu"), 10**9, tmp_path,
                 progress=read.append)  # fmt: skip
    assert sum(read) == 2 * 4 * 12  # both layers before it had been computed


def test_layer_bytes_are_those_on_disk(tmp_path):
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "llama"))
    outside, layer = layer_bytes(checkpoint)
    assert outside + 3 * layer == sum(entry.size for entry in checkpoint.entries.values())


def test_a_detour_leaves_no_trace(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    model = load_model(folder)
    tokens = torch.arange(8)[None]
    with torch.inference_mode():
        before = model(tokens).logits
        with LayerControl(model, families()["llama"]).attached() as detour:
            assert torch.equal(model(tokens).logits, before)
            detour.skip = frozenset({1})
            assert not torch.allclose(model(tokens, use_cache=False).logits, before)
        assert torch.equal(model(tokens).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "name",
    sorted({*CHOSEN, "falcon_h1"} & {n for n in INSTALLED if "layers" in families()[n].prunable}),
)
def test_the_first_layer_may_be_left_out_before_any_has_run(tmp_path, name):
    """Some families' layers return tuples (Falcon-H1), others tensors; one that is left out does as they do."""
    family = families()[name]
    model = load_model(tiny_model(family, family.proofs[0], tmp_path / "m"))
    tokens = torch.arange(2, 26).reshape(2, 12)
    with torch.inference_mode():
        whole = model(tokens, use_cache=False).logits
        with LayerControl(model, family).attached() as detour:
            detour.skip = frozenset({0})
            first = model(tokens, use_cache=False).logits
            detour.skip = frozenset()
            assert torch.equal(model(tokens, use_cache=False).logits, whole)
            detour.skip = frozenset({0})
            assert torch.equal(model(tokens, use_cache=False).logits, first)
    assert first.shape == whole.shape and not torch.allclose(first, whole)


def test_greedy_goes_on_without_the_first_layer_where_layers_return_tuples(tmp_path):
    family, samples = families()["falcon_h1"], padded()
    folder = tiny_model(family, family.proofs[0], tmp_path / "m")
    checkpoint, gone = open_checkpoint(folder), frozenset({0})
    measures = Measures((), influence=(1,), losses=(1,))
    whole = in_memory(load_model(folder), checkpoint, samples, GROUPS, measures, gone)
    sums = whole.depth["lm_loss", 1]
    layers = checkpoint.architecture.sizes["layers"]
    cut = stream(folder, tmp_path / "cut", {}, tuple(range(1, layers)))
    assert sums.base / sums.count == pytest.approx(loss_of(cut, samples), abs=1e-4)
    by_layer = streamed(
        checkpoint, samples, GROUPS, measures, torch.device("cpu"), 10**9, tmp_path, gone
    )
    for key, expected in whole.depth.items():
        found = by_layer.depth[key].total
        assert torch.allclose(found[1:], expected.total[1:], rtol=1e-6), key


def isolates(model, family):
    try:
        check_isolation(model, family)
    except ValueError as error:
        assert "one document sees another; use off" in str(error)
        return False
    return True


@pytest.mark.parametrize("name", sorted(INSTALLED))
def test_packed_documents_do_not_see_each_other(tmp_path, name):
    """Two documents in one sample, positions starting over: the hidden states of two separate samples."""
    family = families()[name]
    folder = tiny_model(family, family.proofs[0], tmp_path / "m")
    torch.manual_seed(0)
    left, right = torch.randint(2, 96, (1, 5)), torch.randint(2, 96, (1, 7))
    both = torch.cat([left, right], 1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    batch = Samples(
        torch.cat([both, both[:, :1]], 1), None, torch.cat([positions, torch.tensor([[7]])], 1)
    ).batch([0])
    model = load_model(folder, torch.float32)
    decoder = model.get_submodule(family.modules["decoder"])
    with torch.inference_mode():
        packed = decoder(**batch.inputs()).last_hidden_state
        apart = [decoder(input_ids=ids, use_cache=False).last_hidden_state for ids in (left, right)]
        plain = decoder(input_ids=both, use_cache=False).last_hidden_state
    scale = float(packed.abs().max())
    # recurrent layers carry their state on, and some models do not hand their position ids to their masks
    same = torch.allclose(packed, torch.cat(apart, 1), atol=1e-5 * scale)
    assert isolates(model, family) == same
    recurrent = {"mamba_heads", "linear_key_heads", "conv_channels"} & set(family.axes)
    assert same or recurrent or name in ("gpt_oss", "nemotron", "stablelm")
    assert not torch.allclose(packed[:, 5:], plain[:, 5:], atol=1e-3 * scale) or not same
    assert batch.labels_BS[0, 4] == -1 and (batch.labels_BS[0, :4] >= 0).all()


def test_the_loss_of_several_lengths_shares_one_base(tmp_path):
    folder, samples = make_model(tmp_path / "m", "llama"), padded()
    calibration = in_memory(load_model(folder), open_checkpoint(folder), samples, GROUPS, DEPTH)
    one = in_memory(
        load_model(folder), open_checkpoint(folder), samples, GROUPS, replace(DEPTH, losses=(1,))
    )
    assert torch.equal(calibration.depth["lm_loss", 1].total, one.depth["lm_loss", 1].total)
    assert calibration.depth["lm_loss", 1].base == calibration.depth["lm_loss", 2].base
