# SPDX-License-Identifier: Apache-2.0
"""What is gathered for a report: bounded, and right."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import Dataset, MetaTensor
from monai.transforms import (
    Compose,
    Flipd,
    RandAxisFlipd,
    RandCropByLabelClassesd,
    RandCropByPosNegLabeld,
    RandFlipd,
)

from monai_patchqueue import QueueStats, RandLabelPatchd, RandUniformPatchd
from monai_patchqueue.report.asked import asked_shares
from monai_patchqueue.report.history import Histogram, History
from monai_patchqueue.report.patch_map import PatchMap
from monai_patchqueue.report.patch_tally import PatchTally
from monai_patchqueue.report.run_record import RunRecord
from monai_patchqueue.report.traces import boxes
from tests.pipelines import make_loader
from tests.volumes import blobs, meta, numbered


def saved(state: Any) -> Any:
    """What comes out of a checkpoint that is loaded as MONAI's CheckpointLoader does."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_history_keeps_sums_and_extremes_in_bounded_memory() -> None:
    rng = np.random.default_rng(0)
    history = History({"wait": "sum", "longest": "max", "time": "last"}, bins=16)
    waits = rng.exponential(size=1000)
    for step, wait in enumerate(waits):
        history.add(wait=wait, longest=wait, time=step)
        assert len(history) <= 16
        assert history["steps"].sum() == step + 1
    assert history["wait"].sum() == pytest.approx(waits.sum())
    assert history["longest"].max() == waits.max()
    width = int(history["steps"][0])
    assert width == 64
    for place in range(len(history)):
        part = waits[width * place : width * (place + 1)]
        assert history.mean("wait")[place] == pytest.approx(part.mean())
        assert history["longest"][place] == part.max()
        assert history["time"][place] == width * place + len(part) - 1


def test_a_history_goes_on_after_a_checkpoint() -> None:
    whole, begun = (History({"x": "sum"}, bins=4) for _ in range(2))
    for step in range(30):
        whole.add(x=step)
        begun.add(x=step)
        resumed = History({"x": "sum"}, bins=4)
        resumed.load_state_dict(saved(begun.state_dict()))
        begun = resumed
    assert begun["x"].tolist() == whole["x"].tolist()
    assert begun["steps"].tolist() == whole["steps"].tolist()


def test_a_histogram_counts_each_time_between_the_edges_of_its_bin() -> None:
    histogram = Histogram()
    for seconds in (0.0, 1e-9, 1.3e-5, 0.04, 0.05, 99.0, 1e9):
        before = histogram.counts.copy()
        histogram.add(seconds)
        (place,) = np.flatnonzero(histogram.counts - before)
        if 1e-5 <= seconds < 1e3:
            assert histogram.edges[place] <= seconds * (1 + 1e-9)
            assert seconds < histogram.edges[place + 1] * (1 + 1e-9)
    assert histogram.counts.sum() == 7


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64, torch.bfloat16])
def test_classes_at_centers_and_foreground_are_counted(dtype: torch.dtype) -> None:
    label = torch.zeros(4, 1, 9, 8, 7, dtype=dtype)
    label[1, 0, 4, 4, 3] = 2  # the center, start + size // 2
    label[2, 0, 8, 7, 6] = 1  # a corner that a coarse look misses
    label[3, 0, 0, 0, 0] = 1
    tally = PatchTally("label")
    tally.add({"label": label})
    assert dict(tally.centers) == {0: 3, 2: 1}
    assert tally.foreground_share == 0.75
    tally.add({"label": label[:1]})
    assert tally.foreground_share == 0.6
    assert tally.last_foreground_share == 0
    resumed = PatchTally("label")
    resumed.load_state_dict(saved(tally.state_dict()))
    assert resumed.scalars()["centers_0"] == 4


