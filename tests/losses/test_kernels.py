"""The kernels of the loss, and how many tokens they take at a time."""

import itertools
from pathlib import Path

import pytest
import torch

from nemo_minitron.losses.fused_linear_loss import cuda_rows
from nemo_minitron.losses.loss_terms import kernels_for
from tests.support.kernels import CARDS, built, run_interpreted


def test_the_kernels_are_right_in_tritons_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted_kernels.py"))


@pytest.mark.parametrize("card", CARDS)
def test_they_build_for_cards_that_are_not_here(card, monkeypatch, tmp_path):
    """Triton's interpreter runs more than its compiler takes: a name may change its type there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = pytest.importorskip("nemo_minitron.losses.kernels")
    numbers = ("by_kl", "by_ce", "inverse_tau", "student_cap", "teacher_cap")
    types = {"labels": "*i64", "grad": "*bf16", "counters": "*i32"}
    types |= dict.fromkeys(("student", "teacher", "shares", "terms", "sums"), "*fp32")
    types |= dict.fromkeys(numbers, "fp32")
    # sums and gradients, without gradients, and those of a shard's ranks one after the other
    ways = [(True, True, True), (True, True, False), (True, False, False), (False, True, True)]
    for (sums, grads, wanted), taught in itertools.product(ways, (True, False)):
        flags = dict.fromkeys(
            ("TAUGHT", "SOFTENED", "STUDENT_CAPPED", "TEACHER_CAPPED", "SHARED"), taught
        )
        sizes = {"COLUMNS": 4096, "BLOCK": 2048, "PARTS": 3, "SUMMED": 3, "PADDED": 4, "ROWS": 4}
        constants = {"SUMS": sums, "GRADIENTS": grads, "WANTED": wanted, **flags, **sizes}
        assert built(kernels._terms_kernel, card, constants, types)


def test_the_cpu_has_no_kernels():
    assert kernels_for(torch.device("cpu"), torch.float32) is None


def test_chunks_on_cuda_fit_the_memory_and_their_gradients_meet_few_times():
    """Qwen 2.5's vocabulary, hidden 4096: with the logits of both models in float32 the gradients need no room of their own."""
    head_VH = torch.empty(151_936, 4096, dtype=torch.bfloat16, device="meta")
    chunk, group = cuda_rows(8192, head_VH, 2, 1)
    held = 151_936 * (8 * chunk + 2 * group)
    assert held <= 2 * head_VH.numel() + 640 * 2**20
    assert -(-8192 // group) == 3 and chunk % 128 == 0
    assert cuda_rows(5, head_VH, 2, 1) == (5, 5)
    smol_VH = torch.empty(49_152, 576, dtype=torch.bfloat16, device="meta")
    assert cuda_rows(32_768, smol_VH, 2, 1) == (2048, 8192)
    small_VH = torch.empty(512, 64, dtype=torch.float32, device="meta")
    assert cuda_rows(3000, small_VH, 2, 1)[1] == 3000
