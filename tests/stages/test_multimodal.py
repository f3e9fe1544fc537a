"""A text model inside a multimodal one: through every stage, and back into what surrounds it."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.cli.main import main
from nemo_minitron.families import wrappers
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.proofs.wrapper_proof import image_logits, tiny_whole
from nemo_minitron.workspace.manifest import hash_file
from tests.support.runs import settings

STAGES = ("download", "score", "plan", "prune", "distill", "evaluate", "export")


@pytest.fixture(scope="session")
def whole(once, tokenizer_folder):
    def make(folder):
        tiny_whole(wrappers()["gemma3"], "gemma3_text", folder, vocab_size=300)
        for path in tokenizer_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "preprocessor_config.json").write_text(
            '{"image_processor_type": "Gemma3ImageProcessor"}'
        )

    return once("multimodal", make)


@pytest.fixture(scope="session")
def words(whole, corpus):
    own = [
        "plan.hidden=16", "plan.heads=null", "plan.ffn=20", "plan.layers=3", "trainer.max_steps=4",
        "evaluate.from_scratch=false", "evaluate.tasks=[]",
    ]  # fmt: skip
    return lambda workspace: [*settings(workspace, whole, corpus), *own]


@pytest.fixture(scope="session")
def done(once, words):
    def run(folder):
        for stage in STAGES:
            assert main([stage, *words(folder)]) == 0, stage

    return once("multimodal-run", run)


def test_the_export_is_the_multimodal_model_made_smaller(done, whole):
    export = done / "export"
    logits = image_logits(export, wrappers()["gemma3"])  # loads strictly, reads an image
    assert logits.isfinite().all()
    before, after = load_file(whole / "model.safetensors"), load_file(export / "model.safetensors")
    kept = [name for name in before if "language_model" not in name]
    assert len(kept) > 20 and set(kept) <= set(after)
    changed = [name for name in kept if not torch.equal(before[name], after[name])]
    assert changed == ["multi_modal_projector.mm_input_projection_weight"]
    assert after[changed[0]].shape == (24, 16)
    keep = load_file(done / "plan" / "keep.safetensors")["hidden"]
    assert torch.equal(after[changed[0]], before[changed[0]][:, keep])
    assert after["language_model.model.layers.2.mlp.down_proj.weight"].shape == (16, 20)
    config = json.loads((export / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForConditionalGeneration"]
    assert (
        config["text_config"]["hidden_size"] == 16
        and config["text_config"]["num_hidden_layers"] == 3
    )
    assert (
        config["vision_config"] == json.loads((whole / "config.json").read_text())["vision_config"]
    )
    assert (export / "preprocessor_config.json").is_file()


def test_the_exports_text_model_is_the_student(done):
    tokens = torch.arange(24).reshape(2, 12)
    with torch.inference_mode():
        alone = load_model(done / "student" / "hf", torch.float32)(tokens).logits
        inside = load_model(done / "export", torch.float32)(tokens).logits
    assert torch.equal(alone, inside)
    card = (done / "export" / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card and "pipeline_tag: image-text-to-text" in card
    assert "the text model inside a gemma3 model" in card


def test_stages_are_done_when_called_again(done, words, capsys):
    stamp = hash_file(done / "export" / "model.safetensors")
    assert main(["export", *words(done)]) == 0
    assert "already done" in capsys.readouterr().out
    assert hash_file(done / "export" / "model.safetensors") == stamp


def test_text_only_exports_a_plain_causal_lm(done, words, tmp_path):
    run = shutil.copytree(done, tmp_path / "run")
    assert main(["export", *words(run), "export.text_only=true"]) == 0
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["model_type"] == "gemma3_text" and config["architectures"] == [
        "Gemma3ForCausalLM"
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "export")
    assert type(model).__name__ == "Gemma3ForCausalLM" and model.config.hidden_size == 16
    assert not (run / "export" / "preprocessor_config.json").exists()
    assert "AutoModelForCausalLM" in (run / "export" / "README.md").read_text()


def test_parts_that_do_not_fit_are_refused_before_anything_is_made(whole, tmp_path, capsys):
    from safetensors.torch import save_file

    source = shutil.copytree(whole, tmp_path / "source")
    name = "multi_modal_projector.mm_input_projection_weight"
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, name: tensors[name][:, :20].contiguous()}, source / "model.safetensors")
    assert main(["download", f"workspace={tmp_path / 'run'}", f"source.model={source}"]) == 2
    assert "expected the text model's 32 hidden channels" in capsys.readouterr().err
    save_file({**tensors, "vision_tower.more": torch.zeros(3)}, source / "model.safetensors")
    assert main(["download", f"workspace={tmp_path / 'run'}", f"source.model={source}"]) == 2
    assert "Gemma3ForConditionalGeneration of transformers" in capsys.readouterr().err
    assert not (tmp_path / "run" / "teacher").exists()


def test_another_text_model_inside_is_refused_by_name(whole, tmp_path, capsys):
    source = shutil.copytree(whole, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["model_type"] = "llama"
    (source / "config.json").write_text(json.dumps(config))
    assert main(["size", str(source)]) == 2
    assert "text_config.model_type: expected one of gemma3_text" in capsys.readouterr().err


def test_processor_files_and_other_parts_are_in_the_fingerprint(whole, tmp_path):
    source = shutil.copytree(whole, tmp_path / "source")
    assert open_checkpoint(source).fingerprint == open_checkpoint(whole).fingerprint
    (source / "preprocessor_config.json").write_text("{}")
    assert open_checkpoint(source).fingerprint != open_checkpoint(whole).fingerprint
