"""Nothing that comes with a model is run: no code of its own, and nobody is asked whether it may be."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from nemo_minitron.cli.main import main
from nemo_minitron.models.causal_lm import load_model, load_tokenizer
from tests.support.models import logits

CODE = """
from pathlib import Path
import transformers
Path(__file__).with_name("PWNED").touch()
Path({mark!r}).touch()
class Own(transformers.PreTrainedTokenizerFast):
    pass
class OwnConfig(transformers.LlamaConfig):
    pass
class OwnModel(transformers.LlamaForCausalLM):
    pass
"""


@pytest.fixture
def own_code(teacher, tmp_path):
    """A model whose config.json and tokenizer name classes in a file beside them."""
    folder = shutil.copytree(teacher, tmp_path / "model")
    (folder / "own.py").write_text(CODE.format(mark=str(tmp_path / "PWNED")))

    def name(file, **entries):
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return folder, name


def ran(tmp_path):
    return list(tmp_path.rglob("PWNED"))


def test_a_tokenizers_own_code_is_refused_and_nobody_is_asked(own_code, tmp_path):
    folder, name = own_code
    name(
        "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["own.Own", "own.Own"]},
    )
    words = [
        sys.executable,
        "-m",
        "nemo_minitron",
        "download",
        f"source.model={folder}",
        f"workspace={tmp_path / 'ws'}",
    ]
    done = subprocess.run(
        words, input="y\n" * 9, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert not ran(tmp_path), done.stdout
    assert "[y/N]" not in done.stdout + done.stderr
    assert done.returncode == 2, done.stderr
    assert f"{folder}: no usable tokenizer" in done.stderr


def test_a_models_own_code_is_left_alone(own_code, teacher, tmp_path, monkeypatch):
    folder, name = own_code
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    name("config.json", auto_map=own)
    model = load_model(folder)
    assert type(model).__module__.startswith("transformers.")
    assert not ran(tmp_path)
    assert logits(teacher).shape == (1, 20, 300)
    # nor where transformers has no class of its own for it
    name("config.json", model_type="own_type", architectures=["OwnModel"])
    assert main(["download", f"source.model={folder}", f"workspace={tmp_path / 'ws'}"]) == 2
    with pytest.raises(ValueError):
        load_model(folder)
    assert not ran(tmp_path)


def test_a_generation_of_its_own_is_left_alone(own_code, tmp_path):
    folder, _ = own_code
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"open({str(tmp_path / 'PWNED')!r}, 'w')\ndef generate(*a, **k): pass"
    )
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    model.generate(
        **{k: v for k, v in tokenizer("the", return_tensors="pt").items() if k == "input_ids"},
        max_new_tokens=2,
    )
    assert not ran(tmp_path)
