# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, Dataset
from monai.transforms import (
    ClassesToIndicesd,
    Compose,
    CopyItemsd,
    EnsureTyped,
    FgBgToIndicesd,
    Lambdad,
    MapTransform,
    NormalizeIntensityd,
    RandCropByLabelClassesd,
    RandCropByPosNegLabeld,
    RandFlipd,
    Randomizable,
    RandScaleCropd,
    RandSpatialCropd,
    RandSpatialCropSamplesd,
    RandWeightedCropd,
)
from torch.storage import UntypedStorage

from monai_patchqueue import LabelIndexd, RandLabelPatchd, RandUniformPatchd, RandWeightedPatchd
from monai_patchqueue.queue import worker
from tests.pipelines import digest, make_loader
from tests.processes import in_child, pss
from tests.volumes import blobs, meta

KEYS = ["image", "label"]
SIZE = (8, 8, 8)
MIB = 2**20


def records(kind: str = "meta", shape: tuple[int, ...] = (20, 18, 16)) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    volumes = []
    for case in range(3):
        image = rng.normal(size=(2, *shape)).astype(np.float32)
        label = blobs(*shape, seed=case)
        weights = label.astype(np.float32) - 1.0
        record: dict[str, Any] = {"image": image, "label": label, "weights": weights, "map": np.abs(weights)}
        if kind == "meta":
            record = {key: meta(value, f"{key}_{case}.nii.gz") for key, value in record.items()}
        volumes.append(record | {"age": [case], "table": np.arange(4096) + case})
    return volumes


