"""How many samples at once, memory that runs out, and a device that is never waited for."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.families import families
from nemo_minitron.models.causal_lm import decoder_of, frozen, load_model
from nemo_minitron.proofs.tiny_models import tiny_model
from nemo_minitron.scoring.batch_size import Need, largest, samples_at_once
from nemo_minitron.scoring.hooks import Measures, Recorder
from nemo_minitron.scoring.importance import AGGREGATIONS
from nemo_minitron.scoring.pass_in_memory import in_memory
from tests.support.accelerator import Elsewhere, accelerator
from tests.support.models import make_model
from tests.support.text_samples import padded

ALL = Measures(AGGREGATIONS, influence=(1, 2))
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}


class Operations(TorchDispatchMode):
    """Counts operations on a device, and notes those for which it is waited."""

    def __init__(self):
        super().__init__()
        self.count, self.waits = 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        there = any(isinstance(part, Elsewhere) for part in tree_leaves(args))
        self.count += there
        bools = name.startswith("aten::index") and any(
            isinstance(part, torch.Tensor) and part.dtype == torch.bool
            for part in tree_leaves(args[1:])
        )
        leaves = name == "aten::_to_copy" and str(kwargs.get("device")) == "cpu"
        if there and (name in WAITS or bools or leaves):
            self.waits[name] += 1
        return func(*args, **kwargs)


def operations(folder, samples, measures=None):
    """Of one batch on an accelerator, plain or scored, the second time that it comes."""
    checkpoint = open_checkpoint(folder)
    with accelerator() as device:
        model, batch = load_model(folder, device=device), samples.batch([0, 1, 2]).to(device)
        decoder = decoder_of(model, checkpoint.family)
        recorder = Recorder(checkpoint.architecture, measures or ALL)
        attached = recorder.attached(model) if measures else nullcontext()
        recorder.mask, recorder.text_B = batch.mask_BS, batch.text_B
        with frozen(model), attached:
            for _ in range(2):
                with Operations() as found:
                    decoder(**batch.inputs())
                    if measures:
                        recorder.keep()
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2_moe"])
def test_a_scored_batch_does_not_wait_for_the_device(tmp_path, name, masked):
    family = families()[name]
    folder = tiny_model(family, family.proofs[0], tmp_path / "m")
    samples = padded() if masked else replace(padded(), valid_NS=None)
    samples = replace(samples, text_N=torch.tensor([0, 1, 0, 1]))
    measures = replace(ALL, own_tokens=name != "llama", texts=2)
    plain, scored = operations(folder, samples), operations(folder, samples, measures)
    routed = len(open_checkpoint(folder).architecture.present.get("experts", []))
    # what transformers waits for is its own affair; of routed experts it is read once a layer how many came
    assert scored.waits - plain.waits <= Counter({"aten::_to_copy": routed}), scored.waits


class Kernels:
    """As many operations as Triton's kernels, with zeros in place of sums."""

    def sequence_sums(self, x_BSU, mask_BS, hows):
        shape = (x_BSU.shape[0], 1, x_BSU.shape[2])
        return {how: x_BSU.new_zeros(shape, dtype=torch.float32) for how in hows}

    def cosines(self, before_BSH, after_BSH):
        return before_BSH.new_zeros(before_BSH.shape[:2], dtype=torch.float32)


def test_hooks_of_a_layer_take_one_or_two_kernels_a_tap(tmp_path, monkeypatch):
    """Views, which are no kernels, are counted too."""
    monkeypatch.setattr("nemo_minitron.scoring.hooks.kernels_for", lambda _: Kernels())
    folder = make_model(tmp_path / "m", "llama")
    deep = make_model(tmp_path / "deep", "llama", num_hidden_layers=6)
    samples = replace(padded(), valid_NS=None)
    counts = [
        operations(place, samples, Measures()).count - operations(place, samples).count
        for place in (folder, deep)
    ]
    # two norms, neurons, heads (a view, their norm, their sum) and the cosine: a batch's sums are apart
    assert (counts[1] - counts[0]) / 3 <= 9, counts


def test_memory_that_runs_out_halves_the_batch_and_counts_no_sample_twice(tmp_path, capsys):
    folder, samples = make_model(tmp_path / "m", "llama"), padded(8)
    checkpoint, model = open_checkpoint(folder), load_model(folder)
    measures = replace(ALL, losses=(1,))
    whole = in_memory(model, checkpoint, samples, [range(8)], measures)
    sizes = []

    def narrow(_, args):  # in the last layer, behind most of the hooks
        sizes.append(len(args[0]))
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.layers[-1].mlp.down_proj.register_forward_pre_hook(narrow)
    found = in_memory(model, checkpoint, samples, [range(5), range(5, 8)], measures)
    assert capsys.readouterr().out.count("memory does not suffice") == 2
    assert set(sizes) == {5, 3, 2, 1}
    assert found.samples == whole.samples
    for key, sums in whole.sums.items():
        assert found.sums[key].samples == 8
        torch.testing.assert_close(found.sums[key].total, sums.total)
    for key, sums in whole.depth.items():
        assert found.depth[key].count == sums.count
        torch.testing.assert_close(found.depth[key].total, sums.total, rtol=1e-6, atol=0)


def test_memory_that_one_sample_exceeds_is_told(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    model = load_model(folder)

    def none(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.layers[1].register_forward_pre_hook(none)
    with pytest.raises(torch.OutOfMemoryError):
        in_memory(model, open_checkpoint(folder), padded(), [[0, 1]], ALL)


def test_samples_at_once():
    assert (samples_at_once("auto"), samples_at_once(3)) == (8, 3)
    with pytest.raises(ValueError, match="expected auto or a number, found 'many'"):
        samples_at_once("many")
    need = Need(300, 400)  # 200 for every pass, 100 a sample
    assert largest(need, 10**9, 1024, 1000) == 64  # 65,536 tokens
    assert largest(need, 10**9, 1024, 5) == 8  # all that there are
    assert largest(need, 2000, 1024, 1000) == 8  # 1000 of 1200
    assert largest(need, 1, 200_000, 1000) == 1
