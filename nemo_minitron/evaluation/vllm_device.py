"""Where vLLM computes is its own choice: whether that is the device which is asked for."""


def misplaced(device: str, sees_gpu: bool, release: str) -> str | None:
    """Why vLLM would compute elsewhere than on a device, and what to do; None: it would not.

    Args:
        device: as in ``evaluate``.
        sees_gpu: whether a GPU is visible.
        release: vLLM's version; that of a build for CPUs says so (``vllm.platforms``), and any other build
            takes the GPU that it sees.
    """
    kind, _, number = device.partition(":")
    if number not in ("", "0"):
        return (
            "expected auto, cpu or cuda, for vLLM takes the first device it sees; set "
            f"CUDA_VISIBLE_DEVICES={number} and {kind} instead"
        )
    for_cpus = "cpu" in release
    if kind == "cpu" and sees_gpu and not for_cpus:
        return f"vLLM {release} takes the GPU that it sees; set auto, or evaluate.backend=hf"
    if kind == "cuda" and for_cpus:
        return f"vLLM {release} is built for CPUs; set auto, or install one for GPUs"
    return None
