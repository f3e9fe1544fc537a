"""Model cards: what the source's own card says of its licence goes along."""

import huggingface_hub
import pytest
import yaml

from nemo_minitron.release.card_metadata import licence_of, model_card, write_eval_results

OTHER = (
    "license: other\nlicense_name: open-model-license\nlicense_link: https://example.org/licence\n"
)


@pytest.mark.parametrize("head", ["license: apache-2.0\n", OTHER, "tags: [x]\n", ""])
def test_the_sources_licence_is_carried_over_whole(tmp_path, head):
    (tmp_path / "README.md").write_text((f"---\n{head}---\n" if head else "") + "# A model\n")
    found, untaken = licence_of(tmp_path)
    assert untaken == {}
    assert found == dict(
        line.split(": ", 1) for line in head.splitlines() if line.startswith("license")
    )
    card = huggingface_hub.ModelCard(model_card("# Smaller", "owner/model", found, "smaller", []))
    for name in ("license", "license_name", "license_link"):
        assert card.data.get(name) == found.get(name)
    assert card.data.base_model == "owner/model"
    assert licence_of(tmp_path / "absent") == ({}, {})


def test_a_card_of_any_kind_gives_what_it_names(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: [apache-2.0, mit]\n---\n# A model\n", encoding="utf-8-sig")
    found, _ = licence_of(tmp_path)
    assert found == {"license": ["apache-2.0", "mit"]}
    assert huggingface_hub.ModelCard(model_card("# A", None, found, "a", [])).data.license == [
        "apache-2.0",
        "mit",
    ]
    path.write_text("---\nlicense: [unclosed\n---\n# A model\n")
    assert licence_of(tmp_path) == ({}, {})
    path.write_bytes(b"---\nlicense: mit\n---\nna\xefve\n")
    assert licence_of(tmp_path) == ({"license": "mit"}, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("license_name", "x ```python\nimport os\n```"),
        ("license_link", 'open("/tmp/x","w")```'),
        ("license_link", "javascript:alert(1)"),
        ("license_link", "https://host/a b\n# heading"),
        ("license_link", "../../etc/passwd"),
        ("license", {"nested": ["mit"]}),
        ("license", ["mit", "a\nb"]),
    ],
)
def test_what_is_no_id_and_no_link_is_quoted_and_not_taken_over(tmp_path, field, value):
    front = yaml.safe_dump({"license": "other", "license_name": "n", field: value})
    (tmp_path / "README.md").write_text(f"---\n{front}---\n# A model\n")
    taken, untaken = licence_of(tmp_path)
    assert field not in taken
    assert untaken == {field: " ".join(str(value).split())}
    assert taken.keys() | untaken.keys() >= {"license", "license_name"}


@pytest.mark.parametrize(
    "front",
    [
        "a: &a [x, x]\nb: &b [*a, *a, *a, *a]\nlicense: [*b, *b, *b, *b]",
        "license: " + "[" * 900_000,
        "license: !!timestamp nonsense",
        "license: " + "1:" * 2000 + "1",
        "license: !!python/object/apply:os.getcwd []",
    ],
    ids=["aliases", "nested", "timestamp", "sexagesimal", "python"],
)
def test_front_matter_that_yaml_cannot_bear_names_no_licence(tmp_path, front):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    taken, untaken = licence_of(tmp_path)
    assert taken == {}
    assert len(str(untaken)) < 1000


def test_a_name_with_lines_in_it_stays_inside_the_front_matter():
    name = "small\n---\n# Not the card\n```python\nx\n```"
    results = [(name, name, "perplexity", 2.0)]
    card = huggingface_hub.ModelCard(model_card("# Smaller", f"owner/{name}", {}, name, results))
    assert card.text.strip() == "# Smaller"
    assert card.data.base_model is None  # no id of the hub
    assert card.data.model_name == " ".join(name.split())


def test_leaderboards_get_one_whole_number_of_each_task(tmp_path):
    metrics = {
        "hellaswag@10": {"acc": 0.4, "acc_stderr": 0.01, "acc_norm": 0.5},
        "lambada": {"perplexity": 12.0, "acc": 0.3},
        "wiki": {"word_perplexity": 9.0},
    }
    report = {
        "data_sets": {
            "hellaswag@10": "Rowan/hellaswag",
            "lambada": "EleutherAI/lambada_openai",
            "wiki": "a/b",
        },
        "better": {
            task: {m: "perplexity" not in m for m in found} for task, found in metrics.items()
        },
        "models": {"student": {"tasks": metrics}},
        "measured_on": {"task_limit": 10},
    }
    write_eval_results(tmp_path, report)
    assert not (tmp_path / ".eval_results").exists()
    report["measured_on"]["task_limit"] = None
    write_eval_results(tmp_path, report)
    found = yaml.safe_load((tmp_path / ".eval_results" / "minitron.yaml").read_text())
    assert [(entry["dataset"]["id"], entry["value"]) for entry in found] == [
        ("Rowan/hellaswag", 0.5), ("EleutherAI/lambada_openai", 0.3),
    ]  # fmt: skip
