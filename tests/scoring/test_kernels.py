"""The kernels of the scoring pass."""

from pathlib import Path

import pytest
import torch

from nemo_minitron.scoring import fused
from tests.support.kernels import CARDS, built, run_interpreted


def test_the_kernels_are_right_in_tritons_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted_kernels.py"))


@pytest.mark.parametrize("card", CARDS)
def test_they_build_for_cards_that_are_not_here(card, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = pytest.importorskip("nemo_minitron.scoring.triton_kernels")
    for masked in (True, False):
        flags = dict.fromkeys(("MASKED", "MEAN", "L2", "VAR"), masked) | {"L2": True}
        types = dict.fromkeys(("mean_ptr", "l2_ptr", "var_ptr"), "*fp32")
        types |= {"x_ptr": "*bf16", "mask_ptr": "*u8"}
        blocks = {"BLOCK_S": kernels._BLOCK_S, "BLOCK_U": kernels._BLOCK_U}
        assert built(kernels._sums, card, {**flags, **blocks}, types)
    blocks = {"BLOCK_T": kernels._BLOCK_T, "BLOCK_H": kernels._BLOCK_H}
    types = {"before_ptr": "*bf16", "after_ptr": "*bf16", "cosine_ptr": "*fp32"}
    assert built(kernels._cosines, card, blocks, types)


def test_kernels_that_do_not_run_cost_speed_only(capsys):
    fused._kernels.cache_clear()
    for _ in range(2):  # there is no Triton, or no numbers there
        assert fused._kernels(torch.device("meta")) is None
    fused._kernels.cache_clear()
    said = capsys.readouterr().err
    assert said.startswith("score: without Triton's kernels, slower (") and said.count("\n") == 1
