# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest

from monai_patchqueue.queue.cpus import available_cpus


def cpus(root: Path, groups: dict[str, dict[str, str]], lines: str) -> float:
    for folder, files in groups.items():
        (root / "cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (root / "cgroup" / folder / name).write_text(content + "\n")
    (root / "own").write_text(lines)
    return available_cpus(root / "cgroup", root / "own")


@pytest.fixture(autouse=True)
def bound_to_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 1.5), ("5000 100000", 0.05), ("9900000 100000", 8)],
)
def test_a_quota_of_version_2_bounds_the_cpus(quota: str, expected: float, tmp_path: Path) -> None:
    assert cpus(tmp_path, {"job": {"cpu.max": quota}}, "0::/job\n") == expected


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    groups = {"": {}, "pod": {"cpu.max": "300000 100000"}, "pod/container": {"cpu.max": "400000 100000"}}
    assert cpus(tmp_path, groups, "0::/pod/container\n") == 3


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("50000", 0.5), ("400000", 4)])
def test_a_quota_of_version_1_bounds_the_cpus(quota: str, expected: float, tmp_path: Path) -> None:
    files = {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"}
    assert cpus(tmp_path, {"cpu/docker": files}, "4:cpu:/docker\n1:name=systemd:/docker\n") == expected


def test_without_limits_all_cpus_that_the_process_is_bound_to_count(tmp_path: Path) -> None:
    assert cpus(tmp_path, {}, "0::/nowhere\n") == 8


def test_where_nothing_binds_processes_all_cpus_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cpus(tmp_path, {}, "") == 64
