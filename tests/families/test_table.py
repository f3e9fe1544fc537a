"""Loading tables, the user's own among them, and whether their taps exist in the installed transformers."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.families import (
    Architecture,
    families,
    family_of,
    load_family,
    use_tables,
)
from nemo_minitron.families.table import OWN_TABLES, TABLES
from nemo_minitron.models.causal_lm import load_model
from nemo_minitron.proofs.tiny_models import tiny_config, tiny_model
from nemo_minitron.pruning.select import complete_targets, score_shape
from nemo_minitron.pruning.slice import Cut, cut_config
from nemo_minitron.scoring.hooks import Measures, Recorder
from tests.support.models import INSTALLED, make_model
from tests.support.runs import minitron


@pytest.mark.parametrize("name", sorted(INSTALLED))
def test_taps_and_modules_are_those_of_the_installed_transformers(tmp_path, name):
    family = families()[name]
    for i, changes in enumerate(family.proofs):
        folder = tiny_model(family, changes, tmp_path / f"{i}")
        described = open_checkpoint(folder).architecture
        model = load_model(folder)
        assert type(model).__name__ == family.architecture
        sizes, present = described.sizes, described.present
        for early in (False, True):
            recorder = Recorder(described, Measures(("mean",), early))
            with torch.inference_mode(), recorder.attached(model):
                model.get_submodule(family.modules["decoder"])(
                    input_ids=torch.arange(24).view(2, 12), use_cache=False
                )
            calibration = recorder.sums()
            prunable = {axis for axis in family.prunable if axis in present}
            groups = {family.axes[axis].within for axis in prunable} - {None}
            # every axis that a plan can cut has a score of its own, or its group's
            assert {axis for axis, _ in calibration.sums} == prunable - groups - {"layers"}
            for (axis, _), sums in calibration.sums.items():
                assert sums.total.shape[-1] == sizes[axis], axis
                if family.axes[axis].scope != "model":
                    assert sums.total.shape == score_shape(family, sizes, axis)
                    seen = sums.total.flatten(1).sum(-1).nonzero().flatten().tolist()
                    assert seen == present[axis], axis
            assert calibration.depth["block_influence", 1].count == 24


def edited(tmp_path, change, name="llama"):
    table = yaml.safe_load((TABLES / f"{name}.yaml").read_text())
    change(table)
    path = tmp_path / "edited.yaml"
    path.write_text(yaml.safe_dump(table, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(colour="red"), "unknown keys .'colour'"),
        (lambda t: t["axes"]["ffn"].update(color="red"), "axis ffn: unknown keys"),
        (lambda t: t["axes"]["ffn"].update(scope="expert"), "scope 'expert' is no placeholder"),
        (lambda t: t["axes"]["ffn"].update(within="groups"), "within 'groups' is no axis"),
        (lambda t: t["axes"].pop("layers"), "an axis 'layers' with an index is needed"),
        (lambda t: t["tensors"].update({"x": "hidden width"}), "axes .'width'. are not declared"),
        (lambda t: t["tensors"].update({"x?": "hidden"}), "needs 'if CONDITION'"),
        (lambda t: t["tensors"].update({"x": "hidden if tied"}), "needs 'if CONDITION'"),
        (lambda t: t["tensors"].update({"x?": "hidden if tied and"}), "is not valid"),
        (lambda t: t["tensors"].update({"x.{expert}": "hidden"}), "belong to no axis"),
        (
            lambda t: t["taps"].update(ffn=["side of x"]),
            "expected 'input .output, experts. of MODULE'",
        ),
        (lambda t: t.update(constraints=["width > 1"]), "not declared"),
        (lambda t: t.pop("architecture"), "key 'architecture' is missing"),
        (lambda t: t.update(axes=3), "edited.yaml"),
    ],
)
def test_a_table_with_a_mistake_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_family(edited(tmp_path, change))


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "\x00", "[" * 5000, "{a: " * 3000])
def test_what_is_no_table_is_refused(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.yaml"):
        load_family(path)


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """A family of the user's own: what transformers calls ``olmo``, which no table of ours describes."""
    monkeypatch.setenv(OWN_TABLES, "")  # put back at the end, whatever the test sets

    def change(table):
        table.update(
            model_type="olmo",
            architecture="OlmoForCausalLM",
            proofs=[{}, {"tie_word_embeddings": True}],
        )
        table["tensors"] = {
            k: v for k, v in table["tensors"].items() if "norm" not in k and "mlp.b" not in k
        }
        table.pop("ignored")

    path = edited(tmp_path, change)
    yield path
    monkeypatch.undo()
    families.cache_clear()


