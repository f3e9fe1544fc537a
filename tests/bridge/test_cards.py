"""Model cards: what the source's own card says of its licence goes along."""

import huggingface_hub
import pytest

from nemo_minitron.bridge.cards import licence_of, model_card

OTHER = "license: other\nlicense_name: open-model-license\nlicense_link: https://example.org/licence\n"


@pytest.mark.parametrize("head", ["license: apache-2.0\n", OTHER, "tags: [x]\n", ""])
def test_the_sources_licence_is_carried_over_whole(tmp_path, head):
    (tmp_path / "README.md").write_text((f"---\n{head}---\n" if head else "") + "# A model\n")
    found = licence_of(tmp_path)
    assert found == dict(line.split(": ", 1) for line in head.splitlines() if line.startswith("license"))
    card = huggingface_hub.ModelCard(model_card("# Smaller", "owner/model", found, "smaller", []))
    for name in ("license", "license_name", "license_link"):
        assert card.data.get(name) == found.get(name)
    assert card.data.base_model == "owner/model"
    assert licence_of(tmp_path / "absent") == {}
