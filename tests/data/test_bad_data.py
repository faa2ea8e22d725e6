# SPDX-License-Identifier: Apache-2.0
"""Bad files among good ones: an error that says which file and what to do, or, if wished, another volume instead."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.data import Dataset
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from monai_patchqueue import PatchQueueLoader, RandLabelPatchd, RandUniformPatchd, RandWeightedPatchd
from tests.pipelines import digest, make_loader
from tests.volumes import blobs

pytestmark = pytest.mark.timeout(60)

KEYS = ("image", "label", "weight")
VOLUMES, SAMPLES = 6, 3


def save(volume: np.ndarray[Any, Any], path: str | Path) -> None:
    nib.save(nib.Nifti1Image(volume, np.eye(4)), path)


@pytest.fixture
def records(tmp_path: Path) -> list[dict[str, str]]:
    """Six good cases of image, label and weight map."""
    records = []
    for case in range(VOLUMES):
        record = {key: str(tmp_path / f"{key}_{case}.nii.gz") for key in KEYS}
        image = np.random.default_rng(case).integers(0, 1000, (24, 24, 24)).astype(np.int16)
        save(image, record["image"])
        save(blobs(24, 24, 24, seed=case)[0], record["label"])
        save((image % 7).astype(np.float32), record["weight"])
        records.append({**record, "case": f"{case}"})
    return records


class OnePatchLess(RandUniformPatchd):
    """Gives a patch less of two cases."""

    def __call__(self, data: Any, *arguments: Any, **options: Any) -> Any:
        patches = super().__call__(data, *arguments, **options)
        return patches[1:] if data["case"] in ("2", "4") else patches


def make(records: list[dict[str, str]], crop: str, num_workers: int, **arguments: Any) -> PatchQueueLoader:
    size = {"spatial_size": (16, 16, 16), "num_samples": SAMPLES}
    crops: dict[str, Any] = {
        "uniform": RandUniformPatchd(KEYS, **size),
        "columns": RandUniformPatchd(KEYS, (16, 16, -1), SAMPLES),
        "label": RandLabelPatchd(KEYS, "label", **size),
        "weight": RandWeightedPatchd(KEYS, "weight", **size),
        "one patch less": OnePatchLess(KEYS, **size),
    }
    load = [LoadImaged(KEYS, dtype=None), EnsureChannelFirstd(KEYS)]
    arguments = {"batch_size": 4, "samples_per_volume": SAMPLES, **arguments}
    if "ram_budget" not in arguments:
        arguments["queue_length"] = 8
    return make_loader(Dataset(records, Compose([*load, crops[crop]])), num_workers, **arguments)


def truncate(record: dict[str, str]) -> None:
    file = Path(record["image"])
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def truncate_label(record: dict[str, str]) -> None:
    truncate({"image": record["label"]})


def empty(record: dict[str, str]) -> None:
    Path(record["image"]).write_bytes(b"")


def remove(record: dict[str, str]) -> None:
    Path(record["image"]).unlink()


def no_nifti(record: dict[str, str]) -> None:
    Path(record["image"]).write_text("<html>404: not found</html>")


def other_label(record: dict[str, str]) -> None:
    save(blobs(24, 24, 20)[0], record["label"])


def nan(record: dict[str, str]) -> None:
    weight = np.ones((24, 24, 24), np.float32)
    weight[12, 12, 12] = np.nan
    save(weight, record["weight"])


def small(record: dict[str, str]) -> None:
    for key in KEYS:
        save(np.ones((24, 10, 24), np.int16), record[key])


def longer(record: dict[str, str]) -> None:
    for key in KEYS:
        save(np.ones((24, 24, 30), np.int16), record[key])


def other_dtype(record: dict[str, str]) -> None:
    save(np.ones((24, 24, 24), np.float64), record["image"])


def no_foreground(record: dict[str, str]) -> None:
    save(np.zeros((24, 24, 24), np.uint8), record["label"])


def nothing(record: dict[str, str]) -> None:
    """The files are good."""


# What is wrong, with which transform, and what the error says besides the case's image.
FAULTS: dict[str, tuple[Callable[[dict[str, str]], None], str, list[str]]] = {
    "truncated": (truncate, "uniform", ["end", "LoadImage"]),
    "truncated label": (truncate_label, "uniform", ["label_{case}.nii.gz", "end"]),
    "empty": (empty, "uniform", ["LoadImage"]),
    "missing": (remove, "uniform", ["FileNotFoundError|No such file|does not exist"]),
    "no NIfTI": (no_nifti, "uniform", ["LoadImage"]),
    "label of another shape": (other_label, "label", ["label", r"24, 24, 24", r"24, 24, 20"]),
    "NaN weight": (nan, "weight", ["weight", "NaN"]),
    "smaller than the patch": (small, "uniform", [r"24, 10, 24", r"16, 16, 16", "padding_mode"]),
    "another shape than the first": (longer, "columns", [r"\[1, 16, 16, 24\]", r"\[1, 16, 16, 30\]", "SpatialPadd"]),
    "another dtype than the first": (other_dtype, "uniform", ["int16", "float64", "CastToTyped"]),
    "empty mask": (no_foreground, "label", ["label", "uniform"]),
    "another number of patches": (nothing, "one patch less", ["gave 2 patches, but 3", "samples_per_volume"]),
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", FAULTS)
def test_the_error_names_the_file_and_says_what_to_do(
    kind: str, num_workers: int, records: list[dict[str, str]]
) -> None:
    fault, crop, hints = FAULTS[kind]
    for case in (2, 4):
        fault(records[case])
    with make(records, crop, num_workers) as loader:
        with pytest.raises(Exception, match=r"^volume 2 \(.*image_2.nii.gz, .*\) could not be prepared") as caught:
            list(loader)
        said = str(caught.value).split("The worker's traceback")[0]
        for hint in hints:
            assert re.search(hint.format(case=2) if "{case}" in hint else hint, said), said


@pytest.mark.parametrize("kind", FAULTS)
def test_replaced_volumes_change_no_length_and_are_counted_and_logged(
    kind: str, records: list[dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    fault, crop, _ = FAULTS[kind]
    for case in (2, 4):
        fault(records[case])
    digests, failures = [], []
    for num_workers in (0, 2):
        caplog.clear()
        arguments: dict[str, Any] = {"on_error": "replace", "persistent_workers": False}
        with caplog.at_level(logging.WARNING), make(records, crop, num_workers, **arguments) as loader:
            epochs = [list(loader) for _ in range(2)]
            stats = loader.stats()
        for batches in epochs:
            assert len(batches) == len(loader) == 5
            assert [len(batch["case"]) for batch in batches] == [4, 4, 4, 4, 2]
            cases = Counter(case for batch in batches for case in batch["case"])
            assert set(cases) == {"0", "1", "3", "5"}
            assert all(count % SAMPLES == 0 for count in cases.values())
        for case in (2, 4):
            logged = [r.getMessage() for r in caplog.records if r.getMessage().startswith(f"volume {case} ")]
            assert len(logged) == stats.failure_counts[case] >= 2  # in each epoch, and perhaps in place of the other
            assert all(f"image_{case}.nii.gz" in message for message in logged)
            assert all("failed and is replaced by volume" in message for message in logged)
        assert stats.failures == stats.failure_counts[2] + stats.failure_counts[4]
        failures.append(stats.failure_counts)
        digests.append(digest(batch for batches in epochs for batch in batches))
    assert failures[0] == failures[1]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_where_every_volume_fails_there_is_an_error_after_all(num_workers: int, records: list[dict[str, str]]) -> None:
    for record in records:
        truncate(record)
    with (
        make(records, "uniform", num_workers, on_error="replace") as loader,
        pytest.raises(
            Exception, match=r"could not be prepared(.|\n)*No volume is left to replace it: all have failed"
        ) as e,
    ):
        list(loader)
    assert re.search(r"image_\d.nii.gz", str(e.value))


def test_a_bad_first_volume_is_named_where_it_is_needed_to_know_the_memory(records: list[dict[str, str]]) -> None:
    truncate(records[0])
    for use in (
        lambda: make(records, "uniform", 0).memory_bytes(),
        lambda: make(records, "uniform", 0, ram_budget=0.1),
    ):
        with pytest.raises(Exception, match=r"volume 0 \(.*image_0.nii.gz, label_0"):
            use()


@pytest.mark.parametrize("odd", [1, 2, 3, 4, 5])
def test_who_decides_how_patches_look_does_not_depend_on_time(odd: int, records: list[dict[str, str]]) -> None:
    truncate(records[0])  # the first: another one takes its place, perhaps the one that is unlike all others
    other_dtype(records[odd])
    results = []
    for arguments in ({"num_workers": 0}, {"num_workers": 2}, {"num_workers": 2, "ram_budget": "1MiB"}):
        with make(records, "uniform", **arguments, on_error="replace", persistent_workers=False) as loader:
            batches = list(loader)
            results.append(sorted({(case, str(batch["image"].dtype)) for batch in batches for case in batch["case"]}))
    assert results[0] == results[1] == results[2]


def test_files_mended_between_epochs_are_used_again(records: list[dict[str, str]], tmp_path: Path) -> None:
    file = Path(records[2]["image"])
    content = file.read_bytes()
    truncate(records[2])
    with make(records, "uniform", 2, on_error="replace", persistent_workers=False) as loader:
        assert "2" not in {case for batch in loader for case in batch["case"]}
        file.write_bytes(content)
        assert Counter(case for batch in loader for case in batch["case"]) == dict.fromkeys("012345", SAMPLES)