def test_a_table_of_the_users_own_is_proven_and_used(tmp_path, own_table):
    assert "olmo" not in families()
    proven = minitron("families", "--prove", "--json", "olmo", f"families.path={own_table}")
    assert proven.returncode == 0, proven.stderr
    rows = json.loads(proven.stdout)
    assert {row["axis"] for row in rows} >= {"hidden", "ffn", "heads", "layers"}
    assert all(row["strict load"] == "yes" for row in rows)
    use_tables(own_table)
    model = tiny_model(families()["olmo"], {}, tmp_path / "model")
    arguments = [
        f"workspace={tmp_path / 'run'}",
        f"source.model={model}",
        "plan.ffn=16",
        "score.importance=magnitude",
    ]
    refused = minitron("prune", *arguments, env={OWN_TABLES: ""})
    assert refused.returncode == 2
    assert "model_type 'olmo' is not supported" in refused.stderr
    assert "families.path" in refused.stderr
    done = minitron("prune", *arguments, f"families.path={own_table}", env={OWN_TABLES: ""})
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/pruned/config.json").read_text())["intermediate_size"] == 16
    sized = minitron(
        "size", str(model), "ffn=16", "--json", f"families.path={own_table}", env={OWN_TABLES: ""}
    )
    assert json.loads(sized.stdout)["ffn"] == 16


def test_a_changed_table_of_ones_own_makes_a_checkpoint_another_input(tmp_path, own_table):
    use_tables(own_table)
    model = tiny_model(families()["olmo"], {}, tmp_path / "model")
    first = open_checkpoint(model).fingerprint
    own_table.write_text(
        own_table.read_text().replace("fixed: true", "fixed: true\n    inexact: why")
    )
    use_tables(own_table)
    assert open_checkpoint(model).fingerprint != first


def test_no_such_table(tmp_path):
    shown = minitron("families", f"families.path={tmp_path / 'none.yaml'}")
    assert shown.returncode == 2
    assert "none.yaml: no such table" in shown.stderr
    assert minitron("families", "t5").returncode == 2


def test_a_model_with_other_towers_is_refused_by_what_it_wraps(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(
        ValueError, match=r"wraps a text model .'llama'. together with other towers"
    ):
        family_of({"model_type": "llava", "text_config": config})


def test_tables_are_short_and_hold_one_family_each():
    for path in sorted(Path(TABLES).glob("*.yaml")):
        table = yaml.safe_load(path.read_text())
        assert table["model_type"] == path.stem
        assert len(path.read_text().splitlines()) <= 100, path


def test_a_table_reads_as_before_where_it_says_nothing_new():
    """Fingerprints of users' own tables hold how these read."""
    text = repr(families()["llama"])
    assert not any(
        word in text for word in ("counts=", "optional=", "size=", "follows=", "mtp", "stacked")
    )
    assert "follows='expert_ffn * shared_experts'" in repr(families()["glm4_moe"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": []}, "axis ffn: without keys of config.json it needs 'or'"),
        ({"config": [], "or": "hidden_size"}, "it is fixed, or follows others"),
        ({"follows": "width"}, "axis ffn: follows axes that are not declared"),
    ],
)
def test_an_axis_without_keys_says_where_its_size_comes_from(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_family(edited(tmp_path, lambda table: table["axes"]["ffn"].update(change)))


def test_sizes_that_follow_others_are_written_and_checked():
    family = families()["falcon_h1"]
    model = Architecture(family, tiny_config(family, {"mamba_d_ssm": 48}))
    targets = complete_targets(family, model.sizes, {"mamba_heads": 4})
    assert targets["mamba_width"] == 24
    assert model.resized(targets).config["mamba_d_ssm"] == 24
    shared = families()["glm4_moe"]
    sizes = Architecture(shared, tiny_config(shared, shared.proofs[0])).sizes
    assert complete_targets(shared, sizes, {"expert_ffn": 8})["shared_ffn"] == 16
    with pytest.raises(ValueError, match=r"plan.shared_ffn: expected 32, which is expert_ffn \* "):
        complete_targets(shared, sizes, {"shared_ffn": 8})


def test_lfm2_has_the_neurons_that_its_config_computes():
    family = families()["lfm2"]
    published = {"block_ff_dim": 12288, "hidden_size": 2048}  # of LFM2-1.2B
    model = Architecture(family, {**tiny_config(family, family.proofs[0]), **published, "block_auto_adjust_ff_dim": True})  # fmt: skip
    assert model.sizes["ffn"] == 8192
    written = model.resized({**model.sizes, "ffn": 4096}).config
    assert (written["intermediate_size"], written["block_auto_adjust_ff_dim"]) == (4096, False)
    # vLLM builds its layers of these
    alike = {"block_dim": 2048, "conv_dim": 2048, "conv_dim_out": 2048}
    model = Architecture(family, {**model.config, **alike})
    written = model.resized({**model.sizes, "hidden": 1536, "conv_channels": 1536}).config
    assert {written[name] for name in ("hidden_size", *alike)} == {1536}


def test_dense_first_layers_are_counted_anew():
    family = families()["deepseek_v3"]
    config = tiny_config(family, {**family.proofs[0], "first_k_dense_replace": 2})
    assert (
        cut_config(Cut(Architecture(family, config), {}, (1, 2, 3)))["first_k_dense_replace"] == 1
    )


def test_a_model_type_of_any_length_is_told_in_one_line():
    with pytest.raises(ValueError, match="is not supported") as error:
        family_of({"model_type": "x" * 100_000, "text_config": {"model_type": "y" * 100_000}})
    assert len(str(error.value)) < 2000
