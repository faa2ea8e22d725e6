# SPDX-License-Identifier: Apache-2.0
"""Memory is known before a run, kept during it, and given back after it; a small ``/dev/shm`` does not matter."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
from monai.data import Dataset
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from monai_patchqueue import PatchQueueLoader, RandUniformPatchd
from monai_patchqueue.data import sizing
from monai_patchqueue.queue.errors import WorkerDiedError
from monai_patchqueue.queue.memory import available_memory
from monai_patchqueue.queue.slab import HAS_MEMFD
from tests.pipelines import Patches, digest, drawn, lines, make_loader
from tests.processes import child, idle, in_child, pss, resident, shared_memory_files, wait_for, workers

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is measured as Linux tells it"),
]

MIB = 2**20
SIZE = 64  # patches of 1 MiB


def make_volume(number: int) -> np.ndarray[Any, Any]:
    return np.full((1, 80, 80, 80), number, np.float32)


def big_patches(volumes: int, num_workers: int = 0, **arguments: Any) -> PatchQueueLoader:
    """A loader of patches of 1 MiB, eight of each volume."""
    crop = RandUniformPatchd("image", spatial_size=SIZE, num_samples=8)
    dataset = Dataset([{"image": number} for number in range(volumes)], Compose([Make("image"), crop]))
    return make_loader(dataset, num_workers, **{"batch_size": 4, "shuffle": True, **arguments})


class Make:
    """Makes a volume instead of loading one."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        return {self.key: make_volume(item[self.key])}


def growth(run: Callable[[], object]) -> int:
    """How much more memory a forked process and its children have, at most, while something runs."""
    # Its parent counts too: a page that they share with it is otherwise half theirs before, and two thirds after.
    family = os.getppid()
    gc.collect()
    before = pss(family)
    over, most = threading.Event(), [before]

    def look() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], pss(family))

    watcher = threading.Thread(target=look)
    watcher.start()
    run()
    over.set()
    watcher.join()
    return most[0] - before


@pytest.mark.parametrize("kind", ["inline", "thread", "process"])
def test_a_run_takes_the_memory_that_was_announced(kind: str) -> None:
    arguments: dict[str, Any] = {"queue_length": 280}
    if kind != "inline":
        arguments |= {"num_workers": 2, "worker_type": kind}
    volume = make_volume(0).nbytes + 8 * MIB  # and its patches

    def measure() -> tuple[int, int]:
        announced = []

        def run() -> None:
            with big_patches(40, **arguments) as loader:
                announced.append(loader.memory_bytes())
                for _ in range(2):  # in the first epoch the window is still growing
                    for _ in loader:
                        pass

        taken = growth(run)
        return announced[0], taken

    announced, taken = in_child(measure)
    print(f"{kind}: announced {announced / MIB:.0f} MiB, taken {taken / MIB:.0f} MiB")
    assert announced > 290 * MIB
    assert 0.85 * announced <= taken <= 1.15 * announced + (1 if kind == "inline" else 2) * volume


