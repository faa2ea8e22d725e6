# SPDX-License-Identifier: Apache-2.0
"""What items go through on their way out of a process, and how processes end."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose, Invertd, RandFlipd, RandSpatialCropd

from monai_patchqueue import ProcessBufferLoader
from monai_patchqueue.data.feeds import BufferedIterator
from monai_patchqueue.data.process_feed import ProcessFeed
from monai_patchqueue.queue.errors import WorkerDiedError
from tests.pipelines import append_line, lines
from tests.processes import child, die, in_child, is_alive, is_helper, shared_memory_files, wait_for
from tests.volumes import meta, numbered

pytestmark = pytest.mark.timeout(60)

SIZE = 10_000


class Volumes:
    """Tensors that hold their number; a class of the module, so that any start method can send it."""

    def __init__(self, count: int, size: int = SIZE) -> None:
        self.count, self.size = count, size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.count):
            yield {"image": torch.full((self.size,), number), "array": np.full(self.size, number), "number": number}


def as_numbered(items: list[dict[str, Any]]) -> bool:
    return all((item["image"] == n).all() and (item["array"] == n).all() for n, item in enumerate(items))


def family() -> list[int]:
    """Processes that a buffer has started, and those that they have."""
    buffers = [process for process in psutil.Process().children() if not is_helper(process)]
    return [pid for buffer in buffers for pid in (buffer.pid, *(process.pid for process in buffer.children()))]


def mapped() -> int:
    """Segments of shared memory that this process has."""
    return Path("/proc/self/maps").read_text().count("memfd:monai_patchqueue")


TENSORS = {
    "bfloat16": torch.arange(3000).to(torch.bfloat16),
    "bool": torch.arange(9000) % 3 == 0,
    "complex": torch.complex(torch.arange(900.0), torch.ones(900)),
    "conjugated": torch.complex(torch.arange(900.0), torch.ones(900)).conj(),
    "scalar": torch.tensor(7),
    "empty": torch.empty(0, 5),
    "permuted": torch.arange(6000).reshape(10, 20, 30).permute(2, 0, 1),
    "strided": torch.arange(9000)[::2],
    "expanded": torch.arange(3)[:, None].expand(3, 2000),
    "with gradient": torch.ones(2000, requires_grad=True),
    "sparse": torch.eye(50).to_sparse(),
}


@pytest.mark.parametrize("name", TENSORS)
def test_any_tensor_arrives_as_it_was(name: str) -> None:
    tensor = TENSORS[name]
    ((arrived, again),) = ProcessBufferLoader([(tensor, tensor)])
    assert arrived is again
    assert (arrived.dtype, arrived.shape, arrived.requires_grad) == (tensor.dtype, tensor.shape, tensor.requires_grad)
    assert torch.equal(arrived.to_dense(), tensor.to_dense())
    if name == "permuted":
        assert arrived.stride() == tensor.stride()


def test_other_values_arrive_as_they_were() -> None:
    item = {"fortran": np.asfortranarray(np.ones((60, 70))), "text": "x" * 100_000, "list": [1, (2.5, None)]}
    (arrived,) = ProcessBufferLoader([item])
    assert arrived["fortran"].flags.f_contiguous
    assert np.array_equal(arrived["fortran"], item["fortran"])
    assert (arrived["text"], arrived["list"]) == (item["text"], item["list"])


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_meta_tensors_keep_their_metadata_and_can_be_inverted(method: str) -> None:
    flip = Compose([RandFlipd("image", prob=1.0, spatial_axis=0)])
    volumes = [{"image": meta(numbered(12, 13, 14), file="a.nii.gz")}]
    (arrived,) = ProcessBufferLoader(Dataset(volumes, flip), multiprocessing_context=method)
    expected = flip(volumes[0])["image"]
    assert isinstance(arrived["image"], MetaTensor)
    assert torch.equal(arrived["image"].affine, expected.affine)
    assert arrived["image"].meta["filename_or_obj"] == "a.nii.gz"
    inverted = Invertd("image", flip, orig_keys="image", nearest_interp=False)(arrived)
    assert torch.equal(inverted["image"].as_tensor(), volumes[0]["image"].as_tensor())


def test_an_item_is_its_owners_and_is_never_overwritten() -> None:
    items, views = [], []
    for number, item in enumerate(ProcessBufferLoader(Volumes(12), buffer_size=2)):
        if number % 2:
            items.append(item)
        else:
            views.append((number, item["image"][5:].view(-1).numpy()))
    assert all((item["image"] == 2 * n + 1).all() for n, item in enumerate(items))
    assert all((view == number).all() for number, view in views)
    items[0]["image"].zero_()
    assert (items[1]["image"] == 3).all()


def test_memory_is_used_again_and_given_back() -> None:
    gc.collect()
    before = mapped()
    with ProcessBufferLoader(Volumes(30), buffer_size=2) as loader:
        most = max(mapped() for _ in loader)
        assert most - before <= 2 + 3
        everything = list(loader)
        assert as_numbered(everything)
        assert mapped() - before >= 30
    del everything
    assert mapped() == before


def test_items_of_growing_size_exchange_the_memory() -> None:
    gc.collect()
    before = mapped()
    for number, item in enumerate(ProcessBufferLoader([torch.full((n * 5000,), n) for n in range(1, 15)])):
        assert (item == number + 1).all()
        assert mapped() - before <= 6


def test_items_take_no_file_descriptors_and_nothing_of_dev_shm() -> None:
    before, files = psutil.Process().num_fds(), shared_memory_files()
    loader = ProcessBufferLoader(Volumes(100, 2000))
    iterator = iter(loader)
    items = [next(iterator) for _ in range(99)]
    assert psutil.Process().num_fds() - before < 10
    (process,) = family()
    assert psutil.Process(process).num_fds() - before < 15
    assert shared_memory_files() == files
    assert as_numbered(items)


def test_a_process_that_was_forked_meanwhile_keeps_its_items() -> None:
    iterator = iter(ProcessBufferLoader(Volumes(20)))
    first = next(iterator)
    go, gone_on = multiprocessing.get_context("fork").Pipe()

    def look(item: dict[str, Any]) -> None:
        go.recv()
        os._exit(0 if (item["image"] == 0).all() else 1)

    process = multiprocessing.get_context("fork").Process(target=look, args=(first,))
    process.start()
    del first
    for _ in iterator:
        pass
    gone_on.send(None)
    process.join(20)
    assert process.exitcode == 0


def test_plain_shared_memory_serves_where_there_is_no_memfd() -> None:
    files = shared_memory_files()
    for leave_after in (20, 1):
        feed = ProcessFeed(Volumes(20), 2, multiprocessing.get_context("fork"), memfd=False)
        iterator = BufferedIterator(feed, 1)
        items = list(islice(iterator, leave_after))
        time.sleep(0.2)  # until the buffer is full
        iterator.close()
        assert as_numbered(items)
        assert len(shared_memory_files() - files) <= (leave_after == 1)  # what was being made: until this process ends


def noisy_loader(workers: int = 0) -> DataLoader:
    volumes = Dataset([{"image": numbered(40, 40)}] * 4, RandSpatialCropd("image", 8, random_size=False))
    return DataLoader(volumes, batch_size=2, shuffle=True, num_workers=workers)


def test_iterations_differ_and_the_same_seed_gives_the_same_items() -> None:
    def epochs() -> list[list[Any]]:
        torch.manual_seed(0)
        return [[batch["image"].tolist() for batch in loader] for _ in range(2)]

    loader = ProcessBufferLoader(noisy_loader())
    first, again = epochs(), epochs()
    assert first[0] != first[1]
    assert first == again


def test_a_source_may_have_workers_of_its_own_which_end_with_it() -> None:
    loader = ProcessBufferLoader(noisy_loader(workers=1))
    iterator = iter(loader)
    assert next(iterator)["image"].shape == (2, 1, 8, 8)
    processes = family()
    assert len(processes) == 2
    iterator.close()
    wait_for(lambda: not any(map(is_alive, processes)), "the end of the source's workers", 3.0)


@pytest.mark.parametrize(("how", "told"), [("killed", "was killed by SIGKILL"), ("exit", "ended with exit code 3")])
def test_the_death_of_the_process_is_an_error_that_says_how_it_ended(how: str, told: str) -> None:
    def source() -> Iterator[int]:
        yield 0
        if how == "killed":
            die()
        os._exit(3)

    iterator = iter(ProcessBufferLoader(source()))
    assert next(iterator) == 0
    with pytest.raises(WorkerDiedError, match=told):
        next(iterator)
    assert list(iterator) == []
    assert not family()


def test_killing_the_process_at_any_time_ends_in_an_error_and_no_hang() -> None:
    for delay in np.linspace(0, 0.1, 12):
        iterator = iter(ProcessBufferLoader(Volumes(100_000, 1000), buffer_size=4))
        (process,) = family()
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        with pytest.raises(WorkerDiedError, match="SIGKILL"):
            for _ in iterator:
                pass
        assert not family()


def test_the_process_and_its_sources_workers_end_with_a_killed_consumer(tmp_path: Path) -> None:
    def consume() -> None:
        iterator = iter(ProcessBufferLoader(noisy_loader(workers=1)))
        next(iterator)
        for pid in family():
            append_line(tmp_path / "pids", pid)
        append_line(tmp_path / "pids", "all")
        time.sleep(60)

    with child(consume) as process:
        wait_for(lambda: "all" in lines(tmp_path / "pids"), "the first item")
        os.kill(process.pid or 0, signal.SIGKILL)
        processes = list(map(int, lines(tmp_path / "pids")[:-1]))
        assert len(processes) == 2
        wait_for(lambda: not any(map(is_alive, processes)), "the end of the family", 5.0)


def test_what_cannot_be_pickled_is_named() -> None:
    with pytest.raises(TypeError, match=r"an item's \['f'\] \(a function: <lambda>\) cannot be pickled"):
        list(ProcessBufferLoader([{"f": lambda: None}]))
    with pytest.raises(TypeError, match=r"(?s)transform.* \(a function: <lambda>\) cannot be sent.*ThreadBufferLoader"):
        list(ProcessBufferLoader(Dataset([1], lambda x: x), multiprocessing_context="spawn"))


def test_an_exception_whose_class_is_unknown_here_arrives_as_a_runtime_error() -> None:
    class Odd(Exception):
        pass

    def source() -> Iterator[int]:
        yield 0
        raise Odd("quite")

    with pytest.raises(RuntimeError, match=r"(?s)list_iterator|generator.*Odd: quite"):
        list(ProcessBufferLoader(source()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_the_processes_global_generators_are_not_the_consumers() -> None:
    def draws() -> Iterator[Any]:
        for _ in range(2):
            yield torch.rand(1).item(), np.random.random()  # noqa: NPY002

    def in_a_child() -> tuple[Any, Any]:
        torch.manual_seed(1)
        items = list(ProcessBufferLoader(draws()))
        torch.manual_seed(1)
        return items, (torch.rand(1).item(),)

    items, own = in_child(in_a_child)
    assert len({draw for item in items for draw in (*item, *own)}) == 5
