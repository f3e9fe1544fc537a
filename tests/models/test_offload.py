"""A teacher whose layers lie in memory and come to the device one by one; the CPU stands for the device."""

import pytest
import torch

from nemo_minitron.cli.main import main
from nemo_minitron.families import families
from nemo_minitron.models.causal_lm import frozen, hidden_states, layers_of, load_model
from nemo_minitron.models.int8 import load_teacher
from nemo_minitron.models.offload import Offloaded
from nemo_minitron.plugin.knowledge_distillation import KnowledgeDistillation
from nemo_minitron.proofs.tiny_models import tiny_model
from tests.support.models import INSTALLED, make_model
from tests.support.two_ranks import curve, weights

CPU = torch.device("cpu")
TOKENS_BS = torch.arange(40).reshape(2, 20)


def matrices(layer):
    return [t for t in [*layer.parameters(), *layer.buffers()] if t.dim() > 1]


def states(model, family):
    with frozen(model):
        return hidden_states(model, family, TOKENS_BS)


@pytest.mark.parametrize("dtype", [None, "int8", "fp8"])
@pytest.mark.parametrize("name", sorted(INSTALLED))
def test_every_family_computes_the_same_to_the_bit_from_two_buffers(tmp_path, name, dtype):
    family = families()[name]
    folder = tiny_model(family, family.proofs[0], tmp_path / "m")
    expected, model = load_teacher(folder, dtype), load_teacher(folder, dtype)
    offloaded = Offloaded(model, family, CPU)
    layers, ran = layers_of(model, family), []

    def look(layer, *_):  # behind the hook that brings the matrices
        ran.append(layer)
        held = {buffer.untyped_storage().data_ptr() for buffer in offloaded.buffers}
        for other in layers:
            inside = [t.untyped_storage().data_ptr() in held for t in matrices(other)]
            assert all(inside) if other is layer else not any(inside)
        assert sum(number is not None for number in offloaded.held) <= 2

    for layer in layers:
        layer.register_forward_pre_hook(look)
    for _ in range(2):
        assert torch.equal(states(model, family), states(expected, family))
    assert ran == layers * 2
    largest = max(sum(t.nbytes for t in matrices(layer)) for layer in layers)
    assert len(offloaded.buffers) == 2 and all(
        largest <= buffer.nbytes <= largest + 256 * 64 for buffer in offloaded.buffers
    )
    assert offloaded.held == [None, None]
    ours, theirs = model.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key].double(), theirs[key].double()) for key in ours)


def test_layers_that_are_tied_run_out_of_order_fail_or_are_compiled(tmp_path):
    family = families()["llama"]
    folder = make_model(tmp_path / "m", "llama", tie_word_embeddings=True)
    expected, model = (load_model(folder).requires_grad_(False) for _ in range(2))
    for each in (expected, model):
        first, _, last = layers_of(each, family)
        last.mlp.up_proj.weight = first.mlp.up_proj.weight
        first.mlp.gate_proj.weight = first.mlp.up_proj.weight
    offloaded = Offloaded(model, family, CPU)
    layers = layers_of(model, family)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert layers[0].mlp.gate_proj.weight is layers[0].mlp.up_proj.weight
    assert torch.equal(states(model, family), states(expected, family))
    for each in (model, expected):  # another order than that of the copies
        each.model.layers = torch.nn.ModuleList(each.model.layers[i] for i in (2, 1, 0))
    assert torch.equal(states(model, family), states(expected, family))
    for each in (model, expected):  # what was copied for nothing before is not what counts now
        for layer in layers_of(each, family):
            layer.mlp.down_proj.weight.mul_(2)
    assert torch.equal(states(model, family), states(expected, family))

    def fail(*_):
        raise OSError

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(OSError):
        states(model, family)
    handle.remove()
    kept = offloaded._matrices
    assert all(store[name] is m.kept for each in kept for m in each for store, name in m.places)
    for layer in model.model.layers:
        layer.compile(backend="eager", dynamic=False)
    assert torch.equal(states(model, family), states(expected, family))


def test_a_student_learns_the_same_from_a_teacher_in_memory(tmp_path, words_often):
    for place in ("device", "offload"):
        words = [f"workspace={tmp_path}/{place}", *words_often, "trainer.max_steps=4"]
        assert main(["prune", *words]) == 0
        more = [f"distill.teacher_place={place}", "distill.intermediate.terms=[hidden]"]
        assert main(["distill", *words, *more, "distill.intermediate.layers=['-1:-1']"]) == 0
    here, there = tmp_path / "device", tmp_path / "offload"
    assert curve(here) == curve(there)
    assert all(torch.equal(weights(here)[name], tensor) for name, tensor in weights(there).items())


def test_another_teacher_takes_the_place_of_one_in_memory(tmp_path):
    first, second = (load_model(make_model(tmp_path / f"{n}", "llama", n)) for n in (1, 2))
    distillation = KnowledgeDistillation(first, place="offload")
    distillation._settle(CPU)
    states(first, distillation.family)
    distillation.replace_teacher(second)
    family = distillation.family
    assert torch.equal(states(first, family), states(second, family))
    distillation._settle(CPU)  # a second fit leaves it where it is
    assert torch.equal(states(first, family), states(second, family))


def test_the_logits_of_a_teacher_in_memory_are_written_too(monkeypatch, tmp_path, words_often):
    made, whole = [], Offloaded.__init__
    monkeypatch.setattr(Offloaded, "__init__", lambda *given: made.append(whole(*given)))
    for place in ("device", "offload"):
        words = [f"workspace={tmp_path}/{place}", *words_often, "distill.teacher_logits=cache"]
        assert main(["prune", *words]) == 0
        assert main(["logits", *words, f"distill.teacher_place={place}"]) == 0
    assert len(made) == 1
    parts = sorted((tmp_path / "device" / "logits").glob("part-*"))
    assert parts and all(
        part.read_bytes() == (tmp_path / "offload" / "logits" / part.name).read_bytes()
        for part in parts
    )
