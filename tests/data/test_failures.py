# SPDX-License-Identifier: Apache-2.0
"""Each failure reaches the consumer, names what failed, and leaves a loader that can be used again."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import Dataset
from monai.transforms import Compose, Lambdad

from monai_patchqueue import PatchQueueLoader
from tests.pipelines import Patches, append_line, drawn, every_patch, goes_on, lines, make_loader
from tests.processes import wait_for

pytestmark = pytest.mark.timeout(30)

KINDS = ["inline", "thread", "process", "thread pool", "process pool"]


@pytest.fixture(params=KINDS)
def workers(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Each kind of worker."""
    if request.param == "inline":
        yield {}
    elif request.param in ("thread", "process"):
        yield {"num_workers": 2, "worker_type": request.param}
    elif request.param == "thread pool":
        with ThreadPoolExecutor(2) as pool:
            yield {"executor": pool}
    else:
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
            yield {"executor": pool}


class FailAt:
    """Raises while a file exists, when one volume is loaded."""

    def __init__(self, volume: int, error: BaseException, flag: Path) -> None:
        self.volume = volume
        self.error = error
        self.flag = flag
        flag.touch()

    def __call__(self, volume: int) -> None:
        if volume == self.volume and self.flag.exists():
            raise self.error


class OddError(Exception):
    """Takes more than a message."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("odd shape"), ValueError),
        (KeyError("image"), KeyError),
        (FileNotFoundError(2, "No such file", "a.nii"), FileNotFoundError),
        (OddError(3, "odd"), Exception),
        (StopIteration("ran out"), Exception),
        (MemoryError("too much"), MemoryError),
        (TimeoutError("slow disk"), TimeoutError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_in_preparing_reaches_the_consumer_and_the_loader_goes_on_after_it(
    error: Exception, kind: type[Exception], workers: dict[str, Any], tmp_path: Path
) -> None:
    fault = FailAt(2, error, tmp_path / "fail")
    with make_loader(Patches([4] * 4, fault=fault), **workers, batch_size=4) as loader:
        with pytest.raises(kind) as caught:
            drawn(loader)
        text = str(caught.value)
        assert "volume 2 (case_2.nii.gz)" in text
        assert type(error).__name__ in text
        assert str(error.args[0]) in text
        assert "in __call__" in text  # the worker's traceback
        assert "raise self.error" in text
        fault.flag.unlink()
        goes_on(loader, [4] * 4)


def test_an_error_in_the_very_first_volume_leaves_a_loader_that_can_be_used_again(
    workers: dict[str, Any], tmp_path: Path
) -> None:
    fault = FailAt(0, ValueError("odd shape"), tmp_path / "fail")
    with make_loader(Patches([4] * 4, fault=fault), **workers, batch_size=4) as loader:
        for _ in range(3):
            with pytest.raises(ValueError, match="odd shape"):
                drawn(loader)
        fault.flag.unlink()
        goes_on(loader, [4] * 4)


def test_an_exception_class_that_cannot_be_pickled_still_says_what_happened(workers: dict[str, Any]) -> None:
    class LocalError(Exception):
        pass

    def fault(volume: int) -> None:
        if volume == 1 and os.getpid() != -1:
            raise LocalError("only known here")

    if isinstance(workers.get("executor"), ProcessPoolExecutor):
        pytest.skip("an executor of processes pickles the function itself")
    with (
        make_loader(Patches([4] * 4, fault=fault), **workers, batch_size=4) as loader,
        pytest.raises(Exception, match=r"volume 1 \(case_1.nii.gz\)(.|\n)*only known here"),
    ):
        drawn(loader)


def test_ctrl_c_while_preparing_inline_leaves_a_loader_that_can_be_used_again(tmp_path: Path) -> None:
    fault = FailAt(0, KeyboardInterrupt(), tmp_path / "fail")
    loader = make_loader(Patches([4] * 4, fault=fault), batch_size=4, queue_length=4)
    for _ in range(20):  # each time, no slot must be lost
        with pytest.raises(KeyboardInterrupt):
            drawn(loader)
    fault.flag.unlink()
    assert Counter(drawn(loader)) == every_patch([4] * 4)
    fault.flag.touch()
    fault.volume = 2
    for _ in range(20):
        with pytest.raises(KeyboardInterrupt):
            drawn(loader)
    fault.flag.unlink()
    assert Counter(drawn(loader)) == every_patch([4] * 4)


class Exit:
    """Ends the interpreter as a careless transform does."""

    def __call__(self, volume: int) -> None:
        if volume == 2:
            sys.exit("licence expired")


def test_sys_exit_in_a_transform_names_the_volume_and_ends_nothing_silently(workers: dict[str, Any]) -> None:
    loader = make_loader(Patches([4] * 4, fault=Exit()), **workers, batch_size=4)
    kind = SystemExit if not workers else RuntimeError
    with pytest.raises(kind) as caught:
        drawn(loader)
    if workers:
        assert "volume 2 (case_2.nii.gz)" in str(caught.value)
    loader.close()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([{"image": torch.zeros(1, 32, 32)}] * 3, "gave 3 patches, but 2 were announced"),
        ([[{"image": torch.zeros(1, 32, 32)}]] * 2, "Two transforms in sequence"),
        ("a string", "found str"),
        (torch.zeros(2), "found Tensor"),
        (None, "found NoneType"),
        ([torch.zeros(2)] * 2, "a list of Tensor"),
        ([{"image": torch.zeros(1, 32, 32)}, {"label": torch.zeros(1, 32, 32)}], r"patches 0 and 1 .*'image', 'label'"),
        ([{"image": torch.zeros(1, 32, 32)}, {"image": torch.zeros(1, 32, 33)}], r"\[1, 32, 33\](.|\n)*SpatialPadd"),
        ([{"image": torch.zeros(1, 32, 32)}, {"image": torch.zeros(1, 32, 32).double()}], "float64(.|\n)*CastToTyped"),
    ],
)
def test_items_that_are_not_what_was_announced_are_described(item: Any, message: str, workers: dict[str, Any]) -> None:
    with (
        make_loader(Dataset([item]), **workers, samples_per_volume=2) as loader,
        pytest.raises((TypeError, ValueError), match=f"volume 0(.|\n)*{message}"),
    ):
        list(loader)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"image": torch.zeros(1, 32, 33)}, r"\[1, 32, 32\] float32 there and \[1, 32, 33\] float32 here"),
        ({"image": torch.zeros(1, 32, 32, dtype=torch.int16)}, "float32 there and .* int16 here"),
        ({"image": np.zeros((1, 32, 32))}, "float64 here"),
        ({"label": torch.zeros(1, 32, 32)}, "'image' is .* there and no large array here"),
        ({"image": torch.zeros(1, 32, 32), "label": torch.zeros(1, 32, 32)}, "'label' is no large array there"),
        ({"image": torch.zeros(3)}, r"\[3\] float32 here"),
    ],
)
def test_a_volume_unlike_the_first_is_an_error_that_names_both(
    odd: dict[str, Any], message: str, workers: dict[str, Any]
) -> None:
    dataset = Dataset([{"image": torch.zeros(1, 32, 32), "name": "a"}, {**odd, "name": "b"}])
    with make_loader(dataset, **workers) as loader, pytest.raises(ValueError, match=f"volume 1(.|\n)*{message}") as e:
        list(loader)
    assert "patches of volume 0" in str(e.value)
    for remedy in ("SpatialPadd", "CastToTyped", "DeleteItemsd"):
        assert remedy in str(e.value)


@pytest.mark.parametrize("size", [1, 40])
def test_volumes_that_differ_in_small_keys_are_an_error_that_names_both_and_what_to_do(size: int) -> None:
    dataset = Dataset(
        [{"image": torch.zeros(1, size, size), "name": "a"}, {"image": torch.zeros(1, size, size), "age": 3}]
    )
    with pytest.raises(ValueError, match=r"volumes? 0.* 1 .*'age', 'name'(.|\n)*DeleteItemsd"):
        list(make_loader(dataset, batch_size=2))


def test_keys_may_come_in_another_order_in_each_volume(workers: dict[str, Any]) -> None:
    dataset = Dataset([{"image": torch.zeros(1, 32, 32), "a": 1}, {"a": 2, "image": torch.ones(1, 32, 32)}])
    with make_loader(dataset, **workers, batch_size=2) as loader:
        (batch,) = list(loader)
    assert batch["a"].tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_worker_init_fn_that_raises_reaches_the_consumer(kind: str) -> None:
    def init(worker: int) -> None:
        raise OSError(f"no licence for worker {worker}")

    with (
        make_loader([4] * 4, 2, worker_type=kind, worker_init_fn=init) as loader,
        pytest.raises(OSError, match="no licence for worker"),
    ):
        drawn(loader)


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_worker_init_fn_is_called_once_with_each_workers_number(kind: str, tmp_path: Path) -> None:
    def init(worker: int) -> None:
        append_line(tmp_path / "numbers", worker)

    with make_loader([4] * 8, 3, worker_type=kind, worker_init_fn=init) as loader:
        drawn(loader)
        drawn(loader)
    assert sorted(lines(tmp_path / "numbers")) == ["0", "1", "2"]


@pytest.mark.parametrize("argument", ["collate_fn", "batch_transform", "item_transform"])
@pytest.mark.parametrize("error", [ZeroDivisionError("odd"), StopIteration("odd")])
def test_an_error_in_the_callers_own_function_is_raised_and_the_loader_goes_on_after_it(
    argument: str, error: Exception, workers: dict[str, Any]
) -> None:
    fails = [True]

    def function(content: Any) -> Any:
        if fails[0]:
            raise error
        return content

    with make_loader([4] * 4, **workers, batch_size=4, **{argument: function}) as loader:
        kind = ZeroDivisionError if isinstance(error, ZeroDivisionError) else RuntimeError
        with pytest.raises(kind, match="odd"):
            list(loader)
        fails[0] = False
        assert len(list(loader)) == 4


# -- what cannot be sent


def test_a_value_that_cannot_be_pickled_is_named_by_its_key() -> None:
    def with_lock(item: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**item, "odd": threading.Lock()} for _ in range(2)]

    dataset = Dataset([{"image": torch.zeros(1, 32, 32)}], with_lock)
    with make_loader(dataset, 1, samples_per_volume=2) as loader, pytest.raises(TypeError, match=r"volume 0.*'odd'"):
        list(loader)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_pipeline_that_cannot_be_pickled_is_named_with_the_ways_out(method: str) -> None:
    dataset = Dataset([{"image": torch.zeros(1, 32, 32)}], Compose([Lambdad("image", lambda x: x)]))
    with pytest.raises(TypeError, match=r"lambda(.|\n)*worker_type='thread'(.|\n)*fork"):
        list(make_loader(dataset, 1, multiprocessing_context=method))


def test_a_loader_in_a_forked_child_is_refused_and_does_not_disturb_its_parent() -> None:
    def child(loader: PatchQueueLoader, report: Any, act: Callable[[PatchQueueLoader], object]) -> None:
        try:
            act(loader)
            report.send("nothing was raised")
        except RuntimeError as error:
            report.send(str(error))

    context = multiprocessing.get_context("fork")
    with make_loader([4] * 12, 2, batch_size=4, queue_length=8) as loader:
        iterator = iter(loader)
        draws = drawn([next(iterator)])
        for act in (lambda loader: next(iter(loader)), lambda _: next(iterator), PatchQueueLoader.close):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(loader, sender, act))
            process.start()
            assert receiver.poll(5), "the child hangs"
            message = receiver.recv()
            process.join()
            assert act is PatchQueueLoader.close or "process that made it" in message
        time.sleep(0.2)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.15, "the parent's thread spins"
        assert Counter(draws + drawn(iterator)) == every_patch([4] * 12)


@pytest.mark.parametrize("worker_type", ["thread", "process"])
def test_of_several_volumes_that_fail_the_first_in_order_is_named_whichever_fails_first(
    worker_type: str, tmp_path: Path
) -> None:
    flag = tmp_path / "a later one has failed"

    def fail(volume: int) -> None:
        if volume == 1:
            wait_for(flag.exists, "a later volume")
            time.sleep(0.2)  # the consumer hears of the later one
        if volume > 1:
            flag.touch()
        if volume:
            raise OSError("the disk is away")

    loader = make_loader(Patches([2] * 6, fault=fail), 2, worker_type=worker_type, batch_size=2)
    with loader, pytest.raises(OSError, match=r"^volume 1 \(case_1.nii.gz\) could not be prepared"):
        list(loader)


def test_a_volume_that_failed_only_while_its_epoch_was_prepared_ahead_is_tried_again(tmp_path: Path) -> None:
    attempts = tmp_path / "attempts"

    def fail_once_in_the_second_epoch(volume: int) -> None:
        if volume == 2:
            append_line(attempts, "x")
            if len(lines(attempts)) == 2:
                raise OSError("the network was away")

    dataset = Patches([3, 3, 3], fault=fail_once_in_the_second_epoch)
    with make_loader(dataset, 1, worker_type="thread", batch_size=3) as loader:
        list(loader)
        wait_for(lambda: loader.stats().failures == 1, "the second epoch's volumes to be prepared")
        time.sleep(0.1)
        assert len(lines(attempts)) == 2
        assert Counter(drawn(loader)) == every_patch([3, 3, 3])
    assert len(lines(attempts)) >= 3
