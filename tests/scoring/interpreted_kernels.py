"""Triton's kernels against PyTorch's operations: in Triton's interpreter, or on a GPU where there is one.

``test_kernels.py`` runs this file in a process of its own: Triton decides when it is imported.
"""

import pytest
import torch

from nemo_minitron.scoring import triton_kernels
from nemo_minitron.scoring.depth import cosines
from nemo_minitron.scoring.importance import AGGREGATIONS, finished, over_sequence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels():
    return triton_kernels


@pytest.mark.parametrize(
    ("shape", "masked", "dtype"),
    [
        ((3, 130, 9), True, torch.bfloat16),
        ((3, 130, 9), False, torch.float32),
        ((1, 64, 64), True, torch.float32),
        ((1, 64, 64), False, torch.bfloat16),
        ((2, 200, 80), True, torch.float32),
        ((2, 200, 80), False, torch.bfloat16),
    ],
)
def test_sums_over_positions(kernels, shape, masked, dtype):
    torch.manual_seed(0)
    x_BSU = (torch.randn(shape) + torch.arange(shape[2]) / 4).to(DEVICE, dtype)
    mask_BS = None
    count = shape[1]
    if masked:
        mask_BS = torch.rand(shape[:2], device=DEVICE) < 0.7
        mask_BS[0, 70:] = mask_BS[-1] = False  # whole blocks, and a whole sample
        x_BSU = x_BSU.masked_fill(~mask_BS[..., None], torch.nan)
        count = mask_BS.sum(1, keepdim=True).clamp(min=1)
    expected = over_sequence(x_BSU, mask_BS, AGGREGATIONS)
    for hows in (AGGREGATIONS, ("mean",), ("l2",), ("var",)):
        found = kernels.sequence_sums(x_BSU, mask_BS, hows)
        assert set(found) == set(hows)
        for how, part_BKU in found.items():
            value_BU = finished(part_BKU[None], how, count)[0]
            torch.testing.assert_close(value_BU, expected[how], rtol=1e-5, atol=1e-5)
    across_BSU = x_BSU.transpose(1, 2).contiguous().transpose(1, 2)  # units are not side by side
    again = kernels.sequence_sums(across_BSU, mask_BS, ("mean",))["mean"]
    torch.testing.assert_close(again, kernels.sequence_sums(x_BSU, mask_BS, ("mean",))["mean"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cosines_of_hidden_states(kernels, dtype):
    torch.manual_seed(0)
    before_BSH, after_BSH = torch.randn(2, 3, 37, 96, device=DEVICE, dtype=dtype)
    after_BSH[0, 0] = 0
    torch.testing.assert_close(
        kernels.cosines(before_BSH, after_BSH), cosines(before_BSH, after_BSH), rtol=1e-5, atol=1e-6
    )