@pytest.mark.parametrize("budget", [64 * MIB, "64MiB", "fraction"])
def test_a_budget_decides_the_queues_length(budget: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_memory", lambda: 1000 * MIB)
    asked = 0.064 if budget == "fraction" else budget
    for ranks in (1, 2):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", f"{ranks}")
        loader = big_patches(12, ram_budget=asked)
        next(iter(loader))
        assert loader.stats().queue_length == 64 // ranks
        assert loader.stats().slab_bytes == (64 // ranks + 2 * 8 + 4) * MIB  # two volumes, and a batch, come on top


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"ram_budget": "900GiB"},
            r"ram_budget='900GiB' allows a queue of 900.0 GiB .* × 1.0 MiB a patch = .* of [\d.]+ .iB available",
        ),
        (
            {"ram_budget": "500KiB"},
            r"allows a queue of 500.0 KiB(.|\n)*\(1 slots for the queue \+ 20 for .* × 1.0 MiB .* = 21.0 MiB",
        ),
    ],
)
def test_a_budget_that_cannot_be_is_refused_at_construction_with_the_arithmetic(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        big_patches(6, **arguments)


def test_a_queue_that_does_not_fit_is_refused_with_the_arithmetic_before_it_is_made() -> None:
    loader = big_patches(10**5, queue_length=8 * 10**5)
    for use in (loader.memory_bytes, lambda: next(iter(loader))):
        with pytest.raises(ValueError, match=r"800000 slots .* \+ 20 for .* × 1.0 MiB a patch = 781.3 GiB of .*"):
            use()


@pytest.fixture
def limited_group() -> Iterator[Callable[[int], None]]:
    """A function that puts the calling process into a control group with so much memory."""
    root = Path("/sys/fs/cgroup")
    v1 = (root / "memory/memory.limit_in_bytes").exists()
    group = (root / "memory" if v1 else root) / f"patchqueue_test_{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"this machine lets no control group be made: {error}")

    def enter(nbytes: int) -> None:
        (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(f"{nbytes}")
        (group / "cgroup.procs").write_text(f"{os.getpid()}")

    try:
        if not v1 and not (group / "memory.max").exists():
            pytest.skip("the control group made here has no memory controller")
        yield enter
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text(), "an empty control group")
        group.rmdir()


def test_a_control_groups_limit_counts(limited_group: Callable[[int], None]) -> None:
    def measure() -> tuple[int, int, str]:
        limited_group(300 * MIB)
        loader = big_patches(40, ram_budget=0.25)
        with pytest.raises(ValueError, match="does not fit") as caught:
            big_patches(60, queue_length=400).memory_bytes()
        return available_memory(), loader.memory_bytes(), str(caught.value)

    available, announced, message = in_child(measure)
    assert 250 * MIB < available <= 300 * MIB
    assert 80 * MIB < announced < 115 * MIB
    assert "400" not in message.split("available")[0].split("of ")[-1]


def test_a_worker_that_the_kernel_kills_for_its_memory_is_an_error_that_says_so(
    limited_group: Callable[[int], None],
) -> None:
    def greedy(volume: int) -> None:
        if volume == 3:
            np.ones(400 * MIB, np.uint8)

    def run() -> str:
        limited_group(200 * MIB)
        with make_loader(Patches([4] * 6, fault=greedy), 2, batch_size=4) as loader:
            with pytest.raises(WorkerDiedError) as caught:
                drawn(loader)
            return str(caught.value)

    message = in_child(run)
    assert "volume 3 (case_3.nii.gz)" in message
    assert "SIGKILL (the kernel does this when memory runs out)" in message


def test_a_worker_whose_memory_is_limited_names_the_volume_that_asked_for_too_much() -> None:
    def limit(worker: int) -> None:
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + 200 * MIB, resource.RLIM_INFINITY))

    def greedy(volume: int) -> None:
        if volume == 3:
            np.ones(400 * MIB, np.uint8)

    arguments: dict[str, Any] = {"worker_init_fn": limit, "batch_size": 4}
    message = r"volume 3 \(case_3.nii.gz\)(.|\n)*Unable to allocate 400"
    with (
        make_loader(Patches([4] * 6, fault=greedy), 2, **arguments) as loader,
        pytest.raises(MemoryError, match=message),
    ):
        drawn(loader)


# -- /dev/shm


