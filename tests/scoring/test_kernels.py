"""The kernels of the scoring pass."""

from pathlib import Path

import torch

from nemo_minitron.scoring import fused
from tests.support.kernels import run_interpreted


def test_the_kernels_are_right_in_tritons_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted_kernels.py"))


def test_kernels_that_do_not_run_cost_speed_only(capsys):
    fused._kernels.cache_clear()
    for _ in range(2):  # there is no Triton, or no numbers there
        assert fused._kernels(torch.device("meta")) is None
    fused._kernels.cache_clear()
    said = capsys.readouterr().err
    assert said.startswith("score: without Triton's kernels, slower (") and said.count("\n") == 1
