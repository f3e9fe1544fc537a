"""A smaller vocabulary through the stages: plan, prune, logits, distill, evaluate, export."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from nemo_minitron.cli.main import main
from nemo_minitron.config.compose import load_config
from nemo_minitron.evaluation.export_vocabulary import exported_ids, in_runs
from nemo_minitron.families import families
from nemo_minitron.families.table import OWN_TABLES, TABLES
from nemo_minitron.plugin.transforms import Pruning
from nemo_minitron.pruning.plan_file import read_plan
from nemo_minitron.release import gguf_tokenizer
from nemo_minitron.release.gguf_export import write_gguf
from nemo_minitron.stages import distill
from nemo_minitron.stages import logits as logits_stage
from nemo_minitron.workspace.manifest import read_manifest, write_json
from nemo_minitron.workspace.training_log import read_log
from tests.support.models import logits, make_model
from tests.support.runs import refused

SIZE = 280
MEASURED = ["evaluate.speed=false", "evaluate.prompts=0"]


@pytest.fixture
def cut_words(words):
    """A training whose student has fewer entries and is otherwise as its teacher."""
    kept = [word for word in words if not word.startswith("plan.")]
    return [
        *kept,
        f"plan.vocab={SIZE}",
        "data.calibration.samples=40",
        "data.calibration.sequence_length=16",
    ]


def run(place, words, *stages):
    for stage in stages:
        assert main([stage, f"workspace={place}", *words]) == 0


def file_of(words):
    return next(word for word in words if word.startswith("source.model=")).partition("=")[2]


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_embedding_and_head_go_and_what_is_left_computes_the_same(
    tmp_path, cut_words, teacher, tied
):
    source = make_model(
        tmp_path / "source",
        "llama",
        vocab_size=300,
        tie_word_embeddings=tied,
        eos_token_id=[1, 299],
    )
    for path in teacher.glob("*token*"):
        shutil.copy(path, source)
    run(tmp_path / "ws", [*cut_words, f"source.model={source}"], "prune")
    plan, pruned = read_plan(tmp_path / "ws/plan"), tmp_path / "ws/pruned"
    kept_V = plan.keep["vocab"]
    assert (plan.after["vocab"], len(kept_V)) == (SIZE, SIZE)
    written = json.loads((tmp_path / "ws/plan/plan.json").read_text())["vocabulary"]
    assert written == {"entries": SIZE, "needed": written["needed"], "counted": 40 * 17,
                       "covered": written["covered"], "asked": "plan.vocab=280"}  # fmt: skip
    assert 0.5 < written["covered"] < 1
    assert ("lm_head.weight" in load_file(pruned / "model.safetensors")) != tied
    config = json.loads((pruned / "config.json").read_text())
    assert config["vocab_size"] == SIZE
    assert kept_V[config["eos_token_id"]].tolist() == [1, 299]
    ours = torch.tensor(AutoTokenizer.from_pretrained(pruned)("the model reads")["input_ids"])[None]
    torch.testing.assert_close(logits(pruned, ours), logits(source, kept_V[ours])[..., kept_V])


def test_a_token_that_only_the_settings_name_stays_under_its_new_id(tmp_path, cut_words, teacher):
    source = make_model(tmp_path / "source", "llama", vocab_size=304)
    for path in teacher.glob("*token*"):
        shutil.copy(path, source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    tool = {
        "content": "<tool>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
    }
    settings["added_tokens_decoder"] = {
        "0": {**tool, "content": "<s>", "special": True},
        "300": {**tool, "special": True},
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(source).convert_tokens_to_ids("<tool>") == 300
    run(tmp_path / "ws", [*cut_words, f"source.model={source}"], "prune")
    kept_V = read_plan(tmp_path / "ws/plan").keep["vocab"]
    ours = AutoTokenizer.from_pretrained(tmp_path / "ws/pruned").convert_tokens_to_ids("<tool>")
    assert kept_V[ours] == 300


def test_the_full_size_gives_back_the_same_model_and_tokenizer(tmp_path, cut_words):
    words = [*cut_words, "plan.vocab=300"]
    run(tmp_path / "ws", words, "prune")
    pruned, source = tmp_path / "ws/pruned", Path(file_of(words))
    same = (
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    )
    run(tmp_path / "other", [*words, "plan.vocab=null", "plan.drop_layers=[2]"], "prune")
    for name in same[1:]:
        assert (pruned / name).read_bytes() == (source / name).read_bytes()
    ours, theirs = load_file(pruned / same[0]), load_file(source / same[0])
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )
    assert "vocab" not in read_plan(tmp_path / "ws/plan").keep


def test_what_asks_for_no_vocabulary_is_made_as_before(tmp_path, words):
    run(tmp_path, words, "prune")
    assert set(read_manifest(tmp_path / "plan").config) == {"ffn"}
    assert "vocabulary" not in json.loads((tmp_path / "plan/plan.json").read_text())
    config = load_config("config", [f"workspace={tmp_path}", *words])
    assert "outside" not in json.dumps(dict(distill.recipe(config).settings))
    assert "outside" not in logits_stage.recipe(config).settings


def test_coverage_takes_as_few_entries_as_make_the_share(tmp_path, cut_words):
    words = [word for word in cut_words if not word.startswith("plan.vocab")]
    sizes = []
    for share in (0.5, 0.95):
        run(tmp_path / str(share), [*words, f"plan.vocab_coverage={share}"], "plan")
        plan = read_plan(tmp_path / str(share) / "plan")
        assert plan.vocabulary.covered >= share
        sizes.append(plan.after["vocab"])
    assert 258 <= sizes[0] < sizes[1] < 300


@pytest.mark.parametrize("outside", ["renormalise", "tail"])
def test_the_teacher_beside_the_student_and_its_cached_logits_teach_the_same(
    tmp_path, cut_words, outside
):
    words = [*cut_words, f"distill.outside={outside}", "plan.ffn=20"]
    run(tmp_path / "online", words, "prune", "distill")
    cached = [*words, "distill.teacher_logits=cache", f"distill.cache.entries={SIZE}"]
    run(tmp_path / "cached", cached, "prune", "logits", "distill")
    logs = [read_log(tmp_path / name / "student/metrics.jsonl") for name in ("online", "cached")]
    for one, other in zip(*logs, strict=True):
        for name in ("loss", "divergence", "val_loss", "val_divergence"):
            assert name not in one or one[name] == pytest.approx(other[name], rel=2e-3, abs=2e-4)
    facts = json.loads((tmp_path / "cached/logits/logits.json").read_text())
    assert (facts["outside"], facts["vocabulary"]) == (outside, SIZE)


def test_models_of_different_vocabularies_are_measured_by_the_byte(tmp_path, capsys, cut_words):
    words = [*cut_words, "evaluate.speed=false", "evaluate.prompts=2", "evaluate.written_tokens=4"]
    run(tmp_path, words, "prune", "distill", "evaluate", "export")
    report = json.loads((tmp_path / "report/report.json").read_text())
    rows = report["models"]
    source, pruned = rows["teacher"], rows["pruned"]
    assert (
        pruned["divergence"] == pytest.approx(0, abs=1e-5) and pruned["top1"] == 1
    )  # on the same pieces
    assert pruned["tokens_per_byte"] > source["tokens_per_byte"]
    bytes_per_token = 1 / source["tokens_per_byte"]
    for row in rows.values():
        assert row["loss"] == pytest.approx(row["bits_per_byte"] * math.log(2) * bytes_per_token)
        assert row["retention"] == pytest.approx(source["perplexity"] / row["perplexity"])
    assert pruned["own_loss"] < pruned["loss"]
    assert {row["metric"] for row in report["compared"]} == {"bits per byte"}
    told = capsys.readouterr()
    assert "bits per byte" in told.out and "are measured by the byte" not in told.out
    assert "reads the held-out text in its own tokens and is measured by the byte" in told.err
    assert "of the held-out text's tokens are entries that are gone" in told.err
    page = (tmp_path / "report/report.html").read_text()
    assert "measured by the byte" in page and "the vocabulary keeps 280 entries" in page
    card = (tmp_path / "export/README.md").read_text()
    assert "cut from 300 to 280 entries" in card and "measured by the byte" in card
    lineage = json.loads((tmp_path / "export/minitron.json").read_text())
    assert lineage["vocabulary"]["entries"] == SIZE
    exported = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert len(exported) == SIZE
    assert exported.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "pruned").get_vocab()


def test_an_export_is_measured_by_the_byte_in_any_workspace(tmp_path, capsys, cut_words):
    words = [*cut_words, "evaluate.speed=false", "evaluate.prompts=0", "evaluate.tasks=[]"]
    run(tmp_path / "ws", words, "prune", "distill", "evaluate", "export")
    export, place = tmp_path / "ws/export", tmp_path / "other"
    whole = [word for word in words if not word.startswith("plan.")]
    run(place, [*whole, f"evaluate.model={export}"], "download", "evaluate")
    ours, theirs = (
        json.loads((folder / "report/report.json").read_text())
        for folder in (place, tmp_path / "ws")
    )
    measures = ("loss", "bits_per_byte", "tokens_per_byte", "retention", "divergence", "top1")
    for name in measures:
        one, other = (report["models"]["student"][name] for report in (ours, theirs))
        assert one == pytest.approx(other, rel=1e-4), name
    assert ours["vocabulary"] == theirs["vocabulary"]
    assert ours["measured_on"]["entries"] == theirs["measured_on"]["entries"]
    # beside it, one with as many other entries, and then the same
    other = shutil.copytree(export, tmp_path / "cut-otherwise")
    lineage = json.loads((export / "minitron.json").read_text())
    kept_V = read_plan(tmp_path / "ws/plan").keep["vocab"].tolist()
    assert lineage["vocabulary"]["ids"] == in_runs(kept_V)
    assert exported_ids(export, SIZE) == kept_V
    asked = [*whole, f"evaluate.model={export}", f"+evaluate.beside.twin={other}"]
    run(place, asked, "evaluate")
    capsys.readouterr()
    for ids, told in (
        (in_runs([0, *range(20, 299)]), f"{other} was cut from: "),
        (
            "0-99999999999",
            f"expected {SIZE} ascending ids, as in '0-255,300', found '0-99999999999'",
        ),
        ("5-1,7", "damaged: vocabulary.ids"),
        (
            None,
            f"the vocabulary of {other} was cut, and its minitron.json does not say which entries",
        ),
    ):
        chosen = {**lineage["vocabulary"], "ids": ids}
        if ids is None:
            del chosen["ids"]  # as an earlier version wrote it
        (other / "minitron.json").write_text(json.dumps({**lineage, "vocabulary": chosen}))
        line = refused(capsys, "evaluate", f"workspace={place}", *asked)
        assert told in line and ("damaged" in line or "evaluate.beside.twin: " in line)
    line = refused(capsys, "evaluate", f"workspace={place}", *whole, f"evaluate.model={other}")
    assert "evaluate.model: the vocabulary of" in line and "does not say which entries" in line


def test_ids_are_written_in_runs(tmp_path):
    for ids, text in (([0], "0"), ([0, 1, 2], "0-2"), ([0, 2, 3, 9], "0,2-3,9")):
        assert in_runs(ids) == text
        write_json(tmp_path / "minitron.json", {"vocabulary": {"entries": len(ids), "ids": text}})
        assert exported_ids(tmp_path, len(ids)) == ids
    for text in ("", "1,1", "3-2", "1-2,2", "one", "1-", "9999999999"):
        write_json(tmp_path / "minitron.json", {"vocabulary": {"entries": 2, "ids": text}})
        with pytest.raises(
            ValueError, match=r"minitron\.json: damaged: vocabulary\.ids: expected 2"
        ):
            exported_ids(tmp_path, 2)
    write_json(tmp_path / "minitron.json", {"vocabulary": 5})
    with pytest.raises(
        ValueError, match=r"minitron\.json: damaged: vocabulary: expected an object"
    ):
        exported_ids(tmp_path, 2)


def test_a_teacher_that_reads_other_tokens_is_refused(tmp_path, capsys, cut_words, teacher):
    run(tmp_path / "ws", cut_words, "prune")
    other = shutil.copytree(teacher, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["t"], vocab["h"] = vocab["h"], vocab["t"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    capsys.readouterr()
    line = refused(
        capsys, "distill", f"workspace={tmp_path / 'ws'}", *cut_words, f"distill.teacher={other}"
    )
    assert (
        "distill.teacher: " in line and "gives its token ids other meanings than the model" in line
    )


def test_a_table_whose_vocabulary_is_fixed_is_heeded(tmp_path, capsys, cut_words, monkeypatch):
    monkeypatch.setenv(OWN_TABLES, "")
    table = (TABLES / "llama.yaml").read_text()
    own = tmp_path / "llama.yaml"
    own.write_text(
        table.replace("{config: [vocab_size], scope: model}", "{config: [vocab_size], fixed: true}")
    )
    try:
        line = refused(capsys, "plan", f"workspace={tmp_path}", *cut_words, f"families.path={own}")
    finally:
        monkeypatch.undo()
        families.cache_clear()
    assert "plan.vocab: the table of llama says that its vocabulary is fixed" in line


def test_a_gguf_file_whose_tokenizer_is_cut_does_not_go_out_as_gguf(
    tmp_path, capsys, cut_words, teacher
):
    pytest.importorskip("gguf")
    file = write_gguf(teacher, teacher, "tiny", ["q8_0"], "gpt-2", "apache-2.0")["q8_0"]
    file = file.rename(tmp_path / "tiny.gguf")
    words = [*cut_words, f"source.model={file}", "export.gguf=[f32]", "plan.vocab=290"]
    assert main(["download", f"workspace={tmp_path / 'ws'}", *words]) == 0
    capsys.readouterr()
    line = refused(capsys, "plan", f"workspace={tmp_path / 'ws'}", *words)
    assert "export.gguf: the tokenizer of a model that came as GGUF goes out as it came in" in line
    later = [*words, "export.gguf=[]", *MEASURED]
    run(tmp_path / "ws", later, "prune")  # and as a folder it does
    assert len(AutoTokenizer.from_pretrained(tmp_path / "ws/pruned")) == 290
    asked = [f"workspace={tmp_path / 'ws'}", *later, "export.gguf=[f32]", "export.gguf_pre=gpt-2"]
    told = "goes out as it came in, with 300 tokens here"
    capsys.readouterr()
    assert told in refused(capsys, "distill", *asked)
    assert not (tmp_path / "ws/student").exists()
    run(tmp_path / "ws", later, "distill", "evaluate")
    capsys.readouterr()
    line = refused(capsys, "export", *asked)
    assert told in line and "the plan cut the vocabulary to 290" in line
    assert not (tmp_path / "ws/export").exists()


def test_the_pre_tokenizer_of_a_smaller_vocabulary_is_named_by_the_sources(
    tmp_path, cut_words, teacher, monkeypatch
):
    gguf = pytest.importorskip("gguf")
    text = "the model reads \n 3.3"
    ids = AutoTokenizer.from_pretrained(teacher).encode(text)
    names = {"other": ["0" * 64], "tiny": [hashlib.sha256(str(ids).encode()).hexdigest()]}
    table = tmp_path / "names.yaml"  # as llama.cpp's, which has no tokenizer as small as this one
    table.write_text(json.dumps({"text": text, "names": names}))
    monkeypatch.setattr(gguf_tokenizer, "_TABLE", table)
    words = [*cut_words, *MEASURED, "export.gguf=[f32]"]
    run(tmp_path / "ws", words, "prune", "distill", "evaluate", "export")
    (file,) = (tmp_path / "ws/export").glob("*.gguf")
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.pre"].contents() == "tiny"
    exported = AutoTokenizer.from_pretrained(tmp_path / "ws/export").get_vocab()
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens == sorted(exported, key=exported.get) and len(tokens) == SIZE


def test_a_module_in_memory_has_no_tokenizer_to_cut(tmp_path, cut_words):
    run(tmp_path, cut_words, "plan")
    with pytest.raises(ValueError, match="the plan cuts the vocabulary"):
        Pruning(tmp_path / "plan")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["plan.vocab=301"], "plan.vocab: expected 1 to 300 (the source's size), found 301"),
        (["plan.vocab=100"], "plan.vocab: expected at least 258, which any text needs"),
        (
            ["plan.vocab_coverage=0.9"],
            "plan.vocab and plan.vocab_coverage: give one of them, not both",
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, capsys, cut_words, more, told):
    assert told in refused(capsys, "plan", f"workspace={tmp_path}", *cut_words, *more)
