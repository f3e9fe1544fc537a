"""Layers that torch.compile has made one kernel of: the same numbers, nothing compiled twice, and what if not."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from nemo_minitron.config.compose import as_dict, from_dict, load_config
from nemo_minitron.families import families
from nemo_minitron.models.causal_lm import hidden_states, new_model
from nemo_minitron.plugin.trainer import Options
from nemo_minitron.proofs.tiny_models import tiny_config
from nemo_minitron.training.compilation import Compiled, is_compiled
from tests.support.chosen_families import CHOSEN

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small(name, changes=None, backend="aot_eager"):
    family = families()[name]
    model = new_model(tiny_config(family, changes or {}), 0)
    return family, model, Compiled(model, family, "student", backend)


def passes(model, family, samples=(2, 2, 1)):
    """Training, validation and its last batch; the gradients' norm."""
    tokens_BS = torch.randint(0, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    hidden_states(model.train(), family, tokens_BS[: samples[0]]).square().mean().backward()
    with torch.inference_mode():
        for count in samples[1:]:
            hidden_states(model.eval(), family, tokens_BS[:count])
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


# one of each kind of layer; those with routed experts run as they are
KINDS = [(name, changes) for name, changes in [
    ("llama", {}), ("gemma", {}), ("gemma2", {"sliding_window": 6}), ("gemma3_text", {"sliding_window": 6}),
    ("granite", {}), ("mistral", {"sliding_window": 6}), ("nemotron", {}), ("nemotron_h", {"hybrid_override_pattern": "M*-M"}),
    ("olmo2", {}), ("phi3", {}), ("qwen2", {}), ("qwen2_moe", {"mlp_only_layers": [1]}), ("qwen3", {}),
    ("smollm3", {"no_rope_layer_interval": 2}), ("stablelm", {}), ("starcoder2", {}),
] if name in CHOSEN]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), KINDS, ids=[name for name, _ in KINDS])
def test_layers_of_every_family_become_whole_graphs(name, changes, monkeypatch):
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: whole(f, fullgraph=True, **how))
    family, model, compiled = small(name, changes)
    assert compiled.layers and passes(model, family, (2, 2)) > 0
    assert not compiled.failed and not counters["graph_break"]
    # each of at most three kinds once for training and once for validation, however many layers there are
    assert 0 < counters["stats"]["unique_graphs"] <= 6


def test_layers_with_routed_experts_run_as_they_are():
    _, _, compiled = small("mixtral")
    assert not compiled.layers and str(compiled) == "compiles 0 of 4 layers of the student"


def test_many_widths_do_not_run_into_torchs_limit():
    """Beyond it torch would run further layers as they are, and nobody would notice."""
    family = families()["llama"]
    models = [new_model(tiny_config(family, {"intermediate_size": 16 + i}), 0) for i in range(6)]
    compiled = [Compiled(model, family, "student", "eager") for model in models]
    for model in models:
        passes(model, family)
    assert counters["stats"]["unique_graphs"] == 6 * 3
    assert not any(each.failed for each in compiled)
    assert not [key for key in counters["unimplemented"] if "limit" in str(key)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_plain_layers(checkpointing):
    family, model, compiled = small("llama")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    fast = passes(model, family)
    assert not compiled.failed and counters["stats"]["unique_graphs"]
    compiled.undo()
    model.zero_grad()
    done = counters["stats"]["calls_captured"]
    assert torch.allclose(passes(model, family), fast, rtol=1e-4)
    assert counters["stats"]["calls_captured"] == done


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(capsys):
    def refuse(graph, inputs):
        raise RuntimeError("no compiler here")

    family, model, compiled = small("llama", backend=refuse)
    found = passes(model, family)
    compiled.undo()
    model.zero_grad()
    assert torch.equal(found, passes(model, family))
    told = capsys.readouterr().err
    assert told.startswith(
        "training.compile: the student's layers cannot be compiled and run as they are: "
    )
    assert "no compiler here" in told and told.count("\n") == 1


def test_hooked_layers_are_left_alone():
    family = families()["llama"]
    model = new_model(tiny_config(family, {}), 0)
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    model.model.layers[2].register_forward_hook(lambda *_: None)  # outside of what is compiled
    assert len(Compiled(model, family, "student", "eager").layers) == 3


def test_by_itself_only_where_it_pays(monkeypatch):
    monkeypatch.setattr("nemo_minitron.training.compilation.find_spec", lambda name: name)
    assert is_compiled("auto", CUDA, True) and is_compiled("on", CPU, False)
    assert not is_compiled("auto", CPU, True) and not is_compiled("auto", CUDA, False)
    assert not is_compiled("off", CUDA, True)
    monkeypatch.setattr("nemo_minitron.training.compilation.find_spec", lambda name: None)
    assert not is_compiled("auto", CUDA, True)
    assert Options().compile == "off"


@pytest.mark.parametrize(
    ("word", "meant"),
    [("true", "on"), ("False", "off"), ("on", "on"), ("off", "off"), ("auto", "auto")],
)
def test_truth_values_are_still_understood(tmp_path, word, meant):
    assert load_config("demo", [f"training.compile={word}"]).training.compile == meant
    path = tmp_path / "mine.yaml"
    path.write_text(f"defaults: [demo, _self_]\ntraining: {{compile: {word}}}\n")
    assert load_config("mine", [], tmp_path).training.compile == meant
    values = as_dict(load_config("demo", []))
    values["training"]["compile"] = meant == "on"  # as a run of an earlier version has written it
    assert from_dict(values).training.compile == ("on" if meant == "on" else "off")


def test_another_word_is_refused():
    with pytest.raises(
        ValueError, match=r"training\.compile: expected one of auto, on, off, found 'yes'"
    ):
        load_config("demo", ["training.compile=yes"])
