"""How much memory a process may still take: the machine's, its control group's, its own limits'."""

import resource
from pathlib import Path

import psutil
import torch

_GROUP = Path("/sys/fs/cgroup")
"""The container's own; psutil tells the machine's memory only, and what a process has taken."""


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(psutil.virtual_memory().available, _control_group(), _own_limits())


def _control_group() -> int:
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        if (_GROUP / limit).is_file() and (_GROUP / used).is_file():
            text = (_GROUP / limit).read_text(encoding="utf-8").strip()
            if text != "max":
                taken = int((_GROUP / used).read_text(encoding="utf-8"))
                return int(text) - taken + _reclaimable(_GROUP / Path(used).parent / "memory.stat")
    return 2**62


def _reclaimable(stat: Path) -> int:
    """Bytes of file pages that the control group counts as used but can reclaim."""
    if stat.is_file():
        for line in stat.read_text(encoding="utf-8").splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    return 0


def _own_limits() -> int:
    taken = psutil.Process().memory_info()
    # RLIMIT_DATA does not count the stack, which psutil's data (Linux only) holds: some 100 kB too
    # careful
    used = {resource.RLIMIT_AS: taken.vms, resource.RLIMIT_DATA: getattr(taken, "data", 0)}
    limits = {kind: resource.getrlimit(kind)[0] for kind in used}
    return min(
        (limits[kind] - used[kind] for kind in used if limits[kind] != resource.RLIM_INFINITY),
        default=2**62,
    )
