# SPDX-License-Identifier: Apache-2.0
"""What holds for any buffer loader, whether a thread or a process fills it."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import pickle
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from monai.transforms import RandSpatialCropd

from monai_patchqueue import ProcessBufferLoader, ThreadBufferLoader, iterate_buffered
from tests.pipelines import append_line, lines
from tests.processes import in_child, wait_for, workers
from tests.programs import Interpreter
from tests.volumes import numbered

pytestmark = pytest.mark.timeout(60)

LOADERS = [ThreadBufferLoader, ProcessBufferLoader]
both = pytest.mark.parametrize("kind", LOADERS, ids=["thread", "process"])


class Counting:
    """Counts up, writes down how far it was asked to, and may be slow or fail at a number."""

    def __init__(
        self, count: int, log: Path | None = None, at: int = -1, fault: Callable[[], Any] | None = None
    ) -> None:
        self.count, self.log, self.at, self.fault = count, log, at, fault

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        for number in range(self.count):
            if number == self.at and self.fault is not None:
                self.fault()
            if self.log is not None:
                append_line(self.log, number)
            yield number


def fail() -> None:
    raise KeyError("no such case")


def held() -> tuple[int, int, int]:
    """Threads of ours, children, and open files."""
    gc.collect()
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("patchqueue")]
    return len(threads), len(workers()), psutil.Process().num_fds()


@both
def test_items_come_in_order_and_each_as_often_as_was_asked_for(kind: Any) -> None:
    assert list(kind(range(5), buffer_size=2)) == [0, 1, 2, 3, 4]
    assert list(kind(range(3), repeats=2)) == [0, 0, 1, 1, 2, 2]
    first, second = kind([torch.zeros(2)], repeats=2)
    assert first is second


@both
def test_the_length_counts_repeats(kind: Any) -> None:
    assert len(kind(Counting(4), repeats=3)) == 12
    with pytest.raises(TypeError):
        len(kind(iter(range(3))))


@both
def test_a_sources_exception_reaches_the_consumer_after_the_items_before_it(kind: Any) -> None:
    iterator = iter(kind(Counting(5, at=3, fault=fail), buffer_size=5))
    assert [next(iterator) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="no such case") as caught:
        next(iterator)
    told = "".join(traceback.format_exception(caught.value))
    assert 'raise KeyError("no such case")' in told  # the line in the source


@both
def test_an_iterator_that_failed_is_over(kind: Any) -> None:
    iterator = iter(kind(Counting(5, at=0, fault=fail)))
    with pytest.raises(KeyError):
        next(iterator)
    assert list(iterator) == []


@both
def test_leaving_early_and_iterating_again_starts_clean(kind: Any) -> None:
    loader = kind(Counting(6), buffer_size=3, repeats=2)
    for leave_after in (1, 2, 5):
        assert list(islice(loader, leave_after)) == [0, 0, 1, 1, 2, 2][:leave_after]
    assert list(loader) == sorted([*range(6)] * 2)


@both
def test_the_buffer_is_bounded(kind: Any, tmp_path: Path) -> None:
    iterator = iter(kind(Counting(100, tmp_path / "log"), buffer_size=3))
    next(iterator)
    wait_for(lambda: len(lines(tmp_path / "log")) == 5, "1 taken + 3 in the buffer + 1 in hand")
    time.sleep(0.1)
    assert len(lines(tmp_path / "log")) == 5
    iterator.close()


@both
def test_several_iterators_at_once_do_not_mix(kind: Any) -> None:
    loader = kind(Counting(5))
    first, second = iter(loader), iter(loader)
    assert list(zip(first, second, strict=True)) == [(n, n) for n in range(5)]


@both
@pytest.mark.parametrize("how", ["close", "stop", "loader", "drop"])
def test_closing_does_not_wait_for_the_source(kind: Any, how: str) -> None:
    over = threading.Event()
    loader = kind(Counting(5, at=1, fault=lambda: over.wait(30)))
    iterator = iter(loader)
    assert next(iterator) == 0
    start = time.monotonic()
    if how == "drop":
        del iterator
    else:
        getattr(loader if how == "loader" else iterator, "close" if how == "loader" else how)()
        assert list(iterator) == []
    assert time.monotonic() - start < 1.0
    over.set()


@both
def test_closing_ends_a_wait_for_an_item(kind: Any) -> None:
    over = threading.Event()
    loader = kind(Counting(5, at=0, fault=lambda: over.wait(30)))
    got: list[Any] = []
    consumer = threading.Thread(target=lambda: got.append(list(loader)))
    consumer.start()
    time.sleep(0.3)
    loader.close()
    consumer.join(5.0)
    assert got == [[]]
    over.set()


@both
@pytest.mark.parametrize("end", ["exhausted", "left", "closed", "failed", "dropped"])
def test_nothing_is_left_behind(kind: Any, end: str) -> None:
    list(kind(range(2)))
    before = held()
    source = Counting(6, at=3, fault=fail) if end == "failed" else [torch.zeros(1, 40, 40)] * 6
    loader = kind(source, buffer_size=2)
    iterator = iter(loader)
    if end == "failed":
        with pytest.raises(KeyError):
            list(iterator)
    elif end == "exhausted":
        list(iterator)
    else:
        next(iterator)
    if end == "closed":
        loader.close()
    elif end in ("left", "dropped"):
        del iterator
    wait_for(lambda: held() == before, f"{before}, still {held()}")


def switches() -> list[list[str]]:
    """How often threads of ours gave way, here and in children."""
    tasks = [*Path("/proc/self/task").iterdir(), *(Path(f"/proc/{pid}/task/{pid}") for pid in workers())]
    return sorted([line for line in (task / "status").read_text().splitlines() if "ctxt" in line] for task in tasks)


@pytest.mark.skipif(sys.platform != "linux", reason="counts context switches in /proc")
@both
def test_nobody_polls(kind: Any) -> None:
    over = threading.Event()
    full = iter(kind(range(100)))
    empty = iter(kind(Counting(5, at=0, fault=lambda: over.wait(30))))
    consumer = threading.Thread(target=lambda: list(empty))
    consumer.start()
    next(full)
    time.sleep(0.5)
    changed = []
    for _ in range(6):
        before = switches()
        time.sleep(0.2)
        changed.append(sum(a != b for a, b in zip(before, switches(), strict=True)))
    # This thread, and now and then the children's: they look once a second whether their parent lives.
    assert min(changed) <= 1
    over.set()
    empty.close()
    full.close()
    consumer.join(5.0)


@both
def test_a_loader_can_be_copied_and_pickled_while_it_is_iterated_over(kind: Any) -> None:
    loader = kind(range(3), 2, 1)
    iterator = iter(loader)
    assert next(iterator) == 0
    assert list(copy.deepcopy(loader)) == list(pickle.loads(pickle.dumps(loader))) == [0, 1, 2]
    assert list(iterator) == [1, 2]


@both
def test_an_iterator_does_not_work_in_a_forked_process_and_ends_none_there(kind: Any) -> None:
    iterator = iter(kind(range(4)))
    assert next(iterator) == 0

    def in_the_child() -> str:
        with pytest.raises(RuntimeError, match="belongs to the process that made it") as caught:
            next(iterator)
        iterator.close()
        return str(caught.value)

    assert "Iterate over the loader anew" in in_child(in_the_child)
    assert list(iterator) == [1, 2, 3]


@both
def test_wrong_arguments_are_refused(kind: Any) -> None:
    for arguments in ({"buffer_size": 0}, {"repeats": 0}):
        with pytest.raises(ValueError, match="expected 1 or more"):
            kind(range(3), **arguments)
    with pytest.raises(TypeError, match=r"buffer_size=1\.5"):
        kind(range(3), buffer_size=1.5)
    with pytest.raises(TypeError, match="src is a int"):
        kind(3)


def test_a_threads_exception_is_the_sources_own() -> None:
    error = RuntimeError("out of tape")

    def throw() -> None:
        raise error

    with pytest.raises(RuntimeError) as caught:
        list(ThreadBufferLoader(Counting(3, at=1, fault=throw)))
    assert caught.value is error


def test_an_iterator_as_source_is_gone_on_with_and_never_entered_twice() -> None:
    def slowly() -> Iterator[int]:
        for number in range(8):
            time.sleep(0.02)
            yield number

    loader = ThreadBufferLoader(slowly())
    assert next(iter(loader)) == 0
    rest = list(loader)  # its thread may still be in the generator when the next one comes
    assert rest == list(range(8))[-len(rest) :]
    assert len(rest) >= 4


def test_transforms_of_one_source_never_work_in_two_threads_at_once() -> None:
    volumes = [{"image": numbered(40, 40), "label": numbered(40, 40)}] * 30
    source = DataLoader(Dataset(volumes, RandSpatialCropd(["image", "label"], 8, random_size=False)))
    iterators = [iterate_buffered(source) for _ in range(3)]
    for batches in zip(*iterators, strict=True):
        assert all(torch.equal(batch["image"], batch["label"]) for batch in batches)


def test_buffer_iterators_arguments_are_taken_as_monai_has_them() -> None:
    iterator = iterate_buffered([1, 2, 3], 2, 0.01, 2)
    assert [next(iterator) for _ in range(3)] == [1, 1, 2]
    iterator.stop()
    assert list(iterator) == []
    assert list(ThreadBufferLoader([1, 2], buffer_size=2, timeout=0.01)) == [1, 2]


@pytest.mark.parametrize("name", ["ThreadBufferLoader", "ProcessBufferLoader"])
def test_a_config_puts_a_buffer_around_its_loader(name: str) -> None:
    config = {
        "data": [{"image": np.full((1, 4, 4), n)} for n in range(4)],
        "loader": {
            "_target_": name,
            "src": {"_target_": "DataLoader", "dataset": {"_target_": "Dataset", "data": "@data"}, "batch_size": 2},
            "buffer_size": 2,
            "repeats": 2,
        },
    }
    loader = ConfigParser(config).get_parsed_content("loader")
    assert len(loader) == 4
    assert [batch["image"][:, 0, 0, 0].tolist() for batch in loader] == [[0, 1], [0, 1], [2, 3], [2, 3]]


EXIT = """
import time, torch, warnings
warnings.simplefilter("ignore")
from monai_patchqueue import PatchThreadDataLoader, ProcessBufferLoader, ThreadBufferLoader
class Slow(torch.utils.data.Dataset):
    def __len__(self): return 9
    def __getitem__(self, index):
        for _ in range(40 * (index > 0)): time.sleep(0.05)
        return torch.zeros(100, 100)
