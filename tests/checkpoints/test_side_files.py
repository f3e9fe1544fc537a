"""What belongs to a tokenizer goes along, or is named; and what differs only by its names is told so."""

import json
import shutil

import pytest
import transformers
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoints.checkpoint import SINGLE, open_checkpoint
from nemo_minitron.checkpoints.side_files import is_side_file, left_behind
from nemo_minitron.cli.main import main
from nemo_minitron.models.causal_lm import load_tokenizer
from tests.support.models import make_model, stream

TEMPLATES = {
    "default": "{{ messages[0].content }}",
    "tool_use": "{{ tools }}{{ messages[0].content }}",
}


@pytest.fixture
def source(tmp_path, teacher):
    folder = shutil.copytree(teacher, tmp_path / "source")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates" / "tool_use.jinja").is_file()
    return folder


def test_named_chat_templates_go_along(source, tmp_path):
    target = stream(source, tmp_path / "cut", {}, (0,))
    assert transformers.AutoTokenizer.from_pretrained(target).chat_template == TEMPLATES
    before = open_checkpoint(source).fingerprint
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert open_checkpoint(source).fingerprint != before


def test_named_chat_templates_are_part_of_an_artifact(source, tmp_path, capsys):
    workspace = tmp_path / "w"
    assert (
        main(["prune", f"source.model={source}", f"workspace={workspace}", "plan.drop_layers=[1]"])
        == 0
    )
    assert (workspace / "pruned" / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert main(["verify", str(workspace)]) == 0
    assert (
        main(["prune", f"source.model={source}", f"workspace={workspace}", "plan.drop_layers=[1]"])
        == 0
    )


def test_named_chat_templates_go_through_a_training_and_an_archive(source, tmp_path):
    pytest.importorskip("nemo")
    from nemo_minitron.plugin.model import MinitronModel

    model = MinitronModel.from_hf(source)
    model.save_to(str(tmp_path / "m.nemo"))
    again = MinitronModel.restore_from(str(tmp_path / "m.nemo"), map_location="cpu")
    (tmp_path / "saved").mkdir()
    again.save_hf(tmp_path / "saved")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == TEMPLATES


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.tiktoken", "spiece.model", "vocab.txt"])
def test_files_of_other_tokenizers_go_along(source, tmp_path, name):
    (source / name).write_bytes(b"\x00words\xff")
    target = stream(source, tmp_path / "cut", {}, (0,))
    assert (target / name).read_bytes() == b"\x00words\xff"


def test_a_tokenizer_file_that_nobody_knows_is_named_by_the_download(source, tmp_path, capsys):
    for name in ("sentencepiece.bpe.model", "qwen.tiktoken", "tokenization_evil.py", "README.md"):
        (source / name).write_text("x")
    assert left_behind(source) == ["qwen.tiktoken", "sentencepiece.bpe.model"]
    assert main(["download", f"source.model={source}", f"workspace={tmp_path / 'w'}"]) == 0
    assert "note: qwen.tiktoken: not carried along" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["additional_chat_templates/../x.jinja", "additional_chat_templates/", "x/tool.jinja",
                                  "additional_chat_templates/a.py", "additional_chat_templates//a.jinja"])  # fmt: skip
def test_no_other_name_in_a_folder_is_a_side_file(name):
    assert not is_side_file(name)
    assert is_side_file("additional_chat_templates/tool_use.jinja")


def renamed(folder, rename):
    tensors = load_file(folder / SINGLE)
    named = {rename(name): tensor for name, tensor in tensors.items() if rename(name)}
    save_file(named, folder / SINGLE, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: f"module.{name}", "30 tensors carry the prefix 'module.', as module.lm_head.weight for lm_head.weight"),
        (lambda name: f"_orig_mod.{name}", "carry the prefix '_orig_mod.'"),
        (lambda name: f"language_model.{name}", "carry the prefix 'language_model.'"),
        (lambda name: "" if "lm_head" in name else name.removeprefix("model."), "29 tensors lack the prefix 'model.', as embed_tokens.weight"),
        (lambda name: name.replace("lm_head", "score"), r"a classifier \(score.weight\), which has no head over the vocabulary"),
    ],
)  # fmt: skip
def test_weights_under_other_names_are_told_by_their_prefix(tmp_path, rename, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(renamed(make_model(tmp_path / "m", "llama"), rename))
    assert "save" in str(caught.value)


def test_what_is_wrong_in_config_is_not_called_the_tokenizers_fault(source, tmp_path, capsys):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({**config, "torch_dtype": "auto", "dtype": None})
    )
    assert main(["download", f"source.model={source}", f"workspace={tmp_path / 'w'}"]) == 2
    said = capsys.readouterr().err
    assert "config.json: torch_dtype: expected a dtype" in said and "tokenizer" not in said, said
    assert "no usable tokenizer" not in said


def test_why_a_tokenizer_does_not_load_is_told_in_full(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "hidden_size": 20}))
    with pytest.raises(ValueError, match=r"no usable tokenizer: .*hidden.*multiple of"):
        load_tokenizer(source)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json", "added_tokens.json"])
def test_a_damaged_file_of_a_tokenizer_is_named(source, name, content):
    (source / name).write_text(content)
    with pytest.raises(
        ValueError, match=rf"no usable tokenizer: {name} (holds no|is not valid) JSON"
    ):
        load_tokenizer(source)
