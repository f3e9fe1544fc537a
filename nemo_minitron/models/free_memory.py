"""How much memory a process may still take: the machine's, its control group's, its own limits'."""

import resource
from pathlib import Path

import torch

_GROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_machine(), _control_group(), _own_limits())


def _field(path: Path, name: str) -> int | None:
    if not path.is_file():
        return None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return None


def _machine() -> int:
    known = _field(Path("/proc/meminfo"), "MemAvailable:")
    return 2**62 if known is None else known


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
    free = 2**62
    status = Path("/proc/self/status")
    for kind, field in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        limit = resource.getrlimit(kind)[0]
        used = _field(status, field)
        if limit != resource.RLIM_INFINITY and used is not None:
            free = min(free, limit - used)
    return free
