# SPDX-License-Identifier: Apache-2.0
"""Caching: once, up to the first random transform, and given back."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import Compose, Lambdad, RandShiftIntensityd, ScaleIntensityRanged

from monai_patchqueue import PatchDataModule
from tests.numbered_volumes import Numbered, crop, make_module, numbers, records
from tests.pipelines import add_one, digest
from tests.processes import workers


def with_loader(load: Any, **arguments: Any) -> Any:
    return make_module([(records(range(6)), load)], others=(), cache_samples=True, **arguments)


@pytest.mark.parametrize("parallel", [-1, 4])
@pytest.mark.parametrize("train_loader", ["queue", "plain"])
def test_each_volume_is_loaded_once(parallel: int, train_loader: Any) -> None:
    load = Numbered()
    module = with_loader(load, parallel=parallel, train_loader=train_loader)
    assert load.loaded == []
    module.setup("fit")
    assert sorted(load.loaded) == list(range(6))
    module.setup("fit")
    module.setup()
    module.parallel = -1  # what is loaded is counted in this process
    for loader in (module.train_dataloader(), module.train_dataloader(), module.unshuffled_train_dataloader()):
        assert Counter(numbers(loader)) == dict.fromkeys(range(6), 4)
    assert len(load.loaded) == 6


def test_without_a_cache_each_epoch_loads() -> None:
    load = Numbered()
    module = make_module([(records(range(6)), load)], others=())
    module.setup()
    assert load.loaded == []
    loader = module.train_dataloader()
    numbers(loader)
    numbers(loader)
    assert Counter(load.loaded) == dict.fromkeys(range(6), 2)


STAGES = {
    None: ["train", "validation", "monitor-x", "test"],
    "fit": ["train", "validation", "monitor-x"],
    "validate": ["validation", "monitor-x"],
    "test": ["test"],
    "predict": ["test"],
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_loads_its_splits_and_gives_them_back(stage: str | None) -> None:
    loads = {name: Numbered() for name in STAGES[None]}
    splits = {name: [(records(range(3)), load)] for name, load in loads.items()}
    module = PatchDataModule(splits, cache_samples=True, progress=False, train_transforms=crop())
    module.setup(stage)
    assert [name for name, load in loads.items() if load.loaded] == STAGES[stage]
    assert all(sorted(load.loaded) in ([0, 1, 2], []) for load in loads.values())
    module.setup()
    assert all(sorted(load.loaded) == [0, 1, 2] for load in loads.values())
    module.teardown(stage)
    module.setup()
    assert [name for name, load in loads.items() if len(load.loaded) == 6] == STAGES[stage]


@pytest.mark.parametrize("method", ["setup", "teardown"])
def test_an_unknown_stage_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="stage='train': expected one of 'fit'"):
        getattr(make_module(3), method)("train")


@pytest.mark.parametrize("train_loader", ["queue", "plain"])
@pytest.mark.parametrize("end", ["teardown", "model_transforms"])
def test_the_caches_memory_is_free_though_loaders_live_on(train_loader: Any, end: str) -> None:
    load = Numbered()
    module = with_loader(load, train_loader=train_loader)
    loader = module.train_dataloader()
    numbers(loader)
    cached = [weakref.ref(item["image"]) for part in loader.dataset.datasets for item in part._cache]
    assert len(cached) == 6
    assert all(ref() is not None for ref in cached)
    if end == "teardown":
        module.teardown("fit")
    else:
        module.model_transforms = ()
    gc.collect()
    assert [ref() for ref in cached] == [None] * 6
    assert Counter(numbers(loader)) == dict.fromkeys(range(6), 4)
    assert len(load.loaded) == 12


def test_tearing_down_ends_the_queues_workers() -> None:
    module = make_module(6, parallel=1)
    loader: Any = module.train_dataloader()
    before = set(workers())
    next(iter(loader))
    module.teardown("test")
    assert len(set(workers()) - before) == 1
    module.teardown("fit")
    assert set(workers()) <= before


TRAIN_TRANSFORMS = {
    "crop first": [crop(), RandShiftIntensityd("image", offsets=0.5, prob=1.0)],
    "random first": [RandShiftIntensityd("image", offsets=0.5, prob=1.0), crop()],
    "in place after the crop": [crop(), add_one],
    "in place before the crop": [add_one, crop()],
}


@pytest.mark.parametrize("kind", TRAIN_TRANSFORMS)
def test_a_cache_changes_no_batch(kind: str) -> None:
    epochs = []
    for cached in (False, True):
        load = Compose([Numbered(), Lambdad("image", torch.as_tensor), ScaleIntensityRanged("image", 0, 5, -1, 1)])
        parts = [(records(range(6)), load)]
        module = make_module(parts, others=(), cache_samples=cached, train_transforms=TRAIN_TRANSFORMS[kind])
        loader = module.train_dataloader()
        epochs.append([digest(loader), digest(loader)])
    assert epochs[0] == epochs[1]
    assert epochs[0][0] != epochs[0][1]


@pytest.mark.parametrize("train_loader", ["queue", "plain"])
@pytest.mark.parametrize("kind", TRAIN_TRANSFORMS)
def test_the_volumes_in_the_cache_stay_as_they_are(kind: str, train_loader: Any) -> None:
    module = with_loader(Numbered(), train_transforms=TRAIN_TRANSFORMS[kind], train_loader=train_loader)
    loader = module.train_dataloader()
    for _ in range(2):
        list(loader)
    for part in loader.dataset.datasets:
        for number, item in enumerate(part._cache):
            assert np.unique(item["image"]) == number


def test_what_comes_before_the_first_random_transform_is_done_once() -> None:
    calls: list[str] = []

    def note(name: str) -> Any:
        def transform(item: Any) -> Any:
            calls.append(name)
            return item

        return transform

    loader = Compose([Numbered(), note("loader")])
    module = with_loader(
        loader, model_transforms=[Compose([note("model")])], train_transforms=[crop(), note("training")]
    )
    training = module.train_dataloader()
    for _ in range(3):
        numbers(training)
    assert Counter(calls) == {"loader": 6, "model": 6, "training": 3 * 24}


def test_a_volume_that_cannot_be_cached_is_named() -> None:
    module = with_loader(Numbered(broken=4), parallel=2)
    with pytest.raises(RuntimeError, match=r"splits\['train'\]\[0\], volume 4 \(a\) cannot be loaded: .*cut off"):
        module.setup("fit")


def test_filling_the_cache_shows_a_bar_if_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    for progress, shown in ((True, True), (False, False)):
        with_loader(Numbered(), progress=progress).setup("fit")
        assert ("6/6" in capsys.readouterr().err) == shown