def slowly():
    for index in range(9): yield Slow()[index]
loaders = [ThreadBufferLoader(slowly()), ProcessBufferLoader(slowly()), PatchThreadDataLoader(Slow()),
           PatchThreadDataLoader(Slow(), num_workers=2, use_thread_workers=True)]
iterators = [iter(loader) for loader in loaders]
for iterator in iterators: next(iterator)
print("ending", flush=True)
"""


def test_the_interpreter_ends_cleanly_while_sources_are_slow(interpreter: Interpreter) -> None:
    program = interpreter.start("-c", EXIT)
    wait_for(lambda: program.output == "ending\n", "items")
    start = time.monotonic()
    assert (program.wait(30), program.errors) == (0, "")
    assert time.monotonic() - start < 5.0


def test_the_config_of_their_page_gives_the_same_batches_three_times() -> None:
    page = (Path(__file__).parents[2] / "docs/buffers.md").read_text(encoding="utf-8")
    config = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    items = [{"image": torch.full((1, 4), float(i)), "label": i, "name": str(i)} for i in range(6)]
    parser = ConfigParser({**json.loads(config[0]), "dataset": Dataset(items)})
    for name in ("loader", "ahead", "apart"):
        with contextlib.closing(parser.get_parsed_content(name)) as loader:
            batches = list(loader)
        assert [batch["label"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5]]
        assert all(list(batch) == ["image", "label"] for batch in batches)
