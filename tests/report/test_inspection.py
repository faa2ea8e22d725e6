# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, Dataset, MetaTensor
from monai.transforms import (
    Compose,
    EnsureTyped,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandSpatialCropSamplesd,
    ScaleIntensityRanged,
)
from torch.utils.data import Subset

from monai_patchqueue import RandLabelPatchd, RandUniformPatchd
from monai_patchqueue.report.inspection import sample_volume
from monai_patchqueue.report.inspection_plot import plot_sampling
from tests.volumes import blobs, meta, numbered

KEYS = ["image", "label"]
CROPS = {
    "ours by label": RandLabelPatchd(KEYS, "label", (8, 6, 4), num_samples=5, label_probabilities={0: 1, 1: 2, 2: 1}),
    "ours that pads": RandUniformPatchd(KEYS, (8, 6, 4), num_samples=3, border="pad"),
    "MONAI's by label": RandCropByPosNegLabeld(KEYS, "label", (8, 6, 4), num_samples=4),
    "MONAI's uniform": RandSpatialCropSamplesd(KEYS, (8, 6, 4), num_samples=4, random_size=False),
}


def dataset(crop: Any, *after: Any, kind: type = Dataset) -> Any:
    shape = (24, 22, 20)
    records = [{"image": meta(numbered(*shape).astype(np.float32)), "label": meta(blobs(*shape))} for _ in range(3)]
    return kind(records, Compose([EnsureTyped(KEYS), crop, *after]))


@pytest.mark.parametrize("name", CROPS)
def test_patches_are_found_where_they_were_taken(name: str) -> None:
    sampled = sample_volume(dataset(CROPS[name]), 1, patches=30, shown=30, progress=False)
    assert len(sampled.starts) >= 30
    assert sampled.size == (8, 6, 4)
    assert sampled.spacing == (2, 3, 4)
    for start, (patch, label) in zip(sampled.starts, sampled.shown, strict=False):
        ranges = [np.arange(s, s + n) for s, n in zip(start, sampled.size, strict=True)]
        inside = [(r >= 0) & (r < n) for r, n in zip(ranges, sampled.image.shape, strict=True)]
        where = np.ix_(*(r[i] for r, i in zip(ranges, inside, strict=True)))
        assert np.array_equal(patch[np.ix_(*inside)], sampled.image[where])
        assert label is not None
        assert np.array_equal(label[np.ix_(*inside)], sampled.label[where])


def test_the_class_table_counts_what_was_drawn() -> None:
    sampled = sample_volume(dataset(CROPS["ours by label"]), patches=400, progress=False)
    rows = {row.value: row for row in sampled.classes()}
    assert set(rows) == {0, 1, 2, 3}
    assert rows[1].centers == pytest.approx(0.5, abs=0.1)
    assert rows[3].centers == 0
    assert sum(row.centers for row in rows.values()) == pytest.approx(1)
    assert sum(row.volume for row in rows.values()) == pytest.approx(1)
    assert sum(row.patches for row in rows.values()) == pytest.approx(1)
    assert rows[1].patches_with >= rows[1].centers
    assert "of centers" in sampled.as_text()
    assert sampled.short_name == "volume 0"


def test_patches_are_shown_as_they_come_out_of_the_pipeline() -> None:
    pipeline = dataset(CROPS["ours by label"], ScaleIntensityRanged("image", 0, 1e9, 7, 8), kind=CacheDataset)
    sampled = sample_volume(Subset(pipeline, [2]), patches=5, progress=False)
    assert sampled.image.max() > 1000
    assert 7 <= sampled.shown[0][0].min() <= sampled.shown[0][0].max() <= 8


def test_the_same_seed_shows_the_same_patches() -> None:
    first, again, other = (
        sample_volume(dataset(CROPS["ours by label"], RandFlipd(KEYS, 0.5)), seed=seed, progress=False)
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first.starts, again.starts)
    assert not np.array_equal(first.starts, other.starts)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first.shown, again.shown, strict=True))


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (dataset(CROPS["ours by label"]), {"index": 3}, "no volume 3: the dataset has 3"),
        (dataset(RandFlipd(KEYS)), {}, "0 transforms that take several patches"),
        (dataset(CROPS["ours by label"]), {"label_key": "mask"}, "--label_key mask: RandLabelPatchd cuts image, label"),
    ],
)
def test_what_cannot_be_shown_is_an_error_that_says_why(data: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, IndexError), match=message):
        sample_volume(data, progress=False, **arguments)


def test_patches_without_metadata_are_an_error() -> None:
    crop = Stripped("image", (4, 4), 2, random_size=False)
    with pytest.raises(ValueError, match="do not say where they are from"):
        sample_volume(Dataset([{"image": torch.zeros(1, 9, 9)}], crop), progress=False)


class Stripped(RandSpatialCropSamplesd):
    """Gives patches as plain tensors."""

    def __call__(self, data: Any, lazy: bool | None = None) -> Any:
        return [{"image": patch["image"].as_tensor()} for patch in super().__call__(data, lazy)]


@pytest.mark.parametrize("shape", [(24, 22), (24, 22, 20)], ids=["2D", "3D"])
@pytest.mark.parametrize("keys", [["image"], KEYS], ids=["without a label", "with a label"])
def test_a_picture_has_every_view_patch_and_class(shape: tuple[int, ...], keys: list[str]) -> None:
    pytest.importorskip("matplotlib")
    record = {"image": MetaTensor(torch.rand(1, *shape)), "label": MetaTensor(torch.from_numpy(blobs(*shape)))}
    data = Dataset([record], Compose([RandUniformPatchd(keys, 6, num_samples=7)]))
    sampled = sample_volume(data, patches=7, progress=False)
    figure = plot_sampling(sampled)
    figure.canvas.draw()
    views, bars = (3 if len(shape) == 3 else 1), ("label" in keys)
    used = [axes for axes in figure.axes if axes.axison]
    assert len(used) == views + 7 + bars
    dots = [axes.collections[0] for axes in used[:views]] if not bars else []
    assert all(len(dot.get_offsets()) == 7 for dot in dots)
    assert "7 patches of" in figure.get_suptitle()