@contextmanager
def copying() -> Iterator[None]:
    """MONAI's own deep copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "lending", lambda *_: nullcontext())
        yield


@contextmanager
def counting_copies(of_at_least: int) -> Iterator[list[int]]:
    """Sizes of the memory that deep copies have copied."""
    sizes: list[int] = []
    original = UntypedStorage.__deepcopy__

    def counted(self: UntypedStorage, memo: dict[Any, Any]) -> Any:
        known = self._cdata in memo.get("torch", {})
        if not known and self.nbytes() >= of_at_least:
            sizes.append(self.nbytes())
        return original(self, memo)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UntypedStorage, "__deepcopy__", counted)
        yield sizes


def content(dataset: CacheDataset) -> str:
    return digest([{key: value for key, value in item.items() if key != "hidden"} for item in dataset._cache])


CROPS: dict[str, Callable[[], list[Any]]] = {
    "pos and neg": lambda: [RandCropByPosNegLabeld(KEYS, "label", SIZE, num_samples=4)],
    "pos and neg by indices": lambda: [
        FgBgToIndicesd("label"),
        RandCropByPosNegLabeld(
            KEYS, "label", SIZE, num_samples=4, fg_indices_key="label_fg_indices", bg_indices_key="label_bg_indices"
        ),
    ],
    "classes": lambda: [RandCropByLabelClassesd(KEYS, "label", SIZE, num_classes=4, num_samples=4)],
    "classes by indices": lambda: [
        ClassesToIndicesd("label", num_classes=4),
        RandCropByLabelClassesd(KEYS, "label", SIZE, num_classes=4, num_samples=4, indices_key="label_cls_indices"),
    ],
    "spatial": lambda: [RandSpatialCropd(KEYS, SIZE, random_size=False)],
    "spatial samples": lambda: [RandSpatialCropSamplesd(KEYS, SIZE, 4, random_size=False)],
    "scale": lambda: [RandScaleCropd(KEYS, 0.5, random_size=False)],
    "weighted": lambda: [RandWeightedCropd(KEYS, "weights", SIZE, 4)],
    "weighted by voxel": lambda: [RandWeightedCropd([*KEYS, "weights"], "weights", (1, 1, 1), 4)],
    "our uniform": lambda: [RandUniformPatchd(KEYS, SIZE, 4)],
    "our label": lambda: [RandLabelPatchd(KEYS, "label", SIZE, 4)],
    "our label by index": lambda: [LabelIndexd("label"), RandLabelPatchd(KEYS, "label", SIZE, 4)],
    "our weighted": lambda: [RandWeightedPatchd([*KEYS, "map"], "map", SIZE, 4)],
}


class WriteInPlace(MapTransform, Randomizable):
    """Writes over everything that it is given, through torch, through numpy, and into metadata."""

    def __init__(self, keys: Any = (*KEYS, "age", "table")) -> None:
        super().__init__(keys, allow_missing_keys=True)

    def __call__(self, data: Any) -> Any:
        for key in self.key_iterator(data):
            value = data[key]
            if isinstance(value, torch.Tensor):
                value.as_subclass(torch.Tensor).add_(1)
                value.as_subclass(torch.Tensor).numpy()[..., 0] += 1
            elif isinstance(value, np.ndarray):
                value += 1
            else:
                value.append(1)
            if hasattr(value, "meta"):
                value.meta["written"] = True
                value.applied_operations.append({"class": "WriteInPlace"})
        return data


class MoveInPlace(MapTransform, Randomizable):
    """Writes into affines (of which MONAI's deep copies are no copies)."""

    def __call__(self, data: Any) -> Any:
        for key in self.key_iterator(data):
            if hasattr(data[key], "affine"):
                data[key].affine[:3, 3] += 1
        return data


def batches(dataset: CacheDataset, **arguments: Any) -> str:
    with make_loader(dataset, batch_size=4, shuffle=True, **arguments) as loader:
        return digest([batch for _ in range(2) for batch in loader])


@pytest.mark.parametrize("kind", ["meta", "numpy", "tensor"])
@pytest.mark.parametrize("crop", CROPS)
def test_batches_are_those_of_deep_copies_and_the_cache_stays_as_it_was(crop: str, kind: str) -> None:
    before = [EnsureTyped([*KEYS, "weights", "map"], track_meta=False)] if kind == "tensor" else []
    # Means of a patch depend on its strides in the last bit.
    transforms = [*before, *CROPS[crop](), NormalizeIntensityd("image"), WriteInPlace(), MoveInPlace(KEYS)]
    dataset = CacheDataset(records(kind), Compose(transforms), progress=False)
    was = content(dataset)
    lent = batches(dataset)
    assert content(dataset) == was
    with copying():
        assert batches(dataset) == lent


@pytest.mark.parametrize("crop", [crop for crop in CROPS if not crop.startswith("weighted")])
def test_no_volume_is_copied_before_a_crop(crop: str) -> None:
    dataset = CacheDataset(records(), Compose([CopyItemsd("image", 1, "more"), *CROPS[crop]()]), progress=False)
    for record in dataset._cache:
        del record["more"]  # MONAI's crops copy what they do not cut
    volume = dataset._cache[0]["image"].nbytes
    with counting_copies(of_at_least=dataset._cache[0]["label"].nbytes) as copies:
        batches(dataset)
    unlisted = {dataset._cache[0][key].nbytes for key in ("weights", "map")}
    assert volume not in copies
    assert set(copies) <= unlisted
    with copying(), counting_copies(of_at_least=volume) as copies:
        batches(dataset)
    assert len(copies) >= 6


def test_no_volume_is_copied_that_is_found_by_a_hash() -> None:
    transforms = Compose(CROPS["our label by index"]())
    twice = [*records(), *records()]  # as some scripts make longer epochs
    dataset = CacheDataset(twice, transforms, hash_as_key=True, hash_func=lambda r: bytes(r["age"]), progress=False)
    assert len(dataset._cache) == 3
    was = content(dataset)
    with counting_copies(of_at_least=dataset._cache[0]["image"].nbytes) as copies:
        lent = batches(dataset)
    assert not copies
    assert content(dataset) == was
    with copying():
        assert batches(dataset) == lent


class Subclass(RandSpatialCropd):
    """A crop that writes."""

    def __call__(self, data: Any, lazy: bool | None = None) -> Any:
        WriteInPlace()(data)
        return super().__call__(data, lazy=lazy)


def writes_and_counts(item: Any) -> int:
    WriteInPlace()(item)
    return 4


class Hidden:
    """Refers to a volume where nobody looks."""

    def __init__(self, volume: Any) -> None:
        self.volume = volume


class WriteHidden(MapTransform, Randomizable):
    def __call__(self, data: Any) -> Any:
        data["hidden"].volume += 1
        return data


# How many patches a volume gives, and the transforms.
WRITERS: dict[str, tuple[int, Callable[[], list[Any]]]] = {
    "before the crop": (1, lambda: [WriteInPlace(), RandSpatialCropd(KEYS, SIZE, random_size=False)]),
    "instead of a crop": (1, lambda: [WriteInPlace()]),
    "a crop's subclass": (1, lambda: [Subclass(KEYS, SIZE, random_size=False)]),
    "a function that is no transform": (4, lambda: [WriteInPlace().__call__, RandUniformPatchd(KEYS, SIZE, 4)]),
    "a count": (4, lambda: [RandUniformPatchd(KEYS, SIZE, writes_and_counts)]),
    "a nested pipeline": (4, lambda: [Compose([WriteInPlace(), RandUniformPatchd(KEYS, SIZE, 4)])]),
    "a lazy crop": (1, lambda: [RandSpatialCropd(KEYS, SIZE, random_size=False, lazy=True), WriteInPlace()]),
    "a hidden reference": (1, lambda: [RandSpatialCropd(KEYS, SIZE, random_size=False), WriteHidden("image")]),
    "whole volumes": (1, lambda: [RandSpatialCropd(KEYS, (-1, -1, -1), random_size=False), WriteInPlace()]),
    "keys that are not cut": (1, lambda: [RandSpatialCropd("image", SIZE, random_size=False), WriteInPlace()]),
}


@pytest.mark.parametrize(
    ("writer", "lazy"),
    [*((writer, False) for writer in WRITERS), ("a lazy crop", None), ("a lazy crop", True), ("before the crop", True)],
)
@pytest.mark.parametrize("kind", ["meta", "tensor"])
def test_a_transform_that_writes_in_place_never_reaches_the_cache(kind: str, writer: str, lazy: bool | None) -> None:
    volumes = records(kind)
    for volume in volumes:
        if kind == "tensor":
            volume.update({key: torch.as_tensor(volume[key]) for key in KEYS})
        volume["hidden"] = Hidden(volume["image"])
    count, make = WRITERS[writer]
    dataset = CacheDataset(volumes, Compose([*make(), Lambdad("image", lambda x: x * 2)], lazy=lazy), progress=False)
    was = content(dataset)

    def run() -> str:
        with make_loader(dataset, batch_size=2, samples_per_volume=count, collate_fn=voxels) as loader:
            return digest([batch for _ in range(2) for batch in loader])

    lent = run()
    assert content(dataset) == was
    with copying():
        assert run() == lent


def voxels(patches: list[Any]) -> dict[str, Any]:
    return {key: torch.stack([torch.as_tensor(patch[key]) for patch in patches]) for key in (*KEYS, "age", "table")}


def test_what_a_dataset_gives_outside_the_loader_is_as_before() -> None:
    dataset = CacheDataset(records(), Compose(CROPS["spatial"]()), progress=False)
    batches(dataset)
    assert type(dataset) is CacheDataset
    assert dataset.copy_cache is True
    before = dataset._cache[0]["image"].untyped_storage().data_ptr()
    assert dataset[0]["image"].untyped_storage().data_ptr() != before


class Unusual(CacheDataset):
    """A cache that looks items up in a way of its own."""

    def _transform(self, index: int) -> Any:
        return super()._transform((index + 1) % len(self))


@pytest.mark.parametrize(
    "make",
    [
        lambda t: CacheDataset(records(), t, cache_rate=0.34, progress=False),
        lambda t: CacheDataset(records(), t, cache_num=0, progress=False),
        lambda t: CacheDataset(records(), t, copy_cache=False, progress=False),
        lambda t: CacheDataset(records(), t, runtime_cache=True, progress=False),
        lambda t: CacheDataset(records(), t, runtime_cache="processes", progress=False),
        lambda t: CacheDataset(records(), t, hash_as_key=True, hash_func=lambda r: bytes(r["age"]), progress=False),
        lambda t: Unusual(records(), t, progress=False),
        lambda t: torch.utils.data.Subset(CacheDataset(records(), t, progress=False), [2, 0, 1]),
        lambda t: Dataset(CacheDataset(records(), t, progress=False), RandFlipd("image", prob=0.5)),
    ],
    ids=["part", "nothing", "no copies", "runtime", "runtime, processes", "hashed", "subclass", "subset", "nested"],
)
@pytest.mark.parametrize("workers", [{}, {"num_workers": 2, "worker_type": "thread"}], ids=["inline", "threads"])
def test_every_kind_of_cache_gives_the_batches_of_deep_copies(make: Any, workers: dict[str, Any]) -> None:
    def pipeline() -> Compose:
        return Compose([*CROPS["our label"](), NormalizeIntensityd("image")])

    lent = batches(make(pipeline()), **workers)
    with copying():
        assert batches(make(pipeline())) == lent


def growth(side: int) -> int:
    """By how much memory grows over some epochs of forked workers behind a cache of eight cubes."""

    def measure() -> int:
        volumes = [{"image": torch.full((1, side, side, side), float(case))} for case in range(8)]
        dataset = CacheDataset(volumes, Compose([RandUniformPatchd("image", 16, 8)]), progress=False)
        gc.collect()
        before, peak = pss(), 0
        with make_loader(dataset, 2, batch_size=8, shuffle=True) as loader:
            for _ in range(2):
                for _ in loader:
                    peak = max(peak, pss())
        return peak - before

    return in_child(measure)


def test_forked_workers_share_the_cache() -> None:
    # A copy of this cache would be 64 MiB more than without one, and a copied volume in each worker 16.
    assert growth(128) - growth(32) < 6 * MIB
