"""Limits read from small imitations of /proc and /sys, laid out as the kernel's documentation says."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from penjing import hardware

GIB = 1 << 30
MEMINFO = (
    "MemTotal:       67108864 kB\nMemFree:        1048576 kB\nMemAvailable:   33554432 kB\nHugePages_Total:       0\n"
)
V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
UNLIMITED_V1 = "9223372036854771712\n"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def v2(root: Path, files: dict[str, str]) -> Path:
    groups = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    return machine(root, {"proc/self/cgroup": "0::/pod/box\n", "proc/self/mountinfo": V2_MOUNT, **groups})


def v1(root: Path, files: dict[str, str], mounted: str = "/") -> Path:
    groups = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    lines = "9:cpu,cpuacct:/pod\n4:memory:/pod/box\n0::/\n"
    return machine(root, {"proc/self/cgroup": lines, "proc/self/mountinfo": V1_MOUNTS.format(root=mounted), **groups})


def test_without_control_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    root = machine(tmp_path, {})
    assert hardware.memory_limit_bytes(root) == 64 * GIB
    assert hardware.memory_available_bytes(root) == 32 * GIB
    assert hardware.cores(root) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("own", "parent", "expected"), [("max", "max", 64), ("8589934592", "max", 8), ("8589934592", "4294967296", 4)]
)
def test_version_2_the_tightest_group_on_the_way_up_counts(
    tmp_path: Path, own: str, parent: str, expected: int
) -> None:
    root = v2(tmp_path, {"pod/box/memory.max": own + "\n", "pod/memory.max": parent + "\n"})
    assert hardware.memory_limit_bytes(root) == expected * GIB


def test_version_1_unlimited_is_a_huge_number(tmp_path: Path) -> None:
    files = {"memory/memory.limit_in_bytes": UNLIMITED_V1, "memory/pod/box/memory.limit_in_bytes": UNLIMITED_V1}
    assert hardware.memory_limit_bytes(v1(tmp_path, files)) == 64 * GIB


def test_version_1_parent_limit(tmp_path: Path) -> None:
    files = {"memory/pod/memory.limit_in_bytes": str(2 * GIB), "memory/pod/box/memory.limit_in_bytes": UNLIMITED_V1}
    assert hardware.memory_limit_bytes(v1(tmp_path, files)) == 2 * GIB


def test_version_1_inside_a_container_the_mount_is_the_group(tmp_path: Path) -> None:
    files = {"memory/memory.limit_in_bytes": str(3 * GIB)}
    assert hardware.memory_limit_bytes(v1(tmp_path, files, mounted="/pod/box")) == 3 * GIB


def test_available_counts_page_cache_as_free(tmp_path: Path) -> None:
    files = {
        "pod/box/memory.max": str(8 * GIB),
        "pod/box/memory.current": str(7 * GIB),
        "pod/box/memory.stat": f"anon {4 * GIB}\ninactive_file {2 * GIB}\n",
    }
    assert hardware.memory_available_bytes(v2(tmp_path, files)) == 3 * GIB


def test_available_in_version_1_counts_the_whole_subtree(tmp_path: Path) -> None:
    files = {
        "memory/pod/box/memory.limit_in_bytes": str(8 * GIB),
        "memory/pod/box/memory.usage_in_bytes": str(7 * GIB),
        "memory/pod/box/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
    }
    assert hardware.memory_available_bytes(v1(tmp_path, files)) == 2 * GIB


@pytest.mark.parametrize(("quota", "expected"), [("100000 100000", 1), ("250000 100000", 2), ("50000 100000", 1)])
def test_a_quota_of_processor_time_limits_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert hardware.cores(v2(tmp_path / "v2", {"pod/cpu.max": quota + "\n"})) == expected
    limit, period = quota.split()
    files = {"cpu,cpuacct/pod/cpu.cfs_quota_us": limit, "cpu,cpuacct/pod/cpu.cfs_period_us": period}
    assert hardware.cores(v1(tmp_path / "v1", files)) == expected


def test_no_quota_leaves_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert hardware.cores(v2(tmp_path / "v2", {"pod/box/cpu.max": "max 100000\n"})) == 16
    files = {"cpu,cpuacct/pod/cpu.cfs_quota_us": "-1", "cpu,cpuacct/pod/cpu.cfs_period_us": "100000"}
    assert hardware.cores(v1(tmp_path / "v1", files)) == 16


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'NVIDIA H200, 143771'; echo 'NVIDIA T4, 15360'", [("NVIDIA H200", 143771), ("NVIDIA T4", 15360)]),
        ("echo 'NVIDIA GB10, [N/A]'", []),
        ("echo 'No devices were found'; exit 6", []),
    ],
)
def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: list[tuple[str, int]]) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert hardware.gpus() == tuple(hardware.Gpu(name, mib << 20) for name, mib in expected)


def test_this_machine() -> None:
    found = hardware.describe()
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert found.isa in {"scalar", "neon", "avx2", "avx-vnni", "avx512-vnni"}
    assert 0 < found.memory_available_bytes <= found.memory_bytes
    assert found.bandwidth_gbps > 0.1


def test_peak_memory_is_this_programs_own() -> None:
    """A child of a large process does not begin with its parent's peak, and counts what it takes itself."""
    ballast = bytearray(b"x") * (300 << 20)
    code = (
        "from penjing.hardware import peak_memory_bytes as peak\n"
        "before = peak(); taken = bytearray(b'x') * (100 << 20); print(before, peak())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, answer.stdout.split())
    assert before < 100 << 20 < len(ballast)
    assert before + (90 << 20) < after < before + (150 << 20)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "penjing", *arguments], capture_output=True, text=True)


def test_doctor_in_json() -> None:
    answer = run("doctor", "--json")
    assert answer.returncode == 0
    found = json.loads(answer.stdout)
    assert {"cores", "isa", "memory_bytes", "bandwidth_gbps", "missing"} <= found.keys()
    assert all(part["install"] for part in found["missing"])


def test_doctor_for_people() -> None:
    answer = run("doctor")
    assert answer.returncode == 0
    assert "GB/s" in answer.stdout


def test_penjing_alone_prints_its_help_and_nothing_else() -> None:
    answer = run()
    assert answer.returncode == 2
    assert "doctor" in answer.stdout
    assert answer.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["docto"], "doctor"), (["doctor", "--jsn"], "--json"), (["doctor", "now"], "now"), (["--nothing"], "--nothing")],
)
def test_bad_usage_is_one_line(arguments: list[str], said: str) -> None:
    answer = run(*arguments)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.startswith("penjing: ")
    assert said in answer.stderr
    assert answer.stderr.count("\n") == 1


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
@pytest.mark.parametrize("asked", [False, True])
def test_freed_arrays_are_returned_though_small_ones_lie_between_them(asked: bool) -> None:
    """glibc learns from the first large array that it frees, and keeps gaps of that size from then on: the control."""
    program = f"""
import numpy as np
from penjing import hardware
resident = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
if {asked}:
    hardware.return_freed_memory()
large = np.ones(24 << 20, np.uint8)
del large
pairs = [(np.ones(6 << 20, np.uint8), np.ones(4096, np.uint8)) for _ in range(20)]
full = resident()
small = [pair[1] for pair in pairs]
del pairs
print((full - resident()) >> 10)
"""
    returned = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(returned.stdout) >= 110 if asked else int(returned.stdout) <= 20
