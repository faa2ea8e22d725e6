# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import CacheDataset, DataLoader, Dataset, DistributedSampler
from monai.transforms import Compose, CropForegroundd, EnsureTyped, LoadImaged, RandFlipd, RandGaussianNoised, Spacingd
from torch.utils.data import ConcatDataset, Subset
from torch.utils.data.distributed import DistributedSampler as TorchDistributedSampler

from monai_patchqueue import GridPatchLoader, GridPatchSamplesd, PatchAggregator, RandUniformPatchd
from tests.nifti_files import write_nifti
from tests.pipelines import append_line, digest, lines
from tests.volumes import meta, numbered

SHAPES = ((20, 16, 16), (8, 9, 10), (17, 30, 8), (16, 16, 16), (9, 8, 33))
GRID = GridPatchSamplesd("image", 8, overlap=2)


def items() -> list[dict[str, Any]]:
    return [{"image": meta(numbered(*shape), f"case_{i}.nii.gz"), "id": f"case {i}"} for i, shape in enumerate(SHAPES)]


def places(loader: GridPatchLoader) -> list[tuple[int, int]]:
    """Volume and patch of each patch, in the order in which they come."""
    with loader:
        batches = [batch["grid_patch"] for batch in loader]
    return [pair for batch in batches for pair in zip(batch["volume"].tolist(), batch["patch"].tolist(), strict=True)]


def every_place(*volumes: int) -> list[tuple[int, int]]:
    return [(volume, patch) for volume in volumes for patch in range(GRID.count(SHAPES[volume]))]


class Logged(Dataset):
    """Adds a line to a file for each volume that it loads."""

    def __init__(self, data: list[Any], log: Path) -> None:
        super().__init__(data)
        self.log = log

    def __getitem__(self, index: int) -> Any:
        append_line(self.log, index)
        return super().__getitem__(index)


