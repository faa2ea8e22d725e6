# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest

from monai_patchqueue.queue import memory
from monai_patchqueue.queue.memory import available_memory, format_bytes, parse_budget, ranks_on_this_host


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("8GiB", 8 * 2**30),
        ("8 gib", 8 * 2**30),
        ("1.5MB", 1_500_000),
        ("1.5 k", 1500),
        ("2Ti", 2 * 2**40),
        ("1000", 1000),
        ("12B", 12),
        (1.0, 1.0),
        (0.5, 0.5),
        (np.float64(0.5), 0.5),
        (2e9, 2_000_000_000),
        (1, 1),
        (4096, 4096),
    ],
)
def test_a_budget_is_a_fraction_or_bytes(budget: float | str, expected: float) -> None:
    found = parse_budget(budget)
    assert found == expected
    assert (isinstance(found, float) == isinstance(budget, float) and found <= 1) or isinstance(found, int)


@pytest.mark.parametrize("budget", [0, -1, 0.0, -0.5, float("nan"), float("inf"), "", "8XB", "GiB", "-3GB", "1e3"])
def test_a_budget_that_makes_no_sense_is_refused_with_what_was_found(budget: float | str) -> None:
    with pytest.raises(ValueError, match="ram_budget=") as caught:
        parse_budget(budget)
    assert repr(budget) in str(caught.value)


def test_a_budget_of_no_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="more than nothing"):
        parse_budget("0GB")


@pytest.mark.parametrize("budget", [True, None, b"8GiB", [8]])
def test_a_budget_of_another_kind_is_refused(budget: object) -> None:
    with pytest.raises(TypeError, match="'8GiB'"):
        parse_budget(budget)  # type: ignore[arg-type]


def test_bytes_are_written_for_people() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 1536 * 1024, 5 * 2**30, 3 * 2**41)] == [
        "0.0 B",
        "1023.0 B",
        "1.0 KiB",
        "1.5 MiB",
        "5.0 GiB",
        "6144.0 GiB",
    ]


def group(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


def rest(root: Path, lines: str) -> list[int]:
    own = root / "own"
    own.write_text(lines)
    return memory._control_group_rest(root / "cgroup", own)


def test_version_2_groups_leave_their_limit_less_what_is_used_and_cannot_be_reclaimed(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root, {"memory.stat": "inactive_file 0"})  # the root has no limit
    group(root / "slurm", {"memory.max": "max", "memory.current": 900})
    stat = "anon 400\ninactive_file 150\nactive_file 20"
    group(root / "slurm/job", {"memory.max": 1000, "memory.current": 700, "memory.stat": stat})
    group(root / "slurm/job/step", {"memory.max": 600, "memory.current": 200, "memory.stat": "inactive_file 10"})
    assert sorted(rest(tmp_path, "0::/slurm/job/step\n")) == [410, 450]
    assert rest(tmp_path, "0::/slurm/job\n") == [450]
    assert rest(tmp_path, "0::/slurm\n") == []


def test_version_1_groups_are_understood_too(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root / "memory", {"memory.limit_in_bytes": 9223372036854771712, "memory.usage_in_bytes": 5000})
    stat = "inactive_file 1\ntotal_inactive_file 100"
    group(
        root / "memory/docker/abc",
        {"memory.limit_in_bytes": 1000, "memory.usage_in_bytes": 400, "memory.stat": stat},
    )
    lines = "12:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/docker/abc\n"
    assert min(rest(tmp_path, lines)) == 700


def test_a_container_that_sees_only_its_own_group_is_understood(tmp_path: Path) -> None:
    group(tmp_path / "cgroup", {"memory.max": 1000, "memory.current": 400, "memory.stat": ""})
    assert rest(tmp_path, "0::/system.slice/docker-abc.scope\n") == [600]
    assert rest(tmp_path, "0::/\n") == [600]


def test_a_group_over_its_limit_leaves_nothing_rather_than_less(tmp_path: Path) -> None:
    group(tmp_path / "cgroup/a", {"memory.max": 100, "memory.current": 400, "memory.stat": ""})
    assert rest(tmp_path, "0::/a\n") == [0]


@pytest.mark.parametrize("lines", ["", "0::/nowhere\n", "3:cpu:/\n"])
def test_no_groups_are_no_limit(tmp_path: Path, lines: str) -> None:
    assert rest(tmp_path, lines) == []
    assert memory._control_group_rest(tmp_path / "none", tmp_path / "none") == []


def test_the_machines_memory_bounds_what_is_available() -> None:
    assert 0 <= available_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize(("value", "ranks"), [(None, 1), ("", 1), ("4", 4), ("0", 1)])
def test_ranks_are_those_that_torchrun_says(value: str | None, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    assert ranks_on_this_host() == ranks
