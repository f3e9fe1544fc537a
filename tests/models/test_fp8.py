"""A teacher whose projections are multiplied in eight bits; the CPU computes what a card would."""

import copy
import functools
import threading

import pytest
import torch
from torch import nn

from nemo_minitron.cli.main import main
from nemo_minitron.families import families
from nemo_minitron.losses.divergences import forward_kl
from nemo_minitron.models import fp8
from nemo_minitron.models.causal_lm import frozen, hidden_states, layers_of, load_model
from nemo_minitron.models.fp8 import Fp8Linear, SharedInput, check_device, fits, quantise_rows
from nemo_minitron.models.int8 import load_teacher, quantise
from nemo_minitron.plugin.knowledge_distillation import KnowledgeDistillation
from nemo_minitron.workspace.training_log import read_log
from tests.support.models import make_model

FITTING = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
           "head_dim": 16}  # fmt: skip
SIZES = {
    "llama": FITTING,
    "gemma2": {**FITTING, "query_pre_attn_scalar": 16},
    "phi3": {**FITTING, "head_dim": 8},
    "qwen2": {**FITTING, "head_dim": 8},
    "qwen3_moe": {**FITTING, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def linear(dtype, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, bias=bias).to(dtype)
    with torch.no_grad():
        layer.weight[3] *= 1000  # a row of its own scale
        layer.weight[5] = 0
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_product_is_that_of_the_quantised_numbers(dtype, bias):
    layer = linear(dtype, bias)
    small = Fp8Linear(layer)
    assert small.quantised_OI.dtype == torch.float8_e4m3fn and small.quantised_OI.is_contiguous()
    assert small.scale_O.dtype == torch.float32 and small.scale_O.is_contiguous()
    x = torch.randn(2, 7, 64, dtype=dtype)
    x[0, 2] *= 100
    x[1, 3] = 0
    x_TI, scale_T1 = quantise_rows(x.flatten(0, 1))
    expected = (x_TI.double() * scale_T1.double()) @ (
        small.quantised_OI.double() * small.scale_O.double()[:, None]
    ).T
    expected = expected + small.bias.double() if bias else expected
    found = small(x)
    assert found.dtype == dtype and found.shape == (2, 7, 48)
    error = (found.flatten(0, 1).double() - expected).abs()
    assert (error <= 2**-8 * expected.abs() + 1e-5 * expected.abs().amax(1, keepdim=True)).all()
    exact = layer.double()(x.double())
    assert (found.double() - exact).norm() < 0.08 * exact.norm()


def test_rows_of_zeros_stay_and_numbers_that_are_not_finite_show():
    x_TI = torch.randn(4, 64)
    x_TI[0], x_TI[1, 3], x_TI[2, 3] = 0, float("nan"), float("inf")
    found = Fp8Linear(linear(torch.float32, bias=False))(x_TI)
    assert (found[0] == 0).all() and not found[1:3].isfinite().any() and found[3].isfinite().all()
    tiny, scale = quantise_rows(torch.full((1, 16), 1e-44))
    assert tiny.float().isfinite().all() and scale.isfinite().all()


def test_shapes_and_autocast_are_those_of_a_linear_layer():
    layer = linear(torch.float32)
    small = Fp8Linear(layer)
    for shape in ((64,), (0, 64), (1, 64), (2, 3, 64)):
        assert small(torch.ones(shape)).shape == layer(torch.ones(shape)).shape
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert small(torch.ones(3, 64)).dtype == layer(torch.ones(3, 64)).dtype == torch.bfloat16
    assert small(torch.ones(3, 64)[:, ::1].T.contiguous().T).shape == (3, 48)  # in another order


def test_what_is_compiled_is_the_same():
    small = Fp8Linear(linear(torch.bfloat16), SharedInput())
    x_TI = torch.randn(20, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        whole = torch.compile(small, backend="eager", fullgraph=True)
        assert torch.equal(whole(x_TI), small(x_TI))


def test_one_kernel_serves_any_number_of_rows_and_none_where_nothing_compiles(capsys, monkeypatch):
    compiled, whole = [], torch.compile

    def count(graph, _):
        compiled.append(graph)
        return graph.forward

    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(whole, backend=count))
    kernel = fp8.one_kernel.__wrapped__("cpu")
    for width in (32, 64):
        for rows in (20, 33, 64, width):
            x_TI = torch.randn(rows, width)
            torch._dynamo.mark_static(x_TI, 1)
            for found, expected in zip(kernel(x_TI), quantise_rows(x_TI), strict=True):
                assert torch.equal(found.float(), expected.float())
    assert len(compiled) == 3 and not capsys.readouterr().err  # one of them to see that it works
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(whole, backend=fail))
    assert fp8.one_kernel.__wrapped__("cpu") is quantise_rows
    assert "slower without one (RuntimeError: no compiler)" in capsys.readouterr().err


def test_projections_of_one_input_quantise_it_once(monkeypatch, tmp_path):
    folder = make_model(tmp_path / "m", "llama", **FITTING)
    teacher, family = load_teacher(folder, "fp8"), families()["llama"]
    seen = []
    whole = fp8.quantised
    monkeypatch.setattr(fp8, "quantised", lambda x_TI: (seen.append(x_TI.shape[1]), whole(x_TI))[1])
    with frozen(teacher):
        hidden_states(teacher, family, torch.arange(20)[None])
    assert seen == [32, 64, 32, 48] * 3  # queries, keys and values; output; gate and up; down
    holders = {m._shared for m in teacher.modules() if isinstance(m, Fp8Linear) and m._shared}
    assert all(holder._held is None for holder in holders)  # gone with its input


def test_a_shared_input_is_known_by_itself_alone():
    shared, x = SharedInput(), torch.randn(3, 16)
    first = shared.quantised(x)
    assert shared.quantised(x) is first
    assert shared.quantised(x.clone()) is not first
    first = shared.quantised(x)
    x += 1
    assert torch.equal(shared.quantised(x)[1], quantise_rows(x)[1])
    wrong = []

    def many(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(200):
            mine = torch.randn(2, 16, generator=generator)
            if not torch.equal(shared.quantised(mine)[1], quantise_rows(mine)[1]):
                wrong.append(seed)

    threads = [threading.Thread(target=many, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", SIZES)
def test_a_teacher_in_fp8_says_nearly_the_same(tmp_path, name):
    folder = make_model(tmp_path / "m", name, **SIZES[name])
    family = families()[name]
    exact = load_model(folder, "bfloat16")
    with torch.no_grad():
        for layer in layers_of(exact, family):
            for parameter in layer.parameters():  # of random models the softmax is nearly a choice
                parameter.mul_(0.5 if parameter.dim() > 1 else 1)
    small = quantise(copy.deepcopy(exact), family, "fp8")
    kinds = [type(module) for layer in layers_of(small, family) for module in layer.modules()]
    assert nn.Linear not in kinds and Fp8Linear in kinds
    tokens_BS = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        states = [hidden_states(model, family, tokens_BS).float() for model in (exact, small)]
        logits = [model(tokens_BS).logits.float().flatten(0, 1) for model in (exact, small)]
    assert 0 < (states[1] - states[0]).norm() < 0.2 * states[0].norm()
    student = torch.randn(logits[0].shape, generator=torch.Generator().manual_seed(0))
    losses = [float(forward_kl(teacher, student).mean()) for teacher in logits]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_sizes_that_do_not_fit_stay_and_are_counted(capsys, tmp_path, words_often):
    model = nn.ModuleDict(
        {"fits": nn.Linear(32, 16), "in": nn.Linear(24, 16), "out": nn.Linear(16, 24)}
    )
    assert [fits(layer) for layer in model.values()] == [True, False, False]
    folder = make_model(tmp_path / "m", "llama", **{**FITTING, "intermediate_size": 40})
    teacher = load_teacher(folder, "fp8")
    mlp = teacher.model.layers[0].mlp
    assert type(mlp.up_proj) is type(mlp.down_proj) is nn.Linear
    assert mlp.up_proj.weight.dtype == torch.bfloat16
    assert isinstance(teacher.model.layers[0].self_attn.q_proj, Fp8Linear)
    words = [f"workspace={tmp_path}/w", *words_often, "trainer.max_steps=1"]
    assert main(["prune", *words]) == 0
    assert main(["distill", *words, "distill.teacher_dtype=fp8"]) == 0
    told = "distill.teacher_dtype=fp8: 21 linear layers stay in bfloat16: no multiples of 16 wide"
    assert told in capsys.readouterr().err


def test_a_student_learns_from_a_teacher_in_fp8(tmp_path, words_often, teacher):
    source = make_model(tmp_path / "m", "llama", vocab_size=300, **FITTING)
    for path in teacher.iterdir():
        if "token" in path.name:
            (source / path.name).write_bytes(path.read_bytes())
    ends = []
    more = [f"source.model={source}", "trainer.max_steps=4", "trainer.val_check_interval=4"]
    for name in ("bfloat16", "fp8"):
        words = [f"workspace={tmp_path}/{name}", *words_often, *more]
        assert main(["prune", *words]) == 0
        assert main(["distill", *words, f"distill.teacher_dtype={name}"]) == 0
        ends.append(read_log(tmp_path / name / "student" / "metrics.jsonl")[-1]["val_divergence"])
    assert ends[0] != ends[1]
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


def test_another_teacher_in_fp8_takes_the_place_of_the_first(tmp_path):
    folders = [make_model(tmp_path / f"{n}", "qwen2", n, **SIZES["qwen2"]) for n in (1, 2)]
    first, second = (load_teacher(folder, "fp8") for folder in folders)
    distillation = KnowledgeDistillation(first)
    distillation.replace_teacher(second)
    tokens_BS = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(first(tokens_BS).logits, second(tokens_BS).logits)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["distill.teacher_place=cpu"], "the CPU has no product in fp8; use teacher_place=device"),
        (["distill.teacher_place=shard", "training.parallel=shard"], "nor with teacher_dtype=int8 or fp8"),
    ],
)  # fmt: skip
def test_places_that_do_not_go_with_fp8_are_refused(capsys, tmp_path, words_often, more, said):
    place = [f"workspace={tmp_path}/w", *words_often, "trainer.max_steps=1"]
    assert main(["prune", *place]) == 0
    assert main(["distill", *place, "distill.teacher_dtype=fp8", *more]) == 2
    assert said in capsys.readouterr().err


def test_devices_without_the_product_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"compute capability 8.9 or more, found mps; use .*int8"):
        check_device(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ValueError, match=r"found A100 of 8.0; use .*int8.*bfloat16"):
        check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    check_device(torch.device("cuda"))


def test_a_card_without_the_product_is_refused_before_anything_is_read(
    capsys, monkeypatch, tmp_path, words_often
):
    words = [f"workspace={tmp_path}/w", *words_often, "trainer.max_steps=1"]
    assert main(["prune", *words]) == 0
    words += ["distill.teacher_dtype=fp8", "trainer.accelerator=auto"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    for stage, more in (("distill", []), ("logits", ["distill.teacher_logits=cache"])):
        assert main([stage, *words, *more]) == 2
        assert "found A100 of 8.0" in capsys.readouterr().err
    assert not (tmp_path / "w" / "tokens").exists()
