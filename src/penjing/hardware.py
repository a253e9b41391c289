"""What this machine has: cores, memory, bandwidth, instruction set, GPUs.

Limits are the control group's, not the host's: a container that may use 4 GB of a 256 GB host has 4 GB. Both versions
of control groups are read, from this process's own group up to the root, because any group on the way may be the
tightest. Nothing here needs torch or numpy.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

M_MMAP_THRESHOLD = -3  # of <malloc.h>
M_TRIM_THRESHOLD = -1


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Hardware:
    """This machine, as `describe` found it. Memory in bytes, bandwidth in 10⁹ bytes per second."""

    cpu: str
    cores: int
    isa: str
    memory_bytes: int
    memory_available_bytes: int
    memory_limited_by_cgroup: bool
    bandwidth_gbps: float
    gpus: tuple[Gpu, ...]


def describe() -> Hardware:
    """Everything at once; takes about half a second, most of it to measure the bandwidth."""
    limit = memory_limit_bytes()
    return Hardware(
        cpu=cpu_name(),
        cores=cores(),
        isa=isa(),
        memory_bytes=limit,
        memory_available_bytes=memory_available_bytes(),
        memory_limited_by_cgroup=limit < _physical_bytes(),
        bandwidth_gbps=bandwidth_gbps(),
        gpus=gpus(),
    )


def cores(root: Path = Path("/")) -> int:
    """Cores this process may use: its affinity, and no more than its control groups' quota (at least 1)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups("cpu", root):
        quota = _numbers(group / "cpu.max") or _numbers(group / "cpu.cfs_quota_us") + _numbers(
            group / "cpu.cfs_period_us"
        )
        if len(quota) == 2 and quota[0] > 0:
            count = min(count, max(1, quota[0] // quota[1]))
    return count


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """Bytes this process could ever have: the machine's memory, or the tightest control group's limit."""
    limits = [_limit(group) for group in _groups("memory", root)]
    return min([_physical_bytes(root), *(limit for limit in limits if limit)])


def memory_available_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be allocated now without swapping or being killed. Page cache counts as available."""
    room = [_meminfo(root)["MemAvailable"]] if _meminfo(root) else [_physical_bytes(root)]
    for group in _groups("memory", root):
        if limit := _limit(group):
            used = (_numbers(group / "memory.current") or _numbers(group / "memory.usage_in_bytes") or [0])[0]
            room.append(max(0, limit - max(0, used - _page_cache(group))))
    return min(room)


def return_freed_memory() -> None:
    """Have arrays of 4 MiB and more go back to the system as soon as they are freed, where the C library is glibc.

    By itself it keeps anything up to 32 MiB in one heap, where small parts in use hold the gaps between them: ten
    blocks of the 1.1-billion-parameter model by GPTQ then peak at 1.46 GB and grow with every block; so at 1.12, in
    the same time. Smaller ones come and go all the time, and the heap keeps 64 MiB for them: else it gives back its
    end at each, and a tenth of GPTQ's time goes into getting it again.
    """
    setting = getattr(ctypes.CDLL(None), "mallopt", None)
    if setting is not None:
        setting(M_MMAP_THRESHOLD, 4 << 20)
        setting(M_TRIM_THRESHOLD, 64 << 20)


def peak_memory_bytes() -> int:
    """The most memory this process has had resident so far.

    From /proc where there is one: `getrusage` begins with what the parent had when it started this program.
    """
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def cpu_name(root: Path = Path("/")) -> str:
    for line in _read(root / "proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def isa() -> str:
    """The instruction set that the kernels use here: `avx512-vnni`, `avx-vnni`, `avx2`, `neon`, `scalar`."""
    from ._native import isa as native_isa

    return native_isa()


def bandwidth_gbps(megabytes: int = 256, rounds: int = 5) -> float:
    """Measured speed at which the kernels' threads read memory, in 10⁹ bytes per second: the best of some rounds."""
    from ._native import read_bandwidth

    return round(read_bandwidth(megabytes << 20, rounds) / 1e9, 1)


def gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs, as `nvidia-smi` lists them; none when it is absent or fails."""
    if not (program := shutil.which("nvidia-smi")):
        return ()
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [line.rpartition(",") for line in answer.splitlines() if "," in line]
    return tuple(Gpu(name.strip(), int(mib) << 20) for name, _, mib in rows if mib.strip().isdigit())


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """This process's control groups that carry a controller, from its own up to the root, in both versions."""
    paths = {}  # controller, or '' for version 2 → the group's path in that hierarchy
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        filesystem, _, options = kind.split(" ", 2)
        version_2 = filesystem == "cgroup2"
        if not version_2 and not (filesystem == "cgroup" and controller in options.split(",")):
            continue
        mounted, point = mount.split()[3:5]
        path = paths.get("" if version_2 else controller, "/")
        inside = path[len(mounted.rstrip("/")) :] if path.startswith(mounted) else ""
        top = root / point.lstrip("/")
        group = top / inside.strip("/")
        yield from (directory for directory in [group, *group.parents] if directory.is_relative_to(top))


def _limit(group: Path) -> int | None:
    """A group's limit of memory in bytes; None where it has none."""
    return next(iter(_numbers(group / "memory.max") or _numbers(group / "memory.limit_in_bytes")), None)


def _page_cache(group: Path) -> int:
    """Bytes charged to a group that the kernel can drop at once."""
    stat = dict(line.split(" ", 1) for line in _read(group / "memory.stat").splitlines())
    return int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)


def _physical_bytes(root: Path = Path("/")) -> int:
    meminfo = _meminfo(root)
    return meminfo["MemTotal"] if meminfo else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _meminfo(root: Path) -> dict[str, int]:
    rows = [line.split() for line in _read(root / "proc/meminfo").splitlines()]
    return {row[0].rstrip(":"): int(row[1]) << 10 for row in rows if row[-1] == "kB"}


def _numbers(file: Path) -> list[int]:
    """The whole numbers in a small file; empty if it is absent or says `max`."""
    words = _read(file).split()
    return [int(word) for word in words] if words and all(word.lstrip("-").isdigit() for word in words) else []


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
