"""One hooked pass against activations caught by hand and formulas written out.

On real tiny models with padding.
"""

import pytest
import torch
import transformers

from nemo_minitron.bridge.models import decoder_of, frozen, load_model
from nemo_minitron.bridge.taps import Recorder
from nemo_minitron.core.importance import merge, over_batch
from nemo_minitron.families import families
from tests.conftest import make_model


def record(folder, name, tokens, mask=None, depth=True, batches=1):
    model = load_model(folder)
    recorder = Recorder(families()[name], model.config.to_dict(), "mean", depth)
    masks = [None] * batches if mask is None else mask.chunk(batches)
    with frozen(model), recorder.attached(model):
        for part, recorder.mask in zip(tokens.chunk(batches), masks, strict=True):
            attention = None if recorder.mask is None else recorder.mask.long()
            decoder_of(model, recorder.family)(input_ids=part, attention_mask=attention, use_cache=False)
    return recorder


def by_hand(folder, tokens, mask):
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
        layer.post_attention_layernorm.register_forward_hook(keep(f"{i}.n2", "out"), with_kwargs=True)
        layer.mlp.down_proj.register_forward_hook(keep(f"{i}.ffn", "in"), with_kwargs=True)
        layer.self_attn.o_proj.register_forward_hook(keep(f"{i}.att", "in"), with_kwargs=True)
    with torch.inference_mode():
        model(tokens, attention_mask=mask.long())
    return caught, model.config


def aggregate(x, mask):
    """Mean of absolute values over valid positions, then root of the sum of squares over samples."""
    per_sample = [x[b, mask[b]].double().abs().mean(0) for b in range(len(x))]
    return torch.stack(per_sample).square().sum(0).sqrt()


@pytest.mark.parametrize("name", ["llama", "nemotron"])
def test_every_axis_against_the_formula(tmp_path, name):
    folder = make_model(tmp_path / "m", name)
    torch.manual_seed(0)
    tokens = torch.randint(0, 96, (4, 12))
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[0, 9:] = mask[2, 5:] = False
    recorder = record(folder, name, tokens, mask)
    caught, config = by_hand(folder, tokens, mask)
    found = {axis: over_batch(sums, "l2") for axis, sums in recorder.stacked().items()}
    hidden = sum(aggregate(caught[f"{i}.{n}"], mask) for i in range(3) for n in ("n1", "n2"))
    assert torch.allclose(found["hidden"].sum(0), hidden, rtol=1e-4)
    for i in range(3):
        assert torch.allclose(found["ffn"][i], aggregate(caught[f"{i}.ffn"], mask), rtol=1e-4)
        heads = caught[f"{i}.att"].unflatten(-1, (config.num_attention_heads, -1)).norm(dim=-1)
        assert torch.allclose(found["heads"][i], aggregate(heads, mask), rtol=1e-4)
        before, after = caught[f"{i}.in"], caught[f"{i}.out"]
        cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)[mask]
        total, count = recorder.cosines[i]
        assert (count, total / count) == (int(mask.sum()), pytest.approx(float(cosine.mean()), rel=1e-5))


def test_batches_and_shards_merge_to_the_whole(tmp_path):
    folder = make_model(tmp_path / "m", "nemotron")
    tokens = torch.randint(0, 96, (8, 12))
    whole = record(folder, "nemotron", tokens).stacked()
    batched = record(folder, "nemotron", tokens, batches=4).stacked()
    left, right = (
        record(folder, "nemotron", tokens[:3]).stacked(),
        record(folder, "nemotron", tokens[3:]).stacked(),
    )
    for axis in whole:
        for other in (batched[axis], merge(left[axis], right[axis])):
            assert other.samples == 8
            assert torch.allclose(over_batch(other, "l2"), over_batch(whole[axis], "l2"), rtol=1e-6)


def test_hooks_are_gone_afterwards_also_after_an_error(tmp_path):
    model = load_model(make_model(tmp_path / "m", "llama"))
    recorder = Recorder(families()["llama"], model.config.to_dict(), "mean", True)
    with pytest.raises(RuntimeError, match="stop"), recorder.attached(model):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
