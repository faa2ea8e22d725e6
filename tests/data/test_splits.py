# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from collections import UserDict, UserList
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from monai_patchqueue import PatchDataModule
from tests.numbered_volumes import Numbered, crop, make_module, numbers, records

GOOD = (records(range(4)), Numbered())


class Loader:
    """A loader as mednet has them."""

    def __init__(self, targets: Any = None) -> None:
        self.targets = targets or {}

    def sample(self, record: dict[str, Any]) -> dict[str, Any]:
        return {"image": np.full((1, 8, 8), record["number"], np.float32), "number": record["number"]}

    def target(self, record: dict[str, Any]) -> Any:
        return self.targets[record["number"]]


class Untouchable(Numbered):
    """Cannot be asked for volumes."""

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError("a volume was loaded")


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no mapping": ([GOOD], TypeError, "splits is a list; expected a mapping"),
    "no train": ({"test": [GOOD]}, ValueError, r"has \['test'\], but no 'train'"),
    "unknown name": ({"train": [GOOD], "val": [GOOD]}, ValueError, "'val'.* Did you mean 'validation'"),
    "nothing to watch": ({"train": [GOOD], "monitor-": [GOOD]}, ValueError, "begins with 'monitor-'"),
    "number as name": ({"train": [GOOD], 3: [GOOD]}, ValueError, "has a split 3"),
    "empty split": ({"train": []}, ValueError, r"splits\['train'\] is empty"),
    "no sequence": ({"train": {"samples": [1]}}, TypeError, r"splits\['train'\] is a dict"),
    "pair without list": ({"train": GOOD}, TypeError, r"a pair itself: put it in a list"),
    "no pair": ({"train": [records(range(3))]}, TypeError, r"splits\['train'\]\[0\] is a list; expected a pair"),
    "no samples": ({"train": [GOOD, ([], Numbered())]}, ValueError, r"splits\['train'\]\[1\] has no samples"),
    "text for samples": ({"train": [("list.json", Numbered())]}, TypeError, "samples of type str"),
    "no loader": ({"train": [(records(range(3)), None)]}, TypeError, "loader of type NoneType; expected a transform"),
    "empty loader": ({"train": [(records(range(3)), [])]}, TypeError, "loader of type list"),
}


@pytest.mark.parametrize("case", BAD)
def test_splits_that_cannot_work_are_refused_with_what_to_do(case: str) -> None:
    splits, error, message = BAD[case]
    with pytest.raises(error, match=message):
        PatchDataModule(splits)


ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not divisible": ({"batch_size": 10, "batch_chunk_count": 4}, ValueError, "batch_size=8, for instance"),
    "no batch": ({"batch_size": 0}, ValueError, "batch_size=0: expected 1 or more"),
    "half a chunk": ({"batch_chunk_count": 1.5}, TypeError, "batch_chunk_count=1.5: expected a whole number"),
    "too many chunks": ({"batch_size": 50, "batch_chunk_count": 50}, ValueError, "gives 24 patches .* Lower"),
    "workers": ({"parallel": "all"}, TypeError, "parallel='all': expected a whole number"),
    "loader": ({"train_loader": "fast"}, ValueError, "expected 'queue' or 'plain'"),
    "transform": ({"model_transforms": [3]}, TypeError, "model_transforms has a int"),
    "other transform": ({"train_transforms": "crop"}, TypeError, "train_transforms has a str"),
    "own argument": ({"train_loader_arguments": {"drop_last": True}}, ValueError, "set drop_incomplete_batch instead"),
    "spelling": ({"train_loader_arguments": {"queue_lenght": 9}}, ValueError, "Did you mean 'queue_length'"),
    "of the queue": (
        {"train_loader": "plain", "train_loader_arguments": {"queue_length": 9}}, ValueError, "DataLoader does not take"
    ),
    "evaluation": ({"eval_loader_arguments": {"shuffle": True}}, ValueError, "training is shuffled, all else is not"),
    "seed": ({"seed": -1}, ValueError, "seed=-1: expected 0 or more"),
    "count": ({"samples_per_volume": "count", "train_transforms": ()}, ValueError, "0 or more"),
    "no class": ({"balance_sampler_by_class": True}, ValueError, r"volume 0.* pass class_key"),
    "missing class": (
        {"balance_sampler_by_class": True, "class_key": "organ"}, ValueError, r"no class_key='organ'.*\['number', "
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_cannot_work_are_refused_at_construction(case: str) -> None:
    arguments, error, message = ARGUMENTS[case]
    part = [{**record, "count": -1} for record in records(range(6))]
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        make_module([(part, Untouchable())], **arguments)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (int, 1),
        (str, "1"),
        (np.int64, 1),
        (torch.tensor, 1),
        (lambda n: torch.tensor([float(n)]), 1.0),
        (lambda n: [n], 1),
        (bool, True),
    ],
)
def test_a_class_may_be_any_number_or_text(make: Callable[[int], Any], expected: Any) -> None:
    module = make_module([(records(range(4), classes=[make(0), make(1)]), Numbered())])
    part = module.splits["train"][0]
    assert [part.target(index, "class") for index in (1, 3)] == [expected] * 2


@pytest.mark.parametrize("value", [None, float("nan"), [1, 0], torch.tensor([0, 1]), {"a": 1}, np.zeros(3)])
def test_what_is_not_one_class_is_refused(value: Any) -> None:
    part = [{"number": 0, "class": value}]
    with pytest.raises(ValueError, match=r"volume 0\['class'\] is .* expected one class"):
        make_module([(part, Untouchable())], balance_sampler_by_class=True, class_key="class")


def test_a_loaders_target_tells_the_class_without_loading_a_volume() -> None:
    loader = Loader({0: torch.tensor([1]), 1: torch.tensor([0]), 2: torch.tensor([0])})
    loader.sample = Untouchable().__call__  # type: ignore[method-assign]
    part = [(records(range(3)), loader)]
    module = make_module(part, others=(), train_transforms=(), balance_sampler_by_class=True, batch_size=3)
    assert module._weights["train"] == [0.5, 0.25, 0.25]


def test_databases_with_loaders_of_different_kinds_are_put_together() -> None:
    with_method, with_call = Loader(), Numbered(size=8)
    module = make_module(
        [(records(range(2)), with_method), (records(range(2, 4)), [with_call]), (records(range(4, 5)), with_call)],
        train_transforms=(),
        batch_size=5,
        train_loader="plain",
        train_loader_arguments={"collate_fn": lambda items: sorted(item["number"] for item in items)},
    )
    assert list(module.train_dataloader()) == [[0, 1, 2, 3, 4]]


def test_samples_may_be_any_sequence_and_splits_any_mapping() -> None:
    splits: Any = UserDict({"train": UserList([(tuple(records(range(4))), Numbered())])})
    module = PatchDataModule(splits, batch_size=4, train_transforms=crop(), seed=0)
    assert sorted(numbers(module.train_dataloader())) == [n for n in range(4) for _ in range(4)]
