# SPDX-License-Identifier: Apache-2.0
"""MONAI's transforms between ``LoadVolumed(lazy_read=True)`` and cutting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, Dataset, MetaTensor, PersistentDataset
from monai.transforms import (
    AdjustContrastd,
    AsDiscreted,
    CastToTyped,
    CenterSpatialCropd,
    Compose,
    CopyItemsd,
    CropForegroundd,
    DivisiblePadd,
    EnsureChannelFirstd,
    EnsureTyped,
    Flipd,
    GaussianSmoothd,
    Lambdad,
    NormalizeIntensityd,
    Orientationd,
    RandAxisFlipd,
    RandFlipd,
    RandGaussianNoised,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropd,
    RandWeightedCropd,
    Resized,
    Rotate90d,
    ScaleIntensityd,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
    ShiftIntensityd,
    Spacingd,
    SpatialCropd,
    SpatialPadd,
    SqueezeDimd,
    ThresholdIntensityd,
    ToNumpyd,
    ToTensord,
    Transposed,
)

from monai_patchqueue import (
    LabelIndexd,
    LazyMetaTensor,
    LoadVolumed,
    PatchQueueLoader,
    RandLabelPatchd,
    RandUniformPatchd,
    RandWeightedPatchd,
)
from monai_patchqueue.io.regions import StoredFile
from monai_patchqueue.transforms import _stored
from monai_patchqueue.transforms._kept import KeptIndices
from tests.nifti_files import AFFINE, assert_same_meta, assert_same_volume, voxels, write_nifti
from tests.volumes import blobs

KEYS = ["image", "label"]
SHAPE = (22, 19, 17)
OBLIQUE = AFFINE + np.array([[0.1, 0, 0.2, 0], [0, 0.2, 0, 0], [0, 0.3, 0, 0], [0, 0, 0, 0]])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("files")
    label = blobs(*SHAPE)[0]
    labels = write_nifti(folder / "label.nii", label, affine=OBLIQUE)
    files = {
        "int16, scaled, oblique": write_nifti(
            folder / "a.nii", voxels(SHAPE, "i2"), slope=0.3, inter=-7, affine=OBLIQUE
        ),
        "float32": write_nifti(folder / "b.nii", voxels(SHAPE, "f4"), affine=OBLIQUE),
        "uint8, big-endian header, compressed": write_nifti(
            folder / "c.nii.gz", voxels(SHAPE, "u1"), endian=">", affine=OBLIQUE
        ),
        "uint16, two channels": write_nifti(folder / "d.nii", voxels((*SHAPE, 2), "u2"), affine=OBLIQUE),
    }
    items = {name: {"image": file, "label": labels} for name, file in files.items()}
    for order in "CF":
        np.save(folder / f"{order}.npy", np.asarray(voxels(SHAPE, "f8"), order=order))  # type: ignore[arg-type]
        np.save(folder / f"{order}_label.npy", np.asarray(label, order=order))  # type: ignore[arg-type]
        names = {"image": str(folder / f"{order}.npy"), "label": str(folder / f"{order}_label.npy")}
        items[f".npy in {order} order"] = names
    return items


FILES = [
    *("int16, scaled, oblique", "float32", "uint8, big-endian header, compressed", "uint16, two channels"),
    *(".npy in C order", ".npy in F order"),
]

LAZY: dict[str, Any] = {
    "Orientationd": Orientationd(KEYS, "RAS", labels=None),
    "Orientationd, other axes": Orientationd(KEYS, "SLA", labels=None),
    "Flipd": Flipd(KEYS, (0, 2)),
    "Rotate90d": Rotate90d(KEYS, 1, (0, 2)),
    "Rotate90d, thrice": Rotate90d(KEYS, 3, (1, 2)),
    "Transposed": Transposed(KEYS, (0, 3, 1, 2)),
    "RandFlipd": RandFlipd(KEYS, 1, 1),
    "RandAxisFlipd": RandAxisFlipd(KEYS, 1),
    "RandRotate90d": RandRotate90d(KEYS, 1),
    "CenterSpatialCropd": CenterSpatialCropd(KEYS, (15, -1, 14)),
    "SpatialCropd": SpatialCropd(KEYS, roi_start=(1, 2, 3), roi_end=(20, 19, 17)),
    "SpatialPadd, where nothing is to be padded": SpatialPadd(KEYS, 16),
    "EnsureChannelFirstd": EnsureChannelFirstd(KEYS, channel_dim=0),
    "CopyItemsd": CopyItemsd("label", names="copy"),
    "ScaleIntensityRanged": ScaleIntensityRanged("image", -50, 200, 0, 1, clip=True),
    "ScaleIntensityRanged, one bound": ScaleIntensityRanged("image", -50, 200, 0, None, clip=True),
    "ScaleIntensityd by a factor": ScaleIntensityd("image", minv=None, maxv=None, factor=0.3),
    "RandScaleIntensityd": RandScaleIntensityd("image", 0.5, prob=1),
    "RandShiftIntensityd": RandShiftIntensityd("image", 20, prob=1),
    "ShiftIntensityd": ShiftIntensityd("image", 13.7),
    "ThresholdIntensityd": ThresholdIntensityd("image", 50, above=False, cval=3),
    "NormalizeIntensityd with fixed numbers": NormalizeIntensityd("image", subtrahend=10.3, divisor=7),
    "CastToTyped": CastToTyped(KEYS, (np.float64, np.uint8)),
    "CastToTyped, half": CastToTyped("image", torch.float16),
    "EnsureTyped": EnsureTyped(KEYS, dtype=(torch.float32, torch.int64)),
    "ToTensord": ToTensord(KEYS),
    "AsDiscreted": AsDiscreted("label", threshold=2),
    "Lambdad": Lambdad("image", lambda x: (x > 5) * 2.5),
}

WHOLE: dict[str, Any] = {
    "NormalizeIntensityd": NormalizeIntensityd("image"),
    "NormalizeIntensityd, by channels, where not 0": NormalizeIntensityd("image", nonzero=True, channel_wise=True),
    "ScaleIntensityd": ScaleIntensityd("image"),
    "ScaleIntensityRangePercentilesd": ScaleIntensityRangePercentilesd("image", 5, 95, 0, 1),
    "AdjustContrastd": AdjustContrastd("image", 1.5),
    "Spacingd": Spacingd(KEYS, (2, 2, 2), mode=("bilinear", "nearest")),
    "Resized": Resized(KEYS, (18, 18, 18), mode=("trilinear", "nearest")),
    "SpatialPadd": SpatialPadd(KEYS, 24),
    "DivisiblePadd": DivisiblePadd(KEYS, 8),
    "CropForegroundd": CropForegroundd(KEYS, "label"),
    "GaussianSmoothd": GaussianSmoothd("image", 1),
    "RandGaussianNoised": RandGaussianNoised("image", prob=1),
    "ToNumpyd": ToNumpyd(KEYS),
    "SqueezeDimd twice": Compose([SqueezeDimd("label"), Lambdad("label", lambda x: x[None])]),
    "LabelIndexd": LabelIndexd("label"),
    "in place": Lambdad("image", lambda x: x.mul_(2)),
}


def load(lazy_read: bool, dtype: Any = np.float32, mmap: bool = True) -> LoadVolumed:
    return LoadVolumed(KEYS, dtype=dtype, ensure_channel_first=True, lazy_read=lazy_read, mmap=mmap)


CROP = RandLabelPatchd(KEYS, "label", (8, 7, 6), 3, "balanced")


def patches_of(
    item: dict[str, str], steps: list[Any], lazy_read: bool, dtype: Any = np.float32
) -> list[dict[str, Any]]:
    """The patches of an item; traces name the same transforms each time."""
    patches: list[dict[str, Any]] = Compose([load(lazy_read, dtype), *steps]).set_random_state(4)(item)
    return patches


def assert_same_patches(ours: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(ours) == len(expected)
    for patch, other in zip(ours, expected, strict=True):
        assert patch.keys() == other.keys()
        for key in KEYS:
            for volume in (patch[key], other[key]):
                if isinstance(volume, MetaTensor):
                    volume.applied_operations = _without_ids(volume.applied_operations)
            assert_same_volume(patch[key], other[key])


def _without_ids(trace: Any) -> Any:
    """A trace without identities of transforms: ``RandRotate90`` makes another one at each call."""
    if isinstance(trace, dict):
        return {key: _without_ids(value) for key, value in trace.items() if key != "id"}
    return [_without_ids(value) for value in trace] if isinstance(trace, list) else trace


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("transform", LAZY.values(), ids=LAZY)
def test_what_commutes_with_cutting_is_done_to_patches(
    files: dict[str, dict[str, str]], transform: Any, file: str
) -> None:
    dtype = None if file == "int16, scaled, oblique" else np.float32
    loaded = Compose([load(True, dtype), transform])(files[file])
    for key in KEYS:
        assert isinstance(loaded[key], LazyMetaTensor)
        assert loaded[key].is_deferred
    assert_same_patches(*(patches_of(files[file], [transform, CROP], lazy_read, dtype) for lazy_read in (True, False)))


@pytest.mark.parametrize("file", FILES[::2])
@pytest.mark.parametrize("transform", WHOLE.values(), ids=WHOLE)
def test_all_else_gets_the_volume(files: dict[str, dict[str, str]], transform: Any, file: str) -> None:
    assert_same_patches(*(patches_of(files[file], [transform, CROP], lazy_read) for lazy_read in (True, False)))


PIPELINE = [
    Orientationd(KEYS, "RAS", labels=None),
    RandFlipd(KEYS, 0.5, 0),
    ScaleIntensityRanged("image", -50, 200, 0, 1, clip=True),
    CastToTyped(KEYS, (np.float16, np.uint8)),
    EnsureTyped(KEYS, dtype=(torch.float32, torch.uint8)),
]


@pytest.fixture
def voxels_read(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many voxels were read of each file."""
    count: dict[str, int] = {}
    original = StoredFile.__getitem__

    def counting(self: StoredFile, index: tuple[slice, ...]) -> np.ndarray:
        part = original(self, index)
        count[Path(self.file).name] = count.get(Path(self.file).name, 0) + part.size
        return part

    monkeypatch.setattr(StoredFile, "__getitem__", counting)
    return count


