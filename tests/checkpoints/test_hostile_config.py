"""Numbers and sizes in a config.json that no model has: refused at once, with file and reason."""

import json
import time

import pytest

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.hf_config import read_config
from nemo_minitron.cli.main import main
from nemo_minitron.families import architecture_of, families
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.proofs.tiny_models import tiny_config
from nemo_minitron.pruning.cost import model_size

LLAMA = tiny_config(families()["llama"], {})
EXPERTS = tiny_config(families()["mixtral"], {})


def written(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def at_once():
    begin = time.process_time()
    yield
    assert time.process_time() - begin < 4  # unbounded they take minutes and gigabytes


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        (
            {**LLAMA, "num_hidden_layers": 10**9},
            [],
            "axis layers: expected at most 2,000, found 1,000,000,000",
        ),
        ({**LLAMA, "num_hidden_layers": 3 * 10**6}, [], "axis layers: expected at most 2,000"),
        (
            {**EXPERTS, "num_local_experts": 2 * 10**6},
            [],
            "in all, found experts=2,000,000 x layers=4",
        ),
        ({**EXPERTS, "num_local_experts": 10**9}, [], "expected at most 200,000 in all"),
        (
            LLAMA,
            ["layers=100000000"],
            "size: axis layers: expected at most 2,000, found 100,000,000",
        ),
        (EXPERTS, ["experts=100000000"], "size: expected at most 200,000 in all"),
        ({**LLAMA, **{f"key{i}": i for i in range(300_000)}}, [], "bytes of settings, found"),
        (
            {**LLAMA, **{f"k{i}": 0 for i in range(3_000)}},
            [],
            "expected at most 2,000 keys, found 3,0",
        ),
    ],
)
def test_hostile_counts_are_refused_at_once(tmp_path, capsys, at_once, config, words, message):
    assert main(["size", str(written(tmp_path, config)), *words]) == 2
    assert message in capsys.readouterr().err


SIZED = [(name, key) for name in ("llama", "mixtral", "nemotron_h")
         for axis in families()[name].axes.values() for key in axis.config[:1]]  # fmt: skip


@pytest.mark.parametrize(
    "value", [-1, 0, 2.0, float("nan"), float("inf"), "8", True, [4], {}, 2**41, 10**400]
)
def test_a_size_that_is_no_size_is_refused_with_file_and_axis(tmp_path, value):
    for name, key in SIZED:
        changes = families()[name].proofs[0]
        folder = written(tmp_path, {**tiny_config(families()[name], changes), key: value})
        with pytest.raises(ValueError, match=r"config\.json") as caught:
            _ = architecture_of(read_config(folder), str(folder / "config.json")).sizes
        assert str(folder) in str(caught.value) and len(str(caught.value)) < 500


def test_the_largest_models_there_are_stay_far_below_the_limits():
    deep = architecture_of({**LLAMA, "num_hidden_layers": 1_000})
    assert model_size(deep).parameters > 0
    wide = architecture_of({**EXPERTS, "num_hidden_layers": 128, "num_local_experts": 1_024})
    assert model_size(wide).parameters > 0


@pytest.mark.parametrize("pad", [96, 10**9])
def test_a_pad_token_beyond_the_vocabulary_is_named_when_the_model_is_opened(
    tmp_path, model_folder, pad
):
    folder = model_folder()
    written(folder, {**read_config(folder), "pad_token_id": pad})
    with pytest.raises(
        ValueError, match=rf"config.json: pad_token_id={pad} lies beyond vocab_size=96"
    ):
        open_checkpoint(folder)
    written(folder, {**read_config(folder), "pad_token_id": -1})
    open_checkpoint(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"torch_dtype": "auto"}, "torch_dtype: expected a dtype such as bfloat16, found 'auto'"),
        ({"dtype": 5}, "dtype: expected a dtype such as bfloat16, found '5'"),
        ({"attention_dropout": 1.0}, "attention_dropout: expected at least 0 and less than 1, found 1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout: expected at least 0 and less than 1"),
    ],
)  # fmt: skip
def test_a_value_that_only_a_training_would_break_on_is_refused_when_the_model_is_opened(
    model_folder, values, message
):
    folder = model_folder()
    written(folder, {**read_config(folder), **values})
    for reads in (open_checkpoint, load_model):
        with pytest.raises(ValueError, match=rf"config\.json: {message}"):
            reads(folder)


def test_one_setting_with_two_values_would_be_two_models_and_is_refused(model_folder):
    """transformers 5 reads rope_parameters, 4.57 rope_theta; an export would hold both."""
    folder = model_folder()
    config = read_config(folder)
    written(folder, {**config, "rope_theta": 5e5})
    with pytest.raises(
        ValueError, match=r"rope_theta=500000\.0, and rope_theta=10000\.0 in rope_p"
    ):
        open_checkpoint(folder)
    written(folder, {**config, "rope_theta": 10000})
    open_checkpoint(folder)
    folder = model_folder("qwen3_moe", "experts", num_experts=4, moe_intermediate_size=8)
    config = {key: value for key, value in read_config(folder).items() if "experts" not in key}
    written(folder, {**config, "num_experts": 4, "num_local_experts": 8, "num_experts_per_tok": 2})
    with pytest.raises(ValueError, match=r"several names \(num_experts=4, num_local_experts=8\)"):
        open_checkpoint(folder)


def test_a_config_file_in_the_place_of_its_folder_is_told_so(model_folder, tmp_path, capsys):
    path = model_folder() / "config.json"
    assert main(["download", f"source.model={path}", f"workspace={tmp_path / 'w'}"]) == 2
    assert (
        f"{path}: a file; expected the folder of a model, as {path.parent}"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("pattern", ["M-M*|-M-M", "M", 5])
def test_a_list_per_layer_that_does_not_fit_is_named_by_size(tmp_path, capsys, pattern):
    model = tiny_config(families()["nemotron_h"], {"hybrid_override_pattern": pattern})
    assert main(["size", str(written(tmp_path, {**model, "num_hidden_layers": 8}))]) == 2
    assert "hybrid_override_pattern should list 8 layers, found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "kinds", "found"),
    [("hybrid_override_pattern", "MX*-", "'X'"), ("layers_block_type", ["mamba", 5, "attention", "mlp"], "5")],
)  # fmt: skip
def test_a_layer_of_a_kind_that_nobody_knows_is_not_counted_as_empty(
    tmp_path, capsys, key, kinds, found
):
    model = tiny_config(families()["nemotron_h"], {key: kinds})
    assert main(["size", str(written(tmp_path, {**model, "num_hidden_layers": 4}))]) == 2
    assert f"layer 1: no kind that nemotron_h has: {key}[1] {found}\n" in capsys.readouterr().err


def test_size_still_answers_for_more_layers_than_a_list_has(tmp_path):
    model = tiny_config(families()["gemma2"], {"layer_types": ["full_attention"] * 4})
    assert main(["size", str(written(tmp_path, model)), "layers=6"]) == 0
