# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import random
import threading
import time
import traceback
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import CacheDataset, Dataset, ThreadDataLoader
from monai.transforms import Compose, Invertd, RandFlipd, RandSpatialCropSamplesd, SpatialPadd
from torch.utils.data import IterableDataset, get_worker_info

from monai_patchqueue import PatchThreadDataLoader
from tests.processes import wait_for
from tests.volumes import meta, numbered

pytestmark = pytest.mark.timeout(60)

threads = {"use_thread_workers": True}
MODES: dict[str, dict[str, Any]] = {
    "buffered": {},
    "processes": {"num_workers": 2},
    "persistent processes": {"num_workers": 1, "persistent_workers": True},
    "threads": {"num_workers": 2, **threads},
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("patchqueue")]


def pairs(count: int = 24, cls: type[Dataset] = Dataset) -> Dataset:
    """Volumes whose image and label are equal, and so are their patches, if they come from the same place."""
    volume = numbered(64, 64)
    crop = RandSpatialCropSamplesd(["image", "label"], 16, num_samples=8, random_size=False)
    return cls([{"image": volume, "label": volume.copy()} for _ in range(count)], Compose([crop]))


class Numbers(Dataset):
    """Its own numbers; one may fail, or wait."""

    def __init__(self, count: int, at: int = -1, fault: Any = None) -> None:
        self.count, self.at, self.fault = count, at, fault

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        if index == self.at:
            self.fault()
        return index


class Shards(IterableDataset):
    """Numbers, shared out by worker info as torch's documentation has it."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for number in range(worker, 24, workers):
            time.sleep(0.002)
            yield number


def fail() -> None:
    raise KeyError("no such case")


def test_it_is_what_the_loader_is_that_it_replaces() -> None:
    loader = PatchThreadDataLoader(Numbers(4), 2, 0.01, 1, False, batch_size=2)
    assert isinstance(loader, ThreadDataLoader)
    assert isinstance(loader, torch.utils.data.DataLoader)
    assert (loader.buffer_size, loader.buffer_timeout, loader.repeats) == (2, 0.01, 1)


@every_mode
def test_batches_come_in_order_each_as_often_as_was_asked_for(mode: Any) -> None:
    loader = PatchThreadDataLoader(Numbers(7), repeats=2, batch_size=2, **mode)
    for _ in range(2):
        assert [b.tolist() for b in loader] == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5], [6], [6]]
    assert len(loader) == 8


@pytest.mark.parametrize("cls", [Dataset, CacheDataset])
@pytest.mark.parametrize("num_workers", [2, 4])
def test_image_and_label_always_match_between_thread_workers(cls: Any, num_workers: int) -> None:
    dataset = pairs(cls=cls) if cls is Dataset else CacheDataset(pairs(24).data, pairs().transform, progress=False)
    loader = PatchThreadDataLoader(dataset, batch_size=2, num_workers=num_workers, **threads)
    batches = list(loader)
    assert sum(len(batch["image"]) for batch in batches) == 192
    assert sum((batch["image"] != batch["label"]).flatten(1).any(1).sum().item() for batch in batches) == 0


def test_image_and_label_match_with_two_iterators_over_one_dataset() -> None:
    loaders = [PatchThreadDataLoader(dataset, batch_size=2) for dataset in [pairs(12)] * 2]
    for batches in zip(*loaders, *loaders, strict=True):
        assert all(torch.equal(batch["image"], batch["label"]) for batch in batches)


@every_mode
def test_iterable_datasets_are_sharded_right(mode: Any) -> None:
    loader = PatchThreadDataLoader(Shards(), batch_size=2, **mode)
    assert sorted(number for batch in loader for number in batch.tolist()) == list(range(24))


def test_thread_workers_take_turns_as_processes_do() -> None:
    processes = PatchThreadDataLoader(Shards(), batch_size=5, num_workers=3)
    loader = PatchThreadDataLoader(Shards(), batch_size=5, num_workers=3, **threads)
    assert [batch.tolist() for batch in loader] == [batch.tolist() for batch in processes]


def test_worker_info_is_each_threads_own_and_nobody_elses() -> None:
    seen = []

    class Asking(Numbers):
        def __getitem__(self, index: int) -> int:
            info = get_worker_info()
            assert info is not None
            seen.append((info.id, info.num_workers, info.dataset is self))
            return index

    for _ in PatchThreadDataLoader(Asking(16), num_workers=2, **threads):
        assert get_worker_info() is None
    assert set(seen) == {(0, 2, True), (1, 2, True)}


@every_mode
def test_a_workers_exception_reaches_the_consumer(mode: Any) -> None:
    iterator = iter(PatchThreadDataLoader(Numbers(6, 2, fail), **mode))
    assert [next(iterator).item(), next(iterator).item()] == [0, 1]
    with pytest.raises(KeyError, match="no such case") as caught:
        next(iterator)
    assert list(iterator) == []
    traceback.clear_frames(caught.tb)  # they keep torch's iterator, and one that garbage collection ends waits for 5 s


@every_mode
def test_leaving_early_and_iterating_again_starts_clean(mode: Any) -> None:
    loader = PatchThreadDataLoader(Numbers(8), buffer_size=2, **mode)
    for leave_after in (1, 3):
        assert [b.item() for b in islice(loader, leave_after)] == list(range(leave_after))
    assert [b.item() for b in loader] == list(range(8))


@every_mode
def test_several_iterators_at_once_do_not_mix(mode: Any) -> None:
    loader = PatchThreadDataLoader(Numbers(6), **mode)
    first, second = iter(loader), iter(loader)
    assert [(a.item(), b.item()) for a, b in zip(first, second, strict=True)] == [(n, n) for n in range(6)]


@pytest.mark.parametrize("mode", [MODES["buffered"], MODES["threads"]], ids=["buffered", "threads"])
def test_closing_does_not_wait_and_leaves_no_thread(mode: Any) -> None:
    over = threading.Event()
    loader = PatchThreadDataLoader(Numbers(8, 1, lambda: over.wait(30)), **mode) if not mode else None
    loader = loader or PatchThreadDataLoader(WaitsOnce(over), **mode)
    iterator = iter(loader)
    next(iterator)
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 0.5
    assert list(iterator) == []
    over.set()
    wait_for(lambda: not ours(), "the end of the threads")


class WaitsOnce(Numbers):
    """Waits at number 1 for an event, which is shared between threads' copies."""

    over: threading.Event

    def __init__(self, over: threading.Event) -> None:
        super().__init__(8)
        WaitsOnce.over = over

    def __getitem__(self, index: int) -> int:
        if index == 1:
            WaitsOnce.over.wait(30)
        return index


