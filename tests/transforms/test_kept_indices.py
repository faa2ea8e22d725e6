# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import CastToTyped, Compose, Flipd, Transform

from monai_patchqueue import LoadVolumed, RandLabelPatchd, RandWeightedPatchd
from monai_patchqueue.io.lazy_tensor import LazyTensor
from monai_patchqueue.sampling import LabelIndex, WeightIndex
from monai_patchqueue.transforms import _stored
from monai_patchqueue.transforms._kept import OBJECTS_NBYTES, KeptIndices, kept_indices
from tests.processes import in_child

SHAPE = (20, 18, 16)


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> KeptIndices:
    """Indices that nothing else has kept."""
    indices = KeptIndices()
    monkeypatch.setattr(_stored, "kept_indices", indices)
    return indices


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each index that is made."""
    notes: list[str] = []
    for cls in (LabelIndex, WeightIndex):
        original = cls.__init__

        def noting(self: Any, *args: Any, original: Any = original, name: str = cls.__name__, **kwargs: Any) -> None:
            notes.append(name)
            original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", noting)
    return notes


def save(file: Path, seed: int = 0) -> None:
    """A label with a few voxels of two classes, of which the weight map is the same file."""
    label = np.zeros(SHAPE, np.uint8)
    rng = np.random.default_rng(seed)
    label[tuple(rng.integers(0, n, 40) for n in SHAPE)] = rng.integers(1, 3, 40)
    nib.save(nib.Nifti1Image(label, np.eye(4)), file)


def starts(crop: Any, file: Path, *between: Transform, lazy_read: bool = True, seed: int = 0) -> list[Any]:
    crop.set_random_state(seed)
    item = Compose([LoadVolumed("label", ensure_channel_first=True, lazy_read=lazy_read), *between])(
        {"label": str(file)}
    )
    patches = crop(item)
    return [(patch["label"].meta["patch_location"], patch["label"].sum().item()) for patch in patches]


CROPS = {
    "label": lambda: RandLabelPatchd("label", "label", 4, num_samples=20, label_probabilities="balanced"),
    "by trial": lambda: RandLabelPatchd("label", "label", 4, 2, label_probabilities={0: 1}),
    "weighted": lambda: RandWeightedPatchd("label", "label", 4, num_samples=20),
    "both rules": lambda: RandLabelPatchd("label", "label", 4, 20, foreground_fraction=0.5, ignore_label=2),
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("crop", CROPS)
def test_a_lazily_read_label_is_indexed_once_and_drawn_from_as_ever(
    crop: str, suffix: str, tmp_path: Path, made: list[str]
) -> None:
    file = tmp_path / f"label{suffix}"
    save(file)
    expected = [starts(CROPS[crop](), file, lazy_read=False, seed=seed) for seed in range(3)]
    made.clear()
    assert [starts(CROPS[crop](), file, seed=seed) for seed in range(3)] == expected
    assert len(made) == 1


def test_a_file_that_has_changed_is_indexed_anew(tmp_path: Path, made: list[str]) -> None:
    file = tmp_path / "label.nii"
    save(file)
    first = starts(CROPS["label"](), file)
    time_of_change = file.stat().st_mtime_ns
    save(file, seed=1)
    os.utime(file, ns=(time_of_change + 1, time_of_change + 1))
    second = starts(CROPS["label"](), file)
    assert len(made) == 2
    assert second == starts(CROPS["label"](), file, lazy_read=False)
    assert first != second


def test_what_is_done_to_a_label_before_makes_another_index(tmp_path: Path, made: list[str]) -> None:
    file = tmp_path / "label.nii"
    save(file)
    ways: list[tuple[Transform, ...]] = [(), (Flipd("label", 0),), (CastToTyped("label", torch.int16),)]
    for _ in range(2):
        for between in ways:
            found = starts(CROPS["label"](), file, *between)
            assert found == starts(CROPS["label"](), file, *between, lazy_read=False)
    assert len(made) == 3 + 6


def test_another_dtype_or_scale_makes_another_index(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.int16), np.eye(4))
    image.header.set_slope_inter(0.6, 0)
    nib.save(image, tmp_path / "label.nii")
    found = {}
    for lazy_read in (False, True):
        for dtype in (np.int16, np.float32):
            load = LoadVolumed("label", ensure_channel_first=True, lazy_read=lazy_read, dtype=dtype)
            crop = RandLabelPatchd("label", "label", 4, 20).set_random_state(0)
            patches = crop(load({"label": str(tmp_path / "label.nii")}))
            found[lazy_read, dtype] = [patch["label"].meta["patch_location"] for patch in patches]
    assert found[True, np.int16] == found[False, np.int16]
    assert found[True, np.float32] == found[False, np.float32]
    assert found[True, np.int16] != found[True, np.float32]


def test_labels_in_memory_are_not_taken_for_known_ones(tmp_path: Path, made: list[str]) -> None:
    file = tmp_path / "label.nii"
    save(file)
    for _ in range(2):
        starts(CROPS["label"](), file, lazy_read=False)
    assert len(made) == 2


def test_the_oldest_leave_where_there_are_too_many() -> None:
    label = np.random.default_rng(0).integers(0, 3, (1, *SHAPE)).astype(np.uint8)
    rule = CROPS["label"]().cropper.rules[0]
    box = tuple((0, n) for n in SHAPE)

    def make() -> LabelIndex:
        index = LabelIndex(label, max_runs=10**6)
        index.draw(label, box, rule, 1, np.random.RandomState(0))
        return index

    nbytes = make().nbytes
    assert nbytes > 4000
    kept = KeptIndices(limit=3 * (nbytes + OBJECTS_NBYTES))
    indices = [kept.get(number, make) for number in range(3)]
    assert kept.get(0, make) is indices[0]
    for number in range(3, 6):
        kept.get(number, make)
    assert kept.get(0, make) is indices[0]
    assert kept.get(1, make) is not indices[1]


def test_an_index_counts_with_what_it_holds_once_it_has_been_drawn_from() -> None:
    class Growing:
        nbytes = 0

    kept = KeptIndices(limit=10_000)
    indices = [kept.get(number, Growing) for number in range(4)]
    kept.get(0, Growing).nbytes = 5_000
    kept.get(1, Growing).nbytes = 4_000
    assert kept.get(0, Growing) is indices[0]
    assert kept.get(1, Growing) is indices[1]
    assert kept.get(2, Growing) is not indices[2]
    assert kept.get(3, Growing) is not indices[3]


def test_threads_do_not_share_an_index() -> None:
    def make() -> WeightIndex:
        return WeightIndex(np.ones((2, 2)))

    kept = KeptIndices()
    found = [kept.get("a", make)]
    thread = threading.Thread(target=lambda: found.append(kept.get("a", make)))
    thread.start()
    thread.join()
    assert found[0] is not found[1]


def test_a_known_label_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "label.nii"
    save(file)
    found = [starts(CROPS["label"](), file, Flipd("label", 0))]
    monkeypatch.setattr(LazyTensor, "numbers", None)
    found.append(starts(CROPS["label"](), file, Flipd("label", 0)))
    assert found[0] == found[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_forked_while_a_thread_is_at_the_kept_indices_does_not_wait_for_it() -> None:
    with kept_indices._lock:
        assert in_child(lambda: kept_indices.get("source", lambda: "made")) == "made"