def test_every_patch_comes_once_in_order_and_batches_span_volumes() -> None:
    loader = GridPatchLoader(Dataset(items()), GRID, batch_size=7)
    assert isinstance(loader, torch.utils.data.DataLoader)
    batches = list(loader)
    assert places(loader) == every_place(*range(5))
    assert len(batches) == len(loader) == -(-len(every_place(*range(5))) // 7)
    assert any(len(batch["grid_patch"]["volume"].unique()) > 1 for batch in batches)
    for batch in batches:
        for image, volume, patch in zip(
            batch["image"], *(batch["grid_patch"][k] for k in ("volume", "patch")), strict=True
        ):
            start = GRID.grid(SHAPES[volume]).start(int(patch))
            assert image.meta["patch_index"] == patch
            box = (slice(None), *(slice(a, a + 8) for a in start))
            assert np.array_equal(image.numpy(), numbered(*SHAPES[volume])[box])


@pytest.mark.parametrize("pieces", [None, 3])
def test_batches_are_the_same_whoever_prepares_them(pieces: int | None) -> None:
    digests = set()
    for num_workers, worker_type in ((0, "process"), (2, "thread"), (2, "process")):
        arguments = {"batch_size": 6, "worker_type": worker_type, "patches_at_once": pieces}
        with GridPatchLoader(Dataset(items()), GRID, num_workers, **arguments) as loader:
            digests |= {digest(loader), digest(loader)}
    assert len(digests) == 1


def test_in_pieces_a_volume_is_loaded_once_and_memory_does_not_grow_with_it(tmp_path: Path) -> None:
    item = {"image": numbered(64, 32, 32).astype(np.float32)}
    grid = GridPatchSamplesd("image", 16, overlap=8)
    whole = GridPatchLoader(Dataset([item]), grid, batch_size=2, samples_per_volume=grid.count((64, 32, 32)))
    log = tmp_path / "log"
    dataset = Logged([item, item], log)
    pieces = GridPatchLoader(dataset, grid, batch_size=2, samples_per_volume=63, patches_at_once=4)
    assert digest(pieces) == digest(GridPatchLoader(Dataset([item, item]), grid, batch_size=2))
    assert lines(log) == ["0", "1"]
    assert pieces.memory_bytes() < whole.memory_bytes() / 4


def test_random_transforms_do_not_go_with_pieces() -> None:
    dataset = Dataset(items(), Compose([EnsureTyped("image"), RandGaussianNoised("image")]))
    with pytest.raises(ValueError, match=r"patches_at_once: .* RandGaussianNoised would give another volume"):
        GridPatchLoader(dataset, GRID, patches_at_once=2)
    GridPatchLoader(dataset, GRID)


def test_numbers_of_patches_are_told_without_loading(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = Logged(items(), tmp_path / "log")
    dataset.transform = Compose([RandFlipd("image", 0.5), Spacingd("image", (1, 1, 3))])
    nested = ConcatDataset([Subset(dataset, [4, 1]), Subset(dataset, [0])])
    loader = GridPatchLoader(nested, GRID, batch_size=100)
    assert not lines(tmp_path / "log")
    assert not caplog.records
    patches = [(batch["grid_patch"]["shape"].tolist(), batch["image"].meta["filename_or_obj"]) for batch in loader]
    shapes = {tuple(shape) for part, _ in patches for shape in part}
    assert shapes == {(17, 22, 44), (15, 25, 13), (39, 46, 21)}
    assert len(places(loader)) == sum(GRID.count(shape) for shape in shapes)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_volumes_whose_shape_is_not_known_before_are_loaded_to_count_their_patches(
    num_workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = [{"image": np.pad(np.ones((1, *shape), np.float32), [(0, 0), *[(5, 3)] * 3])} for shape in SHAPES[:3]]
    dataset = Logged(data, tmp_path / "log")
    dataset.transform = CropForegroundd("image", "image", allow_smaller=True)
    loader = GridPatchLoader(dataset, GRID, num_workers, batch_size=5)
    assert lines(tmp_path / "log") == ["0", "1", "2"]
    assert "3 of 3 volumes are prepared once to count" in caplog.text
    assert "the shape after CropForegroundd cannot be told" in caplog.text
    assert places(loader) == every_place(0, 1, 2)


def test_files_that_are_stacked_as_channels_are_counted_by_the_first_ones_header(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [
        write_nifti(tmp_path / f"{name}.nii.gz", numbered(20, 16, 12)[0].astype(np.int16)) for name in ("t1", "t2")
    ]
    dataset = Dataset(
        [{"image": files}], Compose([LoadImaged("image", ensure_channel_first=True), Spacingd("image", 2)])
    )
    loader = GridPatchLoader(dataset, GRID, batch_size=100)
    assert not caplog.records
    (batch,) = loader
    assert batch["image"].shape == (len(places(loader)), 2, 8, 8, 8)


def test_a_volume_that_cannot_be_loaded_to_count_its_patches_is_named() -> None:
    dataset = Dataset([{"image": "missing.nii.gz"}], Compose([LoadImaged("image", ensure_channel_first=True)]))
    with pytest.raises(Exception, match=r"volume 0 \(missing.nii.gz\) could not be prepared \(to count its patches\)"):
        GridPatchLoader(dataset, GRID)


def test_announced_numbers_are_taken_and_wrong_ones_are_an_error(caplog: pytest.LogCaptureFixture) -> None:
    dataset = Dataset(items(), CropForegroundd("image", "image", allow_smaller=True))
    loader = GridPatchLoader(dataset, GRID, samples_per_volume=lambda item: GRID.count(item["image"].shape[1:]))
    assert not caplog.records
    assert places(loader) == every_place(*range(5))
    wrong = GridPatchLoader(dataset, GRID, samples_per_volume=3)
    with pytest.raises(ValueError, match=r"(?s)volume 0.*its grid has \d+ patches .* but 3 were announced"):
        places(wrong)


def test_ranks_share_the_volumes_and_each_volume_belongs_to_one() -> None:
    dataset = Dataset(items())
    shares = []
    for rank in range(2):
        sampler = DistributedSampler(dataset, even_divisible=False, shuffle=False, num_replicas=2, rank=rank)
        loader = GridPatchLoader(dataset, GRID, batch_size=4, sampler=sampler)
        assert places(loader) == every_place(*loader.volumes)
        shares.append(loader.volumes)
    assert shares == [(0, 2, 4), (1, 3)]
    padded = TorchDistributedSampler(dataset, num_replicas=2, rank=0, shuffle=False)
    with pytest.raises(ValueError, match=r"gives 6 volumes to 2 ranks, but there are 5.*even_divisible=False"):
        GridPatchLoader(dataset, GRID, sampler=padded)


def test_volumes_keep_their_numbers_and_names_under_a_sampler() -> None:
    dataset = Dataset([*items()[:3], {"image": "no_such_file.nii.gz"}])
    loader = GridPatchLoader(dataset, GRID, sampler=[2, 0], batch_size=4)
    assert places(loader) == every_place(2, 0)
    failing = GridPatchLoader(dataset, GRID, sampler=[3], samples_per_volume=1)
    with pytest.raises(Exception, match=r"volume 3 \(no_such_file.nii.gz\)"):
        places(failing)


def test_label_and_image_come_from_the_same_place_and_other_keys_come_along() -> None:
    data = [{**item, "label": item["image"] + 1} for item in items()]
    grid = GridPatchSamplesd(["image", "label"], 8, padding_mode="constant")
    for batch in GridPatchLoader(Dataset(data), grid, batch_size=4):
        assert torch.equal(batch["image"] + 1, batch["label"])
        assert batch["id"] == [f"case {volume}" for volume in batch["grid_patch"]["volume"].tolist()]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shuffle": True}, ValueError, "a grid's patches come in order"),
        ({"sampler": [0, 1, 0]}, ValueError, "gives volume 0 twice"),
        ({"sampler": [7]}, ValueError, "gives volume 7; expected 0 to 4"),
        ({"sampler": []}, ValueError, "gives no volume"),
        ({"grid": RandUniformPatchd("image", 8)}, TypeError, "grid is a RandUniformPatchd"),
        ({"patches_at_once": 0}, ValueError, "patches_at_once=0: expected 1 or more"),
        ({"grid": GridPatchSamplesd("image", 12)}, ValueError, "smaller than the patch"),
        ({"dataset": Dataset(items(), RandUniformPatchd("image", 8))}, TypeError, "the dataset gives a list"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        places(GridPatchLoader(**{"dataset": Dataset(items()), "grid": GRID, **arguments}))


def test_it_can_be_made_anew_from_its_attributes() -> None:
    loader = GridPatchLoader(CacheDataset(items(), progress=False), GRID, batch_size=3, patches_at_once=5)
    names = set(inspect.signature(GridPatchLoader.__init__).parameters) - {"self"}
    again = GridPatchLoader(**{name: getattr(loader, name) for name in names})
    assert places(again) == places(loader)
    assert (again.patches_at_once, again.queue_length, again.volumes) == (5, None, loader.volumes)


def test_a_config_that_is_written_for_monais_loader_needs_a_grid_and_no_more() -> None:
    config = {
        "dataset": {"_target_": "Dataset", "data": items()},
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "aggregator": {"_target_": "PatchAggregator", "mode": "gaussian", "argmax": True},
    }
    parser = ConfigParser(config)
    parser["dataloader::_target_"] = "GridPatchLoader"
    parser["dataloader::grid"] = {"_target_": "GridPatchSamplesd", "keys": "image", "spatial_size": 8, "overlap": 2}
    assert places(parser.get_parsed_content("dataloader")) == every_place(*range(5))
    assert isinstance(parser.get_parsed_content("aggregator"), PatchAggregator)
    assert not issubclass(DataLoader, GridPatchLoader)
