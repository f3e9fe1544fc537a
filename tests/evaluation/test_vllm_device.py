"""Where vLLM computes is its own choice, so that a device it would not take is refused."""

import pytest

from nemo_minitron.evaluation.speed import _elsewhere
from nemo_minitron.evaluation.vllm_device import misplaced


@pytest.mark.parametrize(
    ("device", "sees_gpu", "release", "said"),
    [
        ("auto", True, "0.32.0", None),
        ("cuda", True, "0.32.0", None),
        ("cuda:0", True, "0.32.0", None),
        ("cpu", False, "0.32.0+cpu", None),
        ("cpu", True, "0.32.0+cpu", None),
        ("auto", True, "0.32.0+cpu", None),
        ("cuda:1", True, "0.32.0", "set CUDA_VISIBLE_DEVICES=1 and cuda instead"),
        ("cpu", True, "0.32.0", "vLLM 0.32.0 takes the GPU that it sees; set auto, or evaluate.backend=hf"),
        ("cuda", True, "0.32.0+cpu", "vLLM 0.32.0+cpu is built for CPUs; set auto, or install one for GPUs"),
    ],
)  # fmt: skip
def test_a_device_that_vllm_would_not_take_is_refused(device, sees_gpu, release, said):
    found = misplaced(device, sees_gpu, release)
    assert found is None if said is None else found.endswith(said)


def test_speed_of_another_device_is_no_speed_of_this_one():
    assert "takes the first device it sees" in _elsewhere("cuda:1")
    assert _elsewhere("auto") is None