def test_channels_are_classes_and_the_first_is_background() -> None:
    label = torch.zeros(3, 3, 5, 5)
    label[:, 0] = 1
    label[1, :, 2, 2] = torch.tensor([0.0, 0.0, 1.0])
    label[2, 1, 2, 2] = 1  # overlaps
    tally = PatchTally("label")
    tally.add({"label": label})
    assert dict(tally.centers) == {0: 2, 1: 1, 2: 1}
    assert tally.foreground_share == pytest.approx(2 / 3)
    assert tally.last_centers == [0, 2, 0]


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [({"image": torch.zeros(1, 1, 2)}, KeyError, "'seg'.*image"), ({"seg": torch.zeros(4)}, ValueError, r"\(4,\)")],
)
def test_a_batch_without_a_label_is_an_error_that_says_what_there_is(
    batch: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        PatchTally("seg").add(batch)


CROPS = {
    "ours": RandUniformPatchd("image", (8, 6, 4), num_samples=6),
    "ours, by label": RandLabelPatchd(["image", "label"], "label", (8, 6, 4), num_samples=6),
    "MONAI's": RandCropByPosNegLabeld(["image", "label"], "label", (8, 6, 4), num_samples=6),
}


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("crop", CROPS)
def test_patches_are_found_where_they_were_cut(crop: str, flip: float) -> None:
    shape = (20, 18, 16)
    volume = {"image": meta(numbered(*shape)), "label": meta(blobs(*shape))}
    pipeline = Compose([CROPS[crop], RandFlipd("image", prob=flip, spatial_axis=0)])
    with make_loader(Dataset([volume], pipeline), batch_size=6) as loader:
        batch = next(iter(loader))
    found = boxes(batch["image"])
    for image, box in zip(batch["image"].as_tensor(), found, strict=True):
        assert box is not None
        assert box.volume == shape
        assert box.as_it_was == (flip == 0)
        first = int(image.flip(1)[0, 0, 0, 0] if flip else image[0, 0, 0, 0])
        assert first == 1 + int(np.ravel_multi_index(box.start, shape))


FLIPS = {
    "none": RandFlipd(["label"], prob=0.0),
    "one axis": RandFlipd(["label"], prob=1.0, spatial_axis=1),
    "all axes": RandFlipd(["label"], prob=1.0),
    "any axis": RandAxisFlipd(["label"], prob=1.0),
    "certainly": Flipd(["label"], spatial_axis=(0, 2)),
}


@pytest.mark.parametrize("flip", FLIPS)
def test_flips_do_not_change_the_class_at_the_center(flip: str) -> None:
    label = np.random.default_rng(0).integers(0, 50, (1, 12, 12, 12)).astype(np.uint8)
    crop = RandLabelPatchd("label", "label", 4, num_samples=16, label_probabilities={7: 1, 9: 1})
    with make_loader(Dataset([{"label": meta(label)}], Compose([crop, FLIPS[flip]])), batch_size=16) as loader:
        tally = PatchTally("label")
        tally.add(next(iter(loader)))
    assert set(tally.centers) == {7, 9}


def test_patches_without_traces_are_nowhere() -> None:
    assert boxes(torch.zeros(3, 1, 4, 4)) == [None] * 3
    assert boxes(MetaTensor(torch.zeros(2, 1, 4, 4), applied_operations=[[], []])) == [None] * 2


def test_the_mean_volume_is_put_together_from_patches() -> None:
    shape = (24, 20, 16)
    ramp = np.broadcast_to(np.arange(24, dtype=np.float32)[:, None, None], shape)[None].copy()
    places = PatchMap(size=8, most=50)
    pipeline = RandUniformPatchd("image", (12, 10, 8), num_samples=8)
    with make_loader(Dataset([{"image": meta(ramp)}] * 30, pipeline), batch_size=1) as loader:
        for batch in loader:
            places.add(batch["image"], [3])
    assert places.seen == 240
    assert len(places.centers) == 50
    centers = np.array([center for center, _ in places.centers])
    assert centers.min() > 0.2
    assert centers.max() < 0.8  # an "inside" patch of half the volume's size has its center in the middle half
    along_z = places.projection(2)
    assert along_z is not None
    assert along_z.shape == (8, 8)
    expected = (np.arange(8) + 0.5) * 3
    np.testing.assert_allclose(np.nanmean(along_z, axis=1), np.floor(expected), atol=1e-4)
    resumed = PatchMap(size=8, most=50)
    resumed.load_state_dict(saved(places.state_dict()))
    assert resumed.centers == places.centers
    np.testing.assert_array_equal(resumed.projection(1), places.projection(1))


VOXELS = {0: 0.8, 1: 0.15, 2: 0.05}


@pytest.mark.parametrize(
    ("crop", "expected"),
    [
        (RandLabelPatchd("a", "a", 4, label_probabilities={"0": 1, "2": 3}), {0: 0.25, 2: 0.75}),
        (RandLabelPatchd("a", "a", 4, label_probabilities=[1, 0, 1]), {0: 0.5, 2: 0.5}),
        (RandLabelPatchd("a", "a", 4, label_probabilities="balanced"), {1: 0.5, 2: 0.5}),
        (RandLabelPatchd("a", "a", 4), {1: 0.75, 2: 0.25}),
        (RandLabelPatchd("a", "a", 4, foreground_fraction=0.5), {0: 0.4, 1: 0.45, 2: 0.15}),
        (RandCropByLabelClassesd("a", "a", 4, ratios=[1, 1, 2], num_classes=3), {0: 0.25, 1: 0.25, 2: 0.5}),
        (RandCropByLabelClassesd("a", "a", 4, num_classes=3), {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}),
        (RandCropByPosNegLabeld("a", "a", 4, pos=1, neg=3), {0: 0.75, 1: 0.1875, 2: 0.0625}),
        (RandUniformPatchd("a", 4), None),
    ],
)
def test_what_was_asked_for_is_read_off_the_transform(crop: Any, expected: dict[int, float] | None) -> None:
    asked = asked_shares(Dataset(Dataset([1]), Compose([Compose([crop])])), VOXELS)
    assert (asked[0] if asked else None) == (pytest.approx(expected) if expected else None)


def test_a_record_goes_on_after_a_checkpoint_and_keeps_the_worst_stalls() -> None:
    record = RunRecord("image", "label", effort=1)
    record.begin(QueueStats())
    waits = [0.01 * (step % 37) for step in range(300)]
    for step, wait in enumerate(waits):
        record.look_at({"image": torch.zeros(2, 1, 4, 4), "label": torch.full((2, 1, 4, 4), step % 3)})
        record.step(QueueStats(patches=2 * step, fill=0.5, last_wait_seconds=wait), {"memory_bytes": 100.0})
        if step == 150:
            resumed = RunRecord("image", "label", effort=1)
            resumed.load_state_dict(saved(record.state_dict()))
            assert resumed.elapsed <= record.elapsed
            record = resumed
            record.begin(QueueStats(patches=2 * step))
    assert record.steps == 300
    assert sorted((stall.seconds for stall in record.stalls), reverse=True) == sorted(waits, reverse=True)[:12]
    assert record.waits.counts.sum() == 300
    assert record.tally is not None
    assert dict(record.tally.centers) == {0: 200, 1: 200, 2: 200}
    assert {label: share / sum(record.voxels.values()) for label, share in record.voxels.items()} == pytest.approx(
        dict.fromkeys(range(3), 1 / 3)
    )
    assert np.diff(record.history["time"]).min() >= 0