@pytest.mark.parametrize("drop", [False, True])
def test_an_iterator_that_is_over_or_given_up_leaves_no_thread(drop: bool) -> None:
    iterator = iter(PatchThreadDataLoader(Numbers(20), num_workers=2, **threads))
    if not drop:
        list(iterator)
    del iterator
    wait_for(lambda: not ours(), "the end of the threads")


def epochs(num_workers: int, **arguments: Any) -> list[Any]:
    torch.manual_seed(3)
    loader = PatchThreadDataLoader(pairs(6), num_workers=num_workers, shuffle=True, **threads, **arguments)
    return [[batch["image"].tolist() for batch in loader] for _ in range(2)]


def test_the_same_seed_gives_the_same_batches_with_any_number_of_threads() -> None:
    one, three = epochs(1), epochs(3)
    assert one == three == epochs(3)
    assert one[0] != one[1]


def test_thread_workers_leave_the_process_as_it_was() -> None:
    intra_op = torch.get_num_threads()
    python, numpy = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    list(PatchThreadDataLoader(pairs(4), num_workers=2, generator=torch.Generator(), **threads))
    torch_state = torch.get_rng_state()
    list(PatchThreadDataLoader(pairs(4), num_workers=2, generator=torch.Generator(), **threads))
    assert torch.get_num_threads() == intra_op
    assert random.getstate() == python
    assert np.random.get_state()[1].tolist() == numpy  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_a_worker_init_fn_of_the_users_own_is_called_in_each_thread() -> None:
    called = []

    def init(worker: int) -> None:
        info = get_worker_info()
        called.append((worker, info is not None and info.id, threading.current_thread().name))

    list(PatchThreadDataLoader(Numbers(4), num_workers=2, worker_init_fn=init, **threads))
    assert sorted(called) == [(0, 0, "patchqueue-loader-0"), (1, 1, "patchqueue-loader-1")]


def test_batches_of_thread_workers_can_be_inverted() -> None:
    pipeline = Compose([SpatialPadd("image", (12, 12)), RandFlipd("image", prob=1.0, spatial_axis=0)])
    dataset = Dataset([{"image": meta(numbered(10, 11))} for _ in range(2)], pipeline)
    invert = Invertd("image", pipeline, orig_keys="image", nearest_interp=False)
    (batch,) = PatchThreadDataLoader(dataset, batch_size=2, num_workers=1, **threads)
    for item in torch.utils.data.default_convert([{"image": image} for image in batch["image"]]):
        assert torch.equal(invert(item)["image"].as_tensor(), torch.from_numpy(numbered(10, 11)))


def test_the_loaders_other_arguments_are_honoured() -> None:
    batches = [[3, 1], [0, 2]]
    loader = PatchThreadDataLoader(Numbers(4), num_workers=2, batch_sampler=batches, **threads)
    assert [batch.tolist() for batch in loader] == batches
    single = PatchThreadDataLoader(Numbers(3), num_workers=2, batch_size=None, collate_fn=lambda x: -x, **threads)
    assert list(single) == [0, -1, -2]
    dropping = PatchThreadDataLoader(Numbers(5), num_workers=2, batch_size=2, drop_last=True, **threads)
    assert [batch.tolist() for batch in dropping] == [[0, 1], [2, 3]]
    late = PatchThreadDataLoader(Numbers(2, 0, lambda: time.sleep(1)), num_workers=1, timeout=0.1, **threads)
    with pytest.raises(RuntimeError, match=r"timeout=0\.1 s"):
        next(iter(late))


def test_transforms_that_cannot_be_copied_are_refused() -> None:
    lock = threading.Lock()

    class Locked(SpatialPadd):
        def __init__(self) -> None:
            super().__init__("image", 4)
            self.lock = lock

    with pytest.raises(TypeError, match="cannot be copied"):
        iter(PatchThreadDataLoader(Dataset([{}], Locked()), num_workers=1, **threads))
    wait_for(lambda: not ours(), "the end of the threads")


def test_a_copy_has_iterators_of_its_own() -> None:
    loader = PatchThreadDataLoader(Numbers(3), num_workers=1, **threads)
    iterator = iter(loader)
    copy.copy(loader).close()
    assert [batch.item() for batch in iterator] == [0, 1, 2]


def test_a_config_replaces_the_loaders_target_alone() -> None:
    config = {
        "data": [{"image": numbered(8, 8)}] * 4,
        "loader": {
            "_target_": "PatchThreadDataLoader",
            "dataset": {"_target_": "Dataset", "data": "@data"},
            "batch_size": 2,
            "num_workers": 2,
            "use_thread_workers": True,
            "collate_fn": {"_target_": "collate_patches", "_mode_": "callable"},
        },
    }
    loader = ConfigParser(config).get_parsed_content("loader")
    assert [tuple(batch["image"].shape) for batch in loader] == [(2, 1, 8, 8)] * 2
