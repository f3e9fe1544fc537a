"""A GGUF file, and a checkpoint in FP8, go through all stages; what comes out is plain, and GGUF where asked for."""

import json

import pytest
import torch

from nemo_minitron.checkpoints.checkpoint import load_tensor, open_checkpoint
from nemo_minitron.cli.main import main
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.models.gguf_folder import write_gguf_folder
from nemo_minitron.release.gguf_export import write_gguf
from tests.checkpoints.test_dequantised import declare, eight_bits, linear, rewrite
from tests.support.models import make_model
from tests.support.runs import minitron, refused, settings

pytest.importorskip("gguf")
STAGES = ("download", "score", "plan", "prune", "distill", "evaluate", "export")
SHORT = (
    "evaluate.from_scratch=false",
    "evaluate.tasks=[]",
    "trainer.max_steps=4",
    "plan.heads=null",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory, teacher):
    """A small Llama with a tokenizer as a GGUF file in Q8_0, and in FP8."""
    folder = tmp_path_factory.mktemp("sources")
    made = write_gguf(teacher, teacher, "tiny", ["q8_0"], "gpt-2", "apache-2.0")["q8_0"]
    found = {"gguf": made.rename(folder / "tiny.gguf"), "fp8": folder / "fp8"}
    found["fp8"].mkdir()
    for path in teacher.iterdir():
        (found["fp8"] / path.name).write_bytes(path.read_bytes())

    def change(name, tensor):
        if not linear(name):
            return {name: tensor.bfloat16()}
        numbers, scales = eight_bits(tensor)
        return {name: numbers, f"{name}_scale_inv": scales}

    rewrite(found["fp8"], change)
    config = json.loads((found["fp8"] / "config.json").read_text())
    (found["fp8"] / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    declare(found["fp8"], {"quant_method": "fp8", "weight_block_size": [16, 16]})
    return found


FP8 = pytest.param("fp8", "FP8, blocks of 16 x 16", marks=pytest.mark.slow)


@pytest.mark.parametrize(("kind", "words"), [("gguf", "GGUF, "), FP8])
def test_all_stages(tmp_path, sources, corpus, kind, words):
    workspace = tmp_path / "run"
    options = [
        *settings(workspace, sources[kind], corpus),
        *SHORT,
        "export.gguf=[f32]",
        *(["export.gguf_pre=gpt-2"] if kind != "gguf" else []),  # it goes out as it came in
    ]
    for stage in STAGES:
        done = minitron(stage, *options)
        assert done.returncode == 0, (stage, done.stderr[-2000:])
    export = workspace / "export"
    assert words in (export / "README.md").read_text()
    teacher = next(part for part in json.loads((export / "minitron.json").read_text())["stages"]
                   if part["kind"] == "teacher")  # fmt: skip
    assert teacher["config"]["stored_as"].startswith(words)
    for folder in (workspace / "pruned", workspace / "student" / "hf", export):
        config = json.loads((folder / "config.json").read_text())
        assert "quantization_config" not in config
        assert not (folder / "gguf.json").exists()
    (file,) = export.glob("*-F32.gguf")
    back = tmp_path / "back"
    back.mkdir()
    write_gguf_folder(file, back)
    tokens = torch.arange(16)[None]
    with torch.inference_mode():
        one, other = (load_model(folder, torch.float32)(tokens).logits for folder in (export, back))
    assert torch.allclose(one, other, atol=1e-5)
    # the weights that were not trained on the way are the source's
    source = open_checkpoint(
        workspace / json.loads((workspace / "teacher" / "source.json").read_text())["path"]
    )
    name = "model.embed_tokens.weight"
    plan = open_checkpoint(workspace / "pruned")
    assert load_tensor(source, name).shape[0] == load_tensor(plan, name).shape[0]
    again = minitron("download", *options)
    assert again.returncode == 0 and "already" in again.stdout + again.stderr


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            "export.gguf=[q4_k]",
            "export.gguf: expected different types of f32, f16, bf16, q8_0, found q4_k",
        ),
        ("export.gguf=[bf16]", "does not know this tokenizer's pre-tokenizer"),
    ],
)
def test_what_cannot_go_out_is_refused_before_anything_is_made(
    tmp_path, teacher, corpus, option, said
):
    done = minitron("download", *settings(tmp_path / "run", teacher, corpus), option)
    assert done.returncode == 2, done.stderr[-2000:]
    assert said in done.stderr and done.stderr.strip().count("\n") == 0
    assert not (tmp_path / "run" / "teacher" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("model_type", "changes", "plan", "said"),
    [
        ("qwen2", {}, "plan.hidden=18", "head_dim * num_attention_heads == hidden_size"),
        ("gemma3_text", {"num_hidden_layers": 12, "sliding_window": 6, "query_pre_attn_scalar": 4},
         "plan.drop_layers=[3]", "full attention in every N-th layer"),
    ],
)  # fmt: skip
def test_what_pruning_made_unfit_for_llama_cpp_is_refused_before_it_is_trained(
    tmp_path, capsys, tokenizer_folder, words, model_type, changes, plan, said
):
    source = make_model(tmp_path / "m", model_type, vocab_size=304, **changes)
    for path in tokenizer_folder.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    given = [word for word in words if not word.startswith("plan.")]
    given += [f"workspace={tmp_path / 'run'}", f"source.model={source}", plan]
    asked = [*given, "export.gguf=[bf16]", "export.gguf_pre=gpt-2"]
    assert main(["prune", *asked]) == 0
    capsys.readouterr()
    line = refused(capsys, "distill", *asked)
    assert said in line and not (tmp_path / "run/student").exists()
