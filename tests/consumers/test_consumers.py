"""What others do with an export: plain transformers, pipelines, adapters, engines that read its config."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from nemo_minitron.checkpoints.hf_config import both_spellings, read_config
from nemo_minitron.families import families
from nemo_minitron.proofs.tiny_models import tiny_model
from nemo_minitron.release.quickstart import QUICKSTART
from tests.support.models import logits

OLDER = Path(__file__).parents[2] / ".consumers"
"""transformers 4.57, where ``make consumers`` has installed it."""

_ROOMY = {
    "falcon_h1": families()["falcon_h1"].proofs[0],
    "stablelm": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
}
"""A quarter of a tiny head is one position, which no version can turn; Falcon-H1 binds Mamba heads to hidden."""

_OTHERWISE = ("granitemoehybrid", "apertus")
"""transformers 5 writes kinds of layers of Granite 4 that 4.57 has no words for (a config.json of the hub has
the old ones), and computes Apertus' activation otherwise (docs/families.md: from 5.24 on)."""

_PRINT = """
import hashlib, json, sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
found = {}
for folder in sys.argv[1:]:
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
        with torch.inference_mode():
            found[folder] = model(torch.arange(20)[None] % model.config.vocab_size).logits[0, -1].tolist()
        ids = model.generate(torch.arange(5)[None], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        assert ids.shape[1] == 9
    except Exception as error:
        found[folder] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def export(finished):
    return finished[0] / "export"


def alone(code, *arguments):
    """Runs code in a process that knows none of this package's modules."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_pipeline_generates_from_the_folder_alone(export):
    code = """
import sys
from transformers import pipeline
writer = pipeline("text-generation", model=sys.argv[1], device_map="cpu")
(found,) = writer("the model", max_new_tokens=5, min_new_tokens=5, do_sample=False)
assert found["generated_text"].startswith("the model") and len(found["generated_text"]) > 9, found
assert not [name for name in sys.modules if name.startswith(("nemo", "lightning", "prefect"))]
"""
    alone(code, export)


def test_device_maps_load_it_and_an_adapter_attaches_learns_and_merges(export, tmp_path):
    code = """
import sys, torch
from peft import LoraConfig, get_peft_model
torch.manual_seed(0)  # adapters start at random
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="auto", dtype=torch.float32)
assert not any(p.is_meta for p in model.parameters())
targets = ["q_proj", "v_proj", "down_proj"]
adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
tokens = torch.arange(12)[None]
optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 0.01)
before = adapted(tokens, labels=tokens).loss
for _ in range(5):
    optimizer.zero_grad()
    adapted(tokens, labels=tokens).loss.backward()
    optimizer.step()
after = adapted(tokens, labels=tokens).loss
assert after < before, (before, after)
expected = adapted(tokens).logits
merged = adapted.merge_and_unload()
assert torch.allclose(merged(tokens).logits, expected, atol=1e-4)
merged.save_pretrained(sys.argv[2])
AutoModelForCausalLM.from_pretrained(sys.argv[2])
"""
    alone(code, export, tmp_path / "merged")


@pytest.mark.skipif(not OLDER.is_dir(), reason="transformers 4.57 comes with 'make consumers'")
def test_the_cards_quickstart_runs_on_transformers_4_57(export):
    assert f"```python\n{QUICKSTART}\n```" in (export / "README.md").read_text()
    code = QUICKSTART.replace('path = "."', "path = sys.argv[1]")
    begin = f"import sys; sys.path.insert(0, {str(OLDER)!r})"
    said = alone(f"{begin}\n{code}\nimport transformers; print(transformers.__version__)", export)
    assert said.splitlines()[-1].startswith("4.57.")


def test_names_are_ready_for_eight_bits(export):
    """bitsandbytes and torchao replace ``nn.Linear`` by module name: every matrix must be one, unfused."""
    model = transformers.AutoModelForCausalLM.from_pretrained(export)
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert all(module.weight.dim() == 2 for module in linear.values())
    assert len([name for name in linear if name.startswith("model.layers.0.")]) == 7


def test_its_config_says_what_engines_ask_for(export):
    """vLLM and llama.cpp read these fields themselves, and guess head_dim where it is not there."""
    config = read_config(export)
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    weights = export / "model.safetensors"
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        rows = file.get_slice("model.layers.0.self_attn.q_proj.weight").get_shape()[0]
    assert rows == heads * head_dim
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == config["torch_dtype"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    fields = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads",
        "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    )  # fmt: skip
    assert all(config.get(field) is not None for field in fields)
    assert json.loads((export / "generation_config.json").read_text())["eos_token_id"] is not None


def test_llama_cpp_knows_every_tensor_by_its_name(export):
    """The converter is a script of llama.cpp's repository; its table of names is the package gguf."""
    gguf = pytest.importorskip("gguf")
    from safetensors import safe_open

    layers = read_config(export)["num_hidden_layers"]
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    with safe_open(export / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert len(names) == 9 * layers + 3
    assert [name for name in names if known.get_name(name, try_suffixes=(".weight",)) is None] == []


@pytest.mark.skipif(not OLDER.is_dir(), reason="transformers 4.57 comes with 'make consumers'")
def test_every_family_means_the_same_to_transformers_4_57(tmp_path):
    older = OLDER / "transformers" / "models"
    folders = {}
    for family in families().values():
        if not (older / family.model_type).is_dir() or family.model_type in _OTHERWISE:
            continue
        changes = _ROOMY.get(family.model_type, {})
        folder = tiny_model(family, changes, tmp_path / family.model_type)
        config = read_config(folder)
        (folder / "config.json").write_text(json.dumps(both_spellings(config)))
        folders[str(folder)] = logits(folder)[0, -1]
    assert len(folders) >= 10
    done = subprocess.run(
        [sys.executable, "-c", _PRINT, *folders], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(OLDER)}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    wrong = {}
    for folder, found in json.loads(done.stdout.splitlines()[-1]).items():
        if isinstance(found, str):
            wrong[Path(folder).name] = found
        elif not torch.allclose(torch.tensor(found), folders[folder], rtol=1e-3, atol=2e-3):
            wrong[Path(folder).name] = float((torch.tensor(found) - folders[folder]).abs().max())
    assert not wrong