def mount_small_shm(mebibytes: int) -> str | None:
    """Give this process a ``/dev/shm`` of its own; why not, where the machine does not let it."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private, recursive = 0x20000, 0x10000000, 1 << 18, 1 << 14
    if libc.unshare(new_mounts) and libc.unshare(new_mounts | new_user):
        return f"no mount namespace: {os.strerror(ctypes.get_errno())}"
    if libc.mount(b"none", b"/", None, private | recursive, None):
        return f"no private mounts: {os.strerror(ctypes.get_errno())}"
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={mebibytes}m".encode()):
        return f"no tmpfs: {os.strerror(ctypes.get_errno())}"
    return None


@pytest.mark.skipif(not HAS_MEMFD, reason="without memfd the slab lies in /dev/shm")
@pytest.mark.parametrize("mebibytes", [1, 64])
def test_dev_shm_may_be_small(mebibytes: int) -> None:
    def run() -> str | tuple[str, int, set[str]]:
        failure = mount_small_shm(mebibytes)
        if failure:
            return failure
        found = set()
        with big_patches(10, 2, queue_length=70) as loader:
            batches = []
            for batch in loader:
                batches.append(batch)
                found |= shared_memory_files()
            size = os.statvfs("/dev/shm")
            return digest(batches), size.f_blocks * size.f_frsize, found | shared_memory_files()

    result = in_child(run)
    if isinstance(result, str):
        pytest.skip(result)
    batches, size, files = result
    assert size == mebibytes * MIB
    assert batches == digest(big_patches(10, queue_length=70))
    assert not files


def test_without_memfd_a_killed_main_process_leaves_nothing_in_dev_shm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monai_patchqueue.queue.slab import SlabHandle

    monkeypatch.setitem(SlabHandle.__init__.__kwdefaults__, "memfd", False)
    before = shared_memory_files()

    def main() -> None:
        batches = iter(make_loader([4] * 20, 2, batch_size=4, queue_length=8))
        next(batches)
        (tmp_path / "found").write_text("\n".join(shared_memory_files() - before))
        signal.pause()

    with child(main) as process:
        wait_for(lambda: (tmp_path / "found").exists() and (tmp_path / "found").read_text(), "shared memory")
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        found = set(lines(tmp_path / "found"))
        wait_for(lambda: not found & shared_memory_files(), "an empty /dev/shm", seconds=5)


# -- fifty epochs


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Four small volumes on disk."""
    folder = tmp_path_factory.mktemp("small")
    records = [{"image": str(folder / f"case_{case}.nii.gz")} for case in range(4)]
    for case, record in enumerate(records):
        nib.save(nib.Nifti1Image(np.full((24, 24, 24), case, np.int16), np.eye(4)), record["image"])
    return records


def descriptors() -> list[int]:
    """Open files of this process and of each of its children."""
    return sorted(process.num_fds() for process in (psutil.Process(), *psutil.Process().children()))


@pytest.mark.parametrize(
    "kind", ["inline", "thread", "process", pytest.param("process, not persistent", marks=pytest.mark.slow)]
)
def test_neither_memory_nor_open_files_grow_over_fifty_epochs(kind: str, files: list[dict[str, str]]) -> None:
    crop = RandUniformPatchd("image", spatial_size=16, num_samples=4)
    dataset = Dataset(files, Compose([LoadImaged("image"), EnsureChannelFirstd("image"), crop]))
    worker, _, rest = kind.partition(",")
    arguments: dict[str, Any] = {"batch_size": 4, "shuffle": True, "persistent_workers": not rest}
    if worker != "inline":
        arguments |= {"num_workers": 2, "worker_type": worker}

    def run() -> tuple[dict[int, int], dict[int, list[int]], set[str]]:
        memory, opened = {}, {}
        before = shared_memory_files()
        with make_loader(dataset, **arguments) as loader:
            for epoch in range(1, 51):
                assert sum(len(batch["image"]) for batch in loader) == 16
                if epoch in (5, 50):
                    wait_for(lambda: idle(workers()), "the end of what is prepared ahead")
                    gc.collect()
                    memory[epoch], opened[epoch] = resident(), descriptors()
        return memory, opened, shared_memory_files() - before

    memory, opened, left = in_child(run)
    print(f"{kind}: grows by {(memory[50] - memory[5]) / MIB:.2f} MiB")
    assert memory[50] - memory[5] < 5 * MIB
    assert opened[50] == opened[5]
    assert not left
