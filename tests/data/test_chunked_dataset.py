# SPDX-License-Identifier: Apache-2.0
"""Patches out of a store are those of MONAI's PersistentDataset, and take no more of it than they touch."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import Dataset, MetaTensor, PersistentDataset, set_track_meta
from monai.transforms import (
    Compose,
    Flipd,
    LoadImaged,
    MapTransform,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandRotate90d,
    RandScaleIntensityd,
    ScaleIntensityd,
)

from monai_patchqueue import (
    ChunkedDataset,
    GridPatchSamplesd,
    LabelIndexd,
    LazyMetaTensor,
    PatchQueueLoader,
    RandLabelPatchd,
    RandUniformPatchd,
    RandWeightedPatchd,
)
from monai_patchqueue.io.chunks import ChunkedFile
from tests.nifti_files import write_nifti
from tests.pipelines import append_line, digest, lines
from tests.volumes import blobs

KEYS = ["image", "label"]
SHAPE = (40, 36, 33)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("volumes")
    records = []
    for number in range(3):
        rng = np.random.default_rng(number)
        image = rng.integers(-1000, 1000, SHAPE).astype(np.int16)
        label = blobs(*SHAPE, seed=number)[0]
        weights = (label > 0) + rng.random(SHAPE).astype(np.float32)
        volumes = {"image": image, "label": label, "weights": weights.astype(np.float32)}
        paths = {key: write_nifti(folder / f"{key}_{number}.nii", array) for key, array in volumes.items()}
        records.append({**paths, "age": 40 + number, "site": ("a", number)})
    return records


def load(*keys: str) -> LoadImaged:
    return LoadImaged(keys or KEYS, ensure_channel_first=True)


AUGMENT = [RandFlipd(KEYS, 0.5, 0), RandScaleIntensityd("image", 0.3, prob=0.5)]
PIPELINES: dict[str, Callable[[], list[Any]]] = {
    "uniform": lambda: [load(), Flipd(KEYS, 1), RandUniformPatchd(KEYS, 16, 4), *AUGMENT],
    "label": lambda: [load(), ScaleIntensityd("image"), RandLabelPatchd(KEYS, "label", (12, 16, 8), 5), *AUGMENT],
    "balanced": lambda: [load(), RandLabelPatchd(KEYS, "label", 16, 6, "balanced", 0.4, 2, border="clamp"), *AUGMENT],
    "indexed": lambda: [load(), LabelIndexd("label"), RandLabelPatchd(KEYS, "label", 16, 4, {1: 1, 2: 2}), *AUGMENT],
    "weighted": lambda: [load(*KEYS, "weights"), RandWeightedPatchd(KEYS, "weights", 16, 4), *AUGMENT],
    "padded": lambda: [load(), RandUniformPatchd(KEYS, (16, 40, 8), 3, "pad", ["edge", 0]), *AUGMENT],
    "grid": lambda: [load(), GridPatchSamplesd(KEYS, (20, 18, -1)), *AUGMENT],
    "monai's crop": lambda: [load(), RandCropByPosNegLabeld(KEYS, "label", (16, 16, 16), num_samples=3), *AUGMENT],
    "no crop first": lambda: [load(), *AUGMENT[1:], RandLabelPatchd(KEYS, "label", 16, 3), *AUGMENT],
    "no crop first, but turns": lambda: [load(), RandRotate90d(KEYS, 0.5), RandLabelPatchd(KEYS, "label", 16, 3)],
    "no crop": lambda: [load(), *AUGMENT],
    "nothing random": lambda: [load(), Flipd(KEYS, 1)],
}


def assert_same(ours: Any, theirs: Any) -> None:
    """Same types, values, metadata and traces, the identities of transforms aside."""
    if isinstance(ours, LazyMetaTensor):
        ours = ours.load()
    assert type(ours) is type(theirs)
    if isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            if key != "id":
                assert_same(ours[key], theirs[key])
    elif isinstance(theirs, MetaTensor):
        assert_same(ours.as_tensor(), theirs.as_tensor())
        assert_same(ours.meta, theirs.meta)
        assert_same(ours.applied_operations, theirs.applied_operations)
        assert ours.pending_operations == theirs.pending_operations
    elif isinstance(theirs, torch.Tensor | np.ndarray):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert bytes(memoryview(np.ascontiguousarray(ours))) == bytes(memoryview(np.ascontiguousarray(theirs)))
    else:
        assert ours == theirs or (ours != ours and theirs != theirs)


def items(dataset: Any, seed: int = 3) -> list[Any]:
    dataset.transform.set_random_state(seed)
    return [dataset[number] for number in range(len(dataset))]


@pytest.mark.parametrize(
    ("name", "mmap"), [*((name, True) for name in PIPELINES), ("label", False), ("no crop", False)]
)
def test_patches_are_those_of_a_persistent_dataset(
    files: list[dict[str, Any]], tmp_path: Path, name: str, mmap: bool
) -> None:
    theirs: Any = PersistentDataset(files, Compose(PIPELINES[name]()), tmp_path / "theirs", track_meta=True)
    if name == "grid":  # which is no random transform: PersistentDataset would store the patches
        theirs = Dataset(files, Compose(PIPELINES[name]()))
    if name == "indexed":  # whose indices PersistentDataset keeps, of tensors that are gone
        others = [transform for transform in PIPELINES[name]() if not isinstance(transform, LabelIndexd)]
        theirs = PersistentDataset(files, Compose(others), tmp_path, track_meta=True)
    ours = ChunkedDataset(files, Compose(PIPELINES[name]()), tmp_path / "ours", chunk_shape=16, mmap=mmap)
    ours.prepare(progress=False)
    items(theirs)  # the first time it gives what it has not stored and read yet
    assert_same(items(ours), items(theirs))
    assert_same(items(ours, 4), items(theirs, 4))


@pytest.mark.parametrize("name", ["uniform", "label", "weighted", "no crop first"])
def test_an_epoch_reads_the_patches_alone(
    files: list[dict[str, Any]], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ChunkedDataset(files, Compose(PIPELINES[name]()), tmp_path)
    dataset.prepare(progress=False)
    items(dataset, 9)  # makes the indices that are lacking
    read = []
    reading = ChunkedFile.__getitem__

    def counted(self: ChunkedFile, index: Any) -> np.ndarray:
        region = reading(self, index)
        read.append(region.size)
        return region

    monkeypatch.setattr(ChunkedFile, "__getitem__", counted)
    patches = [patch for item in items(dataset) for patch in item]
    rows = len(patches) * SHAPE[2] if name == "weighted" else 0  # the rows of the map that centers lie on
    wanted = sum(patch[key].numel() for patch in patches for key in KEYS)
    assert wanted <= sum(read) <= wanted + rows


class Logged(MapTransform):
    """Notes each volume that it sees."""

    def __init__(self, log: Path) -> None:
        super().__init__("image")
        self.log = log

    def __call__(self, data: Any) -> Any:
        append_line(self.log, Path(data["image"].meta["filename_or_obj"]).name)
        return dict(data)


def test_a_volume_is_prepared_once_by_whichever_dataset(files: list[dict[str, Any]], tmp_path: Path) -> None:
    def dataset(size: int) -> ChunkedDataset:
        transform = Compose([load(), Logged(tmp_path / "log"), RandLabelPatchd(KEYS, "label", size, 2)])
        return ChunkedDataset(files, transform, tmp_path / "store")

    first = dataset(8)
    first[1]
    first[1]
    assert lines(tmp_path / "log") == ["image_1.nii"]
    first.prepare(num_workers=2, progress=False)
    for other in (first, dataset(8), dataset(16)):
        other.prepare(progress=False)
        items(other)
    assert sorted(lines(tmp_path / "log")) == ["image_0.nii", "image_1.nii", "image_2.nii"]


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 0},
        {"num_workers": 2, "worker_type": "thread"},
        {"num_workers": 2},
        pytest.param({"num_workers": 1, "multiprocessing_context": "spawn"}, marks=pytest.mark.slow),
    ],
    ids=["inline", "threads", "fork", "spawn"],
)
def test_a_loader_gives_the_same_batches_of_either_store(
    files: list[dict[str, Any]], tmp_path: Path, options: dict[str, Any]
) -> None:
    def batches(dataset: Any, **options: Any) -> str:
        with PatchQueueLoader(
            dataset, batch_size=2, batch_unit="patch", shuffle=True, seed=1, queue_length=6, **options
        ) as loader:
            next(iter(loader))  # PersistentDataset gives the first epoch of what it has not stored yet
            return digest([batch for _ in range(2) for batch in loader])

    theirs = PersistentDataset(files, Compose(PIPELINES["label"]()), tmp_path / "theirs", track_meta=True)
    items(theirs)
    ours = ChunkedDataset(files, Compose(PIPELINES["label"]()), tmp_path / "ours")  # workers prepare, all at once
    assert batches(ours, **options) == batches(theirs)
    assert ours.verify(progress=False) == []


def test_what_decides_the_outcome_decides_what_is_read(files: list[dict[str, Any]], tmp_path: Path) -> None:
    def stored(low: float = 0.0, data: Any = files, **options: Any) -> set[str]:
        transform = Compose([load(), ScaleIntensityd("image", low, 1), RandUniformPatchd(KEYS, 8)])
        dataset = ChunkedDataset(data, transform, tmp_path, **options)
        return {dataset._name(number) for number in range(len(dataset))}

    first = stored()
    assert first == stored()
    assert stored(chunk_shape=[8, 9, 10]) == stored(chunk_shape=(8, 9, 10))
    assert len(first) == len(files)
    others = [
        stored(0.5),
        stored(chunk_shape=8),
        stored(version="2"),
        stored(data=[{**record, "age": 99} for record in files]),
        stored(check="content"),
    ]
    for number, other in enumerate(others):
        assert not other & first, number


@pytest.mark.parametrize("check", ["mtime", "content"])
def test_a_file_that_has_changed_is_prepared_again(tmp_path: Path, check: Any) -> None:
    path = write_nifti(tmp_path / "image.nii", np.zeros(SHAPE, np.int16))

    def patch() -> float:
        transform = Compose([load("image"), RandUniformPatchd("image", 8)])
        dataset = ChunkedDataset([{"image": path}], transform, tmp_path / "store", check=check)
        return float(dataset[0][0]["image"].max())

    assert patch() == 0
    write_nifti(path, np.ones(SHAPE, np.int16))
    assert patch() == 1


def test_damage_is_found_named_and_repaired(
    files: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = ChunkedDataset(files, Compose(PIPELINES["label"]()), tmp_path)
    dataset.prepare(progress=False)
    expected = items(dataset)
    assert dataset.verify(progress=False) == []
    victim = sorted(tmp_path.rglob("image.b2nd"))[1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 16
    victim.write_bytes(content)
    assert dataset.verify(progress=False) == [victim]
    assert str(victim) in caplog.text
    assert dataset.verify(remove=True, progress=False) == [victim]
    assert not victim.exists()
    assert_same(items(dataset), expected)
    assert victim.exists()
    assert dataset.verify(progress=False) == []


@pytest.mark.parametrize("file", ["entry.json", "label.b2nd"])
def test_an_entry_that_cannot_be_read_is_prepared_again(
    files: list[dict[str, Any]], tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = ChunkedDataset(files, Compose(PIPELINES["uniform"]()), tmp_path)
    expected = items(dataset)
    victim = sorted(tmp_path.rglob(file))[0]
    victim.unlink() if file == "label.b2nd" else victim.write_text("{}")
    assert_same(items(dataset), expected)
    assert re.search(r"volume \d .*image_\d\.nii.* is prepared again", caplog.text)


@pytest.mark.parametrize("file", ["entry.json", "starts"])
def test_an_index_that_cannot_be_read_is_made_again(
    files: list[dict[str, Any]], tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    noise = np.random.default_rng(0).random(SHAPE) < 0.03  # many runs, so that they are in files of their own
    label = write_nifti(tmp_path / "label.nii", noise.astype(np.uint8))
    transform = Compose([load(), RandLabelPatchd(KEYS, "label", 8, 3)])
    dataset = ChunkedDataset([{**files[0], "label": label}], transform, tmp_path / "store")
    expected = items(dataset)
    victim = next(path for path in sorted(tmp_path.rglob("*")) if ".runs-" in str(path) and file in path.name)
    victim.write_bytes(victim.read_bytes()[:-1])
    os.utime(victim.parent / "entry.json", (1, 1))  # it is not remembered
    assert_same(items(dataset), expected)
    assert "an index is made again" in caplog.text
    assert dataset.verify(progress=False) == []


def test_a_full_disk_is_an_error_with_sizes_and_leaves_whole_entries(
    files: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    big = write_nifti(tmp_path / "big.nii", np.random.default_rng(0).integers(0, 9999, (90, 90, 90)).astype(np.int16))
    transform = Compose([load("image"), RandUniformPatchd("image", 8)])
    dataset = ChunkedDataset([{"image": files[0]["image"]}, {"image": big}], transform, tmp_path / "store")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        message = r"no room for volume 1 \(.*big\.nii\): it takes \d\.\d MiB, .* are free, and 1 of 2 volumes"
        with pytest.raises(OSError, match=message):
            dataset.prepare(progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert dataset.verify(progress=False) == []
    assert [path.name for path in (tmp_path / "store").rglob("*.b2nd")] == ["image.b2nd"]
    assert len(dataset[1]) == 1


def test_what_is_needed_is_estimated_and_missing_room_is_said_beforehand(
    files: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ChunkedDataset(files, Compose(PIPELINES["uniform"]()), tmp_path)
    estimate = dataset.estimate_bytes()
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with caplog.at_level(logging.INFO):
        dataset.prepare(progress=False)
    assert "the 3 volumes take about" in caplog.text
    assert re.search(r"1 more need about .*, and .* has 1000\.0 B left", caplog.text)
    stored = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert estimate == pytest.approx(stored, rel=0.1)
    caplog.clear()
    dataset.prepare(progress=False)
    assert caplog.text == ""


def test_what_is_no_longer_used_is_removed_and_the_rest_stays(files: list[dict[str, Any]], tmp_path: Path) -> None:
    def dataset(data: Any, version: str = "") -> ChunkedDataset:
        made = ChunkedDataset(data, Compose(PIPELINES["label"]()), tmp_path, version=version)
        made.prepare(progress=False)
        return made

    training, validation, experiment = dataset(files[:2]), dataset(files[2:]), dataset(files, "2")
    before = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert training.gc(validation, experiment) == 0
    freed = training.gc(validation, keep_other_pipelines=True)
    assert freed == 0
    freed = training.gc(validation)
    after = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert freed == before - after > 0
    folder = training._items.folder
    assert all(validation._name(0) in folder and training._name(number) in folder for number in range(2))
    assert not any(experiment._name(number) in folder for number in range(3))
    training.gc(keep_other_pipelines=True)
    assert validation._name(0) not in folder
    training.set_data(files[1:2])
    training.gc()
    assert {name.split(".")[0] for name in folder.names()} == {training._name(0)}


def test_arrays_and_tensors_stay_what_they_were(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.random((2, 20, 30)).astype(np.float32)
    record = {
        "array": image,
        "tensor": torch.from_numpy(image.astype(np.float64)),
        "label": np.stack([blobs(20, 30)[0] == c for c in (1, 2)]),
        "other": rng.random((1, 40, 40)),
        "table": rng.random((700, 2)),
        "names": ["a", {"b": (1, None)}],
    }
    crop = RandLabelPatchd(["array", "tensor"], "label", 8, 4, {1: 1.0})
    dataset = ChunkedDataset([record], Compose([Flipd(["array"], 0), crop]), tmp_path, chunk_shape=8)
    flipped = np.flip(image, 1)
    dataset.prepare(progress=False)
    for patch in dataset[0]:
        location = tuple(slice(a, b) for a, b in patch["patch_location"])
        assert isinstance(patch["array"], MetaTensor)  # Flipd makes it one
        np.testing.assert_array_equal(patch["array"], flipped[(slice(None), *location)])
        assert type(patch["tensor"]) is torch.Tensor
        np.testing.assert_array_equal(patch["tensor"], image.astype(np.float64)[(slice(None), *location)])
        center = tuple(a + 4 for a, _ in patch["patch_location"])
        assert record["label"][(1, *center)]
        assert "label" not in patch
        np.testing.assert_array_equal(patch["other"], record["other"], strict=True)
        np.testing.assert_array_equal(patch["table"], record["table"], strict=True)
        assert patch["names"] == ["a", {"b": (1, None)}]


def test_a_label_too_noisy_for_runs_is_read_whole(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 4, (1, 24, 24, 24)).astype(np.uint8)
    transform = [ScaleIntensityd("image"), RandLabelPatchd(["image", "label"], "label", 4, 5, {3: 1})]
    record = {"image": MetaTensor(np.float32(noise)), "label": MetaTensor(noise)}
    ours = ChunkedDataset([record], Compose(transform), tmp_path / "ours")
    theirs = PersistentDataset([record], Compose(transform), None, track_meta=True)
    for a, b in zip(items(ours)[0], items(theirs)[0], strict=True):
        assert a["label"].meta["crop_center"] == b["label"].meta["crop_center"]
        assert torch.equal(a["image"].as_tensor(), b["image"].as_tensor())
    assert len(list((tmp_path / "ours").iterdir())) == 1


def test_without_metadata_there_are_plain_tensors(files: list[dict[str, Any]], tmp_path: Path) -> None:
    set_track_meta(False)
    try:
        dataset = ChunkedDataset(files, Compose(PIPELINES["label"]()), tmp_path)
        assert all(type(patch["image"]) is torch.Tensor for item in items(dataset) for patch in item)
    finally:
        set_track_meta(True)
    tracked = ChunkedDataset(files, Compose(PIPELINES["label"]()), tmp_path)
    assert tracked._name(0) != dataset._name(0)


def test_a_store_that_cannot_be_written_to_is_read_all_the_same(
    files: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small, large = (
        ChunkedDataset(files, Compose([load(), RandLabelPatchd(KEYS, "label", size)]), tmp_path) for size in (8, 16)
    )
    small.prepare(progress=False)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "read-only")))
    assert [patch[0]["image"].shape for patch in items(large)] == [(1, 16, 16, 16)] * 3
    assert "an index is not kept" in caplog.text


@pytest.mark.parametrize(
    ("transform", "options", "message"),
    [
        ([RandFlipd("image"), ScaleIntensityd("image")], {}, "the first transform, RandFlipd, is random"),
        ([], {}, "nothing to prepare"),
        ([ScaleIntensityd("image")], {"chunk_shape": (64, 0, 64)}, r"chunk_shape .* got \(64, 0, 64\)"),
        ([ScaleIntensityd("image")], {"check": "size"}, "check must be one of 'mtime', 'content', got 'size'"),
    ],
)
def test_impossible_arguments_are_refused_at_once(
    tmp_path: Path, transform: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ChunkedDataset([], transform, tmp_path, **options)


@pytest.mark.parametrize("pipeline", ["uniform", "padded", "no crop first", "nothing random"])
def test_what_is_written_into_an_item_does_not_last(files: list[dict[str, Any]], tmp_path: Path, pipeline: str) -> None:
    record = {**files[0], "box": np.arange(6), "ages": [40, {"at": 41}]}
    transform = Compose(PIPELINES[pipeline]())
    dataset = ChunkedDataset([record], transform, tmp_path)
    transform.set_random_state(0)
    expected = copy.deepcopy(dataset[0])
    for item in dataset[0] if isinstance(expected, list) else [dataset[0]]:
        spoil(item)
    transform.set_random_state(0)
    assert_same(dataset[0], expected)


def spoil(value: Any) -> None:
    if isinstance(value, MetaTensor):
        spoil([value.meta, value.applied_operations])
    elif isinstance(value, torch.Tensor | np.ndarray):
        value[...] = 77
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            spoil(part)
        value.clear()


def test_a_value_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    dataset = ChunkedDataset(
        [{"image": np.zeros((1, 20, 20, 20), np.float32), "reader": {"object": object()}}],
        Compose([ScaleIntensityd("image"), RandUniformPatchd("image", 8)]),
        tmp_path,
    )
    with pytest.raises(TypeError, match=r"reader.*object"):
        dataset[0]
    image = {"image": np.zeros((1, 90, 90))}
    three_axes = ChunkedDataset([image], ScaleIntensityd("image"), tmp_path, chunk_shape=[8] * 4)
    with pytest.raises(ValueError, match=r"volume 0 cannot be stored: image: chunk_shape .* is for 4 spatial axes"):
        three_axes[0]
