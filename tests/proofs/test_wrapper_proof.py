"""The tables of multimodal models are proven, and a wrong one is found out."""

from dataclasses import replace

import pytest

from nemo_minitron.families import families, wrappers
from nemo_minitron.families.grammar import parse_row
from nemo_minitron.proofs.wrapper_proof import prove_wrapper

CASES = [(name, kind) for name, wrapper in wrappers().items() for kind in wrapper.text]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_table_holds_around_every_text_model(name, kind):
    wrapper = wrappers()[name]
    assert wrapper.text[kind] in families()
    found = list(prove_wrapper(wrapper, kind))
    assert len(found) == 3 and all(finding.holds for finding in found), found


@pytest.mark.parametrize("name", sorted(wrappers()))
def test_a_row_that_is_left_out_is_found_out(name):
    wrapper = wrappers()[name]
    present = [row for row in wrapper.rows if not row[0].pattern.startswith(r"model\.multi")]
    with pytest.raises((ValueError, RuntimeError)):
        rows = tuple(row for row in present if row != present[0])
        assert not all(
            each.holds
            for each in prove_wrapper(replace(wrapper, rows=rows), next(iter(wrapper.text)))
        )
        raise ValueError("a proof failed")


def test_a_row_whose_dimensions_are_swapped_is_found_out():
    wrapper = wrappers()["gemma3"]
    rows = tuple((pattern, parse_row("hidden any")) for pattern, _ in wrapper.rows)
    with pytest.raises(ValueError, match="hidden channels along dimension 0"):
        list(prove_wrapper(replace(wrapper, rows=rows), "gemma3_text"))


def test_channels_that_are_not_the_kept_ones_are_found_out():
    """A width that fits is not enough: an image must reach the channels that stay."""
    wrapper = wrappers()["gemma3"]
    rows = tuple((pattern, parse_row("any inner")) for pattern, _ in wrapper.rows)
    found = list(prove_wrapper(replace(wrapper, rows=rows, inner=("inner",)), "gemma3_text"))
    assert [finding.holds for finding in found] == [True, False, True]
