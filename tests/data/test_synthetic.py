# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_patchqueue.data import synthetic
from monai_patchqueue.data.synthetic import SYNTHETIC_LABELS, make_synthetic_dataset, synthetic_volume

SMALL = {"num_volumes": 2, "shape": (32, 36, 40), "progress": False}
DEFAULT_SHAPE = (80, 72, 64)


def best_threshold_dice(image: np.ndarray, mask: np.ndarray) -> float:
    """The highest Dice of `image > t` and of `image <= t` over every t that makes a difference."""
    values, inverse = np.unique(image.ravel(), return_inverse=True)
    voxels = np.cumsum(np.bincount(inverse, minlength=len(values)))
    hits = np.cumsum(np.bincount(inverse, weights=mask.ravel(), minlength=len(values)))
    below = 2 * hits / (voxels + mask.sum())
    above = 2 * (mask.sum() - hits) / (mask.size - voxels + mask.sum())
    return float(max(below.max(), above.max(), 2 * mask.sum() / (mask.size + mask.sum())))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_threshold_search_finds_a_class_that_a_threshold_can_find() -> None:
    image = np.arange(1000).reshape(10, 10, 10)
    assert best_threshold_dice(image, image >= 700) == 1
    assert best_threshold_dice(image, image < 300) == 1
    assert best_threshold_dice(image, image % 2 == 0) < 0.7


@pytest.mark.parametrize("index", range(10))
def test_no_threshold_finds_a_class_in_a_volume(index: int) -> None:
    image, label, _, _ = synthetic_volume(DEFAULT_SHAPE, index=index)
    for value in (1, 2, 3):
        assert best_threshold_dice(image, label == value) < 0.5


def test_no_threshold_finds_a_class_in_the_whole_data_set() -> None:
    volumes = [synthetic_volume(DEFAULT_SHAPE, index=index)[:2] for index in range(10)]
    images, labels = (np.stack(arrays) for arrays in zip(*volumes, strict=True))
    for value in (1, 2, 3):
        assert best_threshold_dice(images, labels == value) < 0.5


@pytest.mark.parametrize("seed", range(3))
def test_every_class_is_there_and_the_lesions_are_rare(seed: int) -> None:
    for index in range(4):
        _, label, _, _ = synthetic_volume(DEFAULT_SHAPE, seed, index)
        share = np.bincount(label.ravel(), minlength=4) / label.size
        assert min(share[1:3]) > 0.03
        assert 0 < share[3] < 0.001


def test_the_layout_is_the_decathlons(tmp_path: Path) -> None:
    folder = Path(make_synthetic_dataset(tmp_path / "data", **SMALL))
    description = json.loads((folder / "dataset.json").read_text())
    assert {int(value): name for value, name in description["labels"].items()} == SYNTHETIC_LABELS
    assert description["numTraining"] == len(description["training"]) == 2
    for item in description["training"]:
        image, label, weight = (nib.load(folder / item[key]) for key in ("image", "label", "weight"))
        assert image.get_data_dtype() == np.int16
        assert label.get_data_dtype() == weight.get_data_dtype() == np.uint8
        assert image.shape == label.shape == weight.shape == SMALL["shape"]
        np.testing.assert_array_equal(image.affine, label.affine)
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_the_affine_has_spacing_flips_and_a_rotation(tmp_path: Path) -> None:
    folder = Path(make_synthetic_dataset(tmp_path / "data", **SMALL))
    image = nib.load(folder / "imagesTr" / "volume_000.nii.gz")
    np.testing.assert_allclose(image.header.get_zooms(), (1.5, 1.2, 2.0), rtol=1e-5)
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    assert np.count_nonzero(np.round(image.affine[:3, :3], 6)) > 3


def test_the_same_seed_gives_the_same_bytes_and_another_seed_gives_others(tmp_path: Path) -> None:
    first, again, other = (
        files(Path(make_synthetic_dataset(tmp_path / name, seed=seed, **SMALL)))
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_volumes_differ_from_each_other() -> None:
    assert not np.array_equal(synthetic_volume((32, 32, 32), index=0)[0], synthetic_volume((32, 32, 32), index=1)[0])


def test_a_complete_data_set_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_synthetic_dataset(tmp_path / "data", **SMALL)
    monkeypatch.setattr(synthetic, "_write", lambda *_: pytest.fail("written again"))
    assert make_synthetic_dataset(tmp_path / "data", **SMALL) == folder


def test_without_a_folder_each_recipe_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic.tempfile, "gettempdir", lambda: str(tmp_path))
    first = make_synthetic_dataset(**SMALL)
    assert first == make_synthetic_dataset(**SMALL)
    assert first != make_synthetic_dataset(seed=1, **SMALL)
    assert Path(first).is_relative_to(tmp_path)


def test_a_data_set_that_lost_a_file_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = Path(make_synthetic_dataset(**SMALL))
    before = files(folder)
    (folder / "labelsTr" / "volume_001.nii.gz").unlink()
    assert make_synthetic_dataset(**SMALL) == str(folder)
    assert files(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(synthetic, "synthetic_volume", fail)
    with pytest.raises(OSError, match="disk full"):
        make_synthetic_dataset(tmp_path / "data", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_get_the_same_complete_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_have_written = threading.Barrier(2)
    write = synthetic._write

    def write_and_wait(*args: object) -> None:
        write(*args)  # type: ignore[arg-type]
        both_have_written.wait(60)

    monkeypatch.setattr(synthetic, "_write", write_and_wait)
    folders: list[str] = []
    makers = [
        threading.Thread(target=lambda: folders.append(make_synthetic_dataset(tmp_path / "data", **SMALL)))
        for _ in range(2)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert folders == [str(tmp_path / "data")] * 2
    assert len(files(tmp_path / "data")) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(FileExistsError, match="something else"):
        make_synthetic_dataset(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    assert len(files(Path(make_synthetic_dataset(folder, **SMALL)))) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"shape": (32, 32)}, "shape"), ({"shape": (32, 32, 16)}, "at least 32"), ({"num_volumes": 0}, "num_volumes")],
)
def test_what_makes_no_data_set_is_refused(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_synthetic_dataset(tmp_path / "data", **arguments)  # type: ignore[arg-type]
