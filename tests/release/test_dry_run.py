"""Settings of a source that plain transformers code stumbles over: set aside, or refused before any training."""

import json
import shutil

import pytest
import torch
import transformers

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.hf_config import both_spellings, read_config
from nemo_minitron.checkpoints.set_aside import notes
from nemo_minitron.checkpoints.side_files import tokenizer_fingerprint
from nemo_minitron.cli.main import main
from nemo_minitron.evaluation.generation import continue_greedily
from nemo_minitron.families import architecture_of, families
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.models.config_trial import check_config_loads
from nemo_minitron.proofs.tiny_models import tiny_config, tiny_model
from nemo_minitron.release.dry_run import check_builds, smallest, try_export
from nemo_minitron.release.quickstart import check_in_clean_process
from tests.support.models import stream


@pytest.fixture
def source(tmp_path, teacher):
    return shutil.copytree(teacher, tmp_path / "source")


def change(path, **values):
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**before, **values}))


HARMLESS = [
    (
        "tokenizer_config.json",
        {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]},
    ),
    ("generation_config.json", {"return_dict_in_generate": True}),
    ("generation_config.json", {"stop_strings": ["the end"]}),
    ("generation_config.json", {"num_return_sequences": 2}),
    ("generation_config.json", {"output_scores": True, "return_dict_in_generate": True}),
    ("config.json", {"output_hidden_states": True}),
    ("config.json", {"output_attentions": True}),
    ("config.json", {"return_dict": False}),
]


@pytest.mark.parametrize(("file", "values"), HARMLESS)
def test_a_setting_that_used_to_fail_after_the_training_is_set_aside(
    source, tmp_path, file, values
):
    change(source / file, **values)
    said = notes(source, read_config(source))
    assert len(said) == len(values) and all(line.startswith(f"{file}: ") for line in said)
    try_export(source, open_checkpoint(source).architecture)
    read = load_model(source)  # as teacher and in evaluations
    assert continue_greedily(read, torch.arange(2, 6)[None], 3).shape == (1, 3)
    read.save_pretrained(tmp_path / "saved")
    target = stream(source, tmp_path / "cut", {}, (0, 2))
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    model = transformers.AutoModelForCausalLM.from_pretrained(target)
    outputs = model.generate(**tokenizer("The", return_tensors="pt"), max_length=8)
    assert isinstance(tokenizer.decode(outputs[0], skip_special_tokens=True), str)
    assert not notes(target, read_config(target))
    assert tokenizer_fingerprint(target) == tokenizer_fingerprint(source)


def test_side_files_with_nothing_to_set_aside_stay_byte_for_byte(source, tmp_path):
    (source / "generation_config.json").write_text('{"temperature":0.7 ,\n "do_sample": true}')
    target = stream(source, tmp_path / "cut", {}, (0,))
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"hidden_act": "nope"}, "config.json: hidden_act='nope' is unknown to transformers"),
        ("config.json", {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, "config.json: rope_type='nope' is unknown to"),
        ("config.json", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "Missing required keys in `rope_parameters`"),
        ("config.json", {"_attn_implementation": "flash_attention_2"}, "_attn_implementation='flash_attention_2', and flash-attn is not"),
        ("config.json", {"attn_implementation": 5}, "cannot build this model with attn_implementation=5: a value of type int does not fit\n"),
        ("config.json", {"id2label": "nope"}, 'cannot build this model with id2label="nope": a value of type str does not fit\n'),
        ("config.json", {"hidden_act": None}, "cannot build this model with hidden_act=null: "),
        ("config.json", {"quantization_config": {}}, "config.json: quantization_config={}: "),
        ("generation_config.json", {"cache_implementation": "nope"}, 'generation_config.json: cache_implementation="nope": Invalid'),
        ("generation_config.json", {"eos_token_id": "x"}, 'generation_config.json: eos_token_id="x"; an export would not'),
        ("tokenizer_config.json", {"model_max_length": "x"}, 'tokenizer_config.json: model_max_length="x"; an export would not'),
        ("config.json", {"pad_token_id": 300}, "config.json: pad_token_id=300 lies beyond vocab_size=300"),
    ],
)  # fmt: skip
def test_what_stops_an_export_ends_the_download_with_file_and_key(
    source, tmp_path, capsys, file, values, message
):
    change(source / file, **values)
    assert main(["download", f"source.model={source}", f"workspace={tmp_path / 'w'}"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1, said
    assert not any(word in said for word in ("Error", "object has", "NoneType", "<class")), said
    assert not (tmp_path / "w" / "teacher").exists()


def test_the_download_tells_what_is_set_aside(source, tmp_path, capsys):
    change(source / "generation_config.json", return_dict_in_generate=True)
    assert main(["download", f"source.model={source}", f"workspace={tmp_path / 'w'}"]) == 0
    said = capsys.readouterr().err
    assert "generation_config.json: return_dict_in_generate=true is set aside" in " ".join(
        said.split()
    )


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
def test_the_download_tells_of_special_tokens_that_the_model_does_not_have(source, file, key):
    change(source / file, **{key: [7, 300] if key == "eos_token_id" else 300})
    (said,) = notes(source, read_config(source))
    assert said.startswith(f"{file}: {key}=300 lies beyond vocab_size=300: the model can neither")


@pytest.mark.parametrize(
    ("name", "changes"), [(n, c) for n, f in families().items() for c in f.proofs]
)
def test_every_family_has_a_smaller_model_to_try(name, changes):
    model = architecture_of(tiny_config(families()[name], changes))
    small = smallest(model)
    assert small.sizes["hidden"] <= model.sizes["hidden"]
    assert set(small.present) == set(model.present)


@pytest.mark.parametrize("name", families())
def test_no_family_is_refused_as_transformers_saves_it(tmp_path, name):
    folder = tiny_model(families()[name], families()[name].proofs[0], tmp_path / "m")
    model = open_checkpoint(folder).architecture
    check_builds(folder, model)
    try_export(folder, model)
    check_config_loads(both_spellings(model.config), "here")


def test_an_export_is_tried_on_an_ascii_terminal_whatever_the_model_writes(source, monkeypatch):
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["decoder"] = {"type": "Replace", "pattern": {"Regex": "."}, "content": "ü"}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("LC_ALL", "C")
    check_in_clean_process(source, source, "float32")
