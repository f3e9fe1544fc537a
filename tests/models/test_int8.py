"""A teacher in eight bits."""

import pytest
import torch
from torch import nn

from nemo_minitron.cli.main import main
from nemo_minitron.families import families
from nemo_minitron.models.causal_lm import head_of, layers_of, load_model
from nemo_minitron.models.int8 import Int8Linear, load_teacher
from nemo_minitron.workspace.training_log import read_log
from tests.support.models import make_model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_is_off_by_half_a_step_at_most_and_so_is_its_product(dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias).to(dtype)
    with torch.no_grad():
        linear.weight[3] *= 100  # a row of its own scale
        linear.weight[5] = 0
    quantised = Int8Linear(linear)
    assert quantised.quantised_OI.dtype == torch.int8
    step_O = linear.weight.float().abs().amax(1) / 127
    rounding = 0 if dtype == torch.float32 else 2**-8
    error_OI = (quantised.weight.float() - linear.weight.float()).abs()
    assert (error_OI <= step_O[:, None] * 0.5001 + rounding * linear.weight.float().abs()).all()
    x = torch.randn(7, 64, dtype=dtype) * 20  # whole numbers times these leave float16's range
    expected = nn.functional.linear(
        x.double(), quantised.quantised_OI.double() * quantised.scale_O.double()[:, None]
    )
    expected = expected + linear.bias.double() if bias else expected
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    error = (quantised(x).double() - expected).abs().max()
    assert error < tolerance * expected.abs().max()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_under_autocast_products_stay_in_the_range_of_float16(dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(2048, 16, bias=bias)
    with torch.no_grad():
        linear.weight.clamp_(-0.02, 0.02)
    x = torch.randn(3, 2048)
    x[0] = 3 * linear.weight[0].sign()  # 70, and 500,000 in the weight's whole numbers
    quantised = Int8Linear(linear)
    with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
        found, expected = quantised(x.to(dtype)), linear(x.to(dtype))
    assert found.dtype == expected.dtype == torch.float16
    assert (found - expected).abs().max() < 5e-3 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_a_teacher_in_eight_bits_says_nearly_the_same(tmp_path, name):
    folder = make_model(tmp_path / "m", name, tie_word_embeddings=name == "gemma2")
    exact, small = load_model(folder), load_teacher(folder, "int8")
    family = families()[name]
    kinds = {type(module) for layer in layers_of(small, family) for module in layer.modules()}
    assert nn.Linear not in kinds and Int8Linear in kinds
    assert torch.equal(head_of(small), head_of(exact))
    with torch.no_grad():
        log_p, log_q = (
            model(torch.arange(30)[None]).logits.log_softmax(-1) for model in (exact, small)
        )
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert 0 < divergence < 0.02
    taken = [
        sum(t.nbytes for t in layers_of(m, family)[0].state_dict().values()) for m in (exact, small)
    ]
    assert taken[1] < 0.45 * taken[0]


def test_a_student_learns_from_a_teacher_in_eight_bits(tmp_path, words_often):
    ends = []
    for name, more in (("exact", []), ("small", ["distill.teacher_dtype=int8"])):
        for stage in ("prune", "distill"):
            assert (
                main(
                    [
                        stage,
                        f"workspace={tmp_path}/{name}",
                        *words_often,
                        *more,
                        "trainer.max_steps=4",
                        "trainer.val_check_interval=4",
                    ]
                )
                == 0
            )
        ends.append(read_log(tmp_path / name / "student" / "metrics.jsonl")[-1]["val_divergence"])
    assert ends[0] != ends[1]
    assert ends[1] == pytest.approx(ends[0], rel=0.02)