@pytest.mark.parametrize("file", FILES)
def test_a_pipeline_reads_patches_and_the_label_once(
    files: dict[str, dict[str, str]], file: str, voxels_read: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (np.float32, None):
        monkeypatch.setattr(_stored, "kept_indices", KeptIndices())
        voxels_read.clear()
        ours = patches_of(files[file], [*PIPELINE, CROP], True, dtype)
        patch = 8 * 7 * 6
        image, label = (Path(files[file][key]).name for key in KEYS)
        if not image.endswith(".gz"):
            assert voxels_read[image] == 3 * patch * len(ours[0]["image"])
        assert voxels_read[label] == 3 * patch + np.prod(SHAPE)
        assert_same_patches(ours, patches_of(files[file], [*PIPELINE, CROP], False, dtype))


@pytest.mark.parametrize(
    "crop",
    [
        RandUniformPatchd(KEYS, (8, 30, -1), 3, padding_mode="reflect"),
        RandUniformPatchd(KEYS, 6, 3, border="pad"),
        RandWeightedPatchd(KEYS, "label", 6, 3, border="clamp"),
        RandLabelPatchd(KEYS, "label", 6, 3, foreground_fraction=0.5, border="pad", padding_mode=4),
    ],
    ids=lambda crop: f"{type(crop).__name__} {crop.cropper.border}",
)
def test_every_patch_transform_cuts_it(files: dict[str, dict[str, str]], crop: Any) -> None:
    item = files["int16, scaled, oblique"]
    assert_same_patches(*(patches_of(item, [*PIPELINE, crop], lazy_read) for lazy_read in (True, False)))


def test_monais_crops_read_their_patches_only(files: dict[str, dict[str, str]], voxels_read: dict[str, int]) -> None:
    item = files["int16, scaled, oblique"]
    noise = RandGaussianNoised("image", prob=1)
    for crop in (RandSpatialCropd(KEYS, (8, 7, 6), random_size=False), RandWeightedCropd(KEYS, "label", (8, 7, 6), 1)):
        ours, expected = (patches_of(item, [*PIPELINE, crop, noise], lazy_read) for lazy_read in (True, False))
        for patch, other in zip(*(p if isinstance(p, list) else [p] for p in (ours, expected)), strict=True):
            for key in KEYS:
                values = patch[key].load() if isinstance(patch[key], LazyMetaTensor) else patch[key]
                assert torch.equal(values.as_tensor(), other[key].as_tensor())
                assert_same_meta(patch[key].meta, other[key].meta)
        assert voxels_read["a.nii"] == 8 * 7 * 6
        voxels_read.clear()


def test_monais_lazy_resampling_goes_on_top(files: dict[str, dict[str, str]]) -> None:
    item = files["int16, scaled, oblique"]
    steps = [Orientationd(KEYS, "RAS", labels=None), Spacingd(KEYS, (2, 2, 2), mode=("bilinear", "nearest"))]
    for n in (1, 2):
        for crop in (RandUniformPatchd(KEYS, 6, 2), RandUniformPatchd(KEYS, 6, 2, lazy=True)):
            results = [
                Compose([load(lazy_read), *steps[:n], crop], lazy=True).set_random_state(0)(item)
                for lazy_read in (True, False)
            ]
            for patch, other in zip(*results, strict=True):
                assert torch.equal(patch["image"].as_tensor(), other["image"].as_tensor())
                assert torch.equal(patch["image"].affine, other["image"].affine)


@pytest.mark.parametrize(("workers", "worker_type"), [(0, "process"), (2, "process"), (2, "thread")])
def test_the_queue_draws_the_batches_of_loaded_volumes(
    files: dict[str, dict[str, str]], workers: int, worker_type: Any, tmp_path: Path
) -> None:
    volumes = [files[file] for file in FILES if file != "uint16, two channels"]
    epochs = []
    for lazy_read, n in ((True, workers), (False, 0)):
        crop = RandLabelPatchd(KEYS, "label", (16, 14, 12), 3, "balanced")
        dataset = Dataset(volumes, Compose([load(lazy_read), *PIPELINE, crop]))
        with PatchQueueLoader(
            dataset, n, worker_type=worker_type, batch_size=4, batch_unit="patch", shuffle=True, seed=3
        ) as loader:
            epochs.append([*loader, *loader])
    for ours, expected in zip(*epochs, strict=True):
        for key in KEYS:
            assert_same_volume(ours[key].as_tensor(), expected[key].as_tensor())
            assert_same_meta(ours[key].meta, expected[key].meta)


@pytest.mark.parametrize("cached", [False, True])
def test_the_queue_reads_patches_of_monais_crops(
    files: dict[str, dict[str, str]], voxels_read: dict[str, int], cached: bool
) -> None:
    volumes = [files["int16, scaled, oblique"]] * 2
    epochs = []
    for lazy_read in (True, False):
        crop = RandSpatialCropd(KEYS, (16, 14, 12), random_size=False)
        pipeline = Compose([load(lazy_read), *PIPELINE, crop])
        dataset = CacheDataset(volumes, pipeline, progress=False) if cached else Dataset(volumes, pipeline)
        with PatchQueueLoader(dataset, batch_size=2, seed=3) as loader:
            epochs.append([loaded[key].as_tensor() for loaded in loader for key in KEYS])
        if lazy_read:
            assert voxels_read["a.nii"] == 2 * 16 * 14 * 12
            assert voxels_read["label.nii"] == 2 * 16 * 14 * 12
    assert all(map(torch.equal, *epochs))


@pytest.mark.parametrize("workers", [0, 2])
def test_monais_loader_collates_it(files: dict[str, dict[str, str]], workers: int) -> None:
    volumes = [files["int16, scaled, oblique"], files["float32"]]
    batches = [
        next(
            iter(
                DataLoader(
                    Dataset(volumes, Compose([load(lazy_read), *PIPELINE[:1]])), batch_size=2, num_workers=workers
                )
            )
        )
        for lazy_read in (True, False)
    ]
    for key in KEYS:
        assert_same_volume(batches[0][key].as_tensor(), batches[1][key].as_tensor())
        assert sorted(batches[0][key].meta) == sorted(batches[1][key].meta)
        assert torch.equal(batches[0][key].affine, batches[1][key].affine)
        assert batches[0][key].is_batch


def test_monais_persistent_dataset_keeps_its_voxels(files: dict[str, dict[str, str]], tmp_path: Path) -> None:
    pipeline = Compose([load(True), *PIPELINE[2:]])
    dataset = PersistentDataset([files["float32"]], pipeline, tmp_path)
    for _ in range(2):
        item = dataset[0]
        for key, expected in Compose([load(False), *PIPELINE[2:]])(files["float32"]).items():
            assert torch.equal(torch.as_tensor(item[key]), expected.as_tensor())
    assert type(item["image"]) in (torch.Tensor, MetaTensor)
