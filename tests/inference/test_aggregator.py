# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import Dataset, MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import LoadImage, SaveImage
from scipy.signal.windows import hann

from monai_patchqueue import GridPatchLoader, GridPatchSamplesd, LazyMetaTensor, LoadVolume, PatchAggregator
from monai_patchqueue.inference.rows import BlendedRows
from monai_patchqueue.sampling import PatchGrid
from tests.volumes import meta, numbered


def volumes(*shapes: Sequence[int], channels: int = 1, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"image": rng.random((channels, *shape), dtype=np.float32)} for shape in shapes]


def aggregated(loader: GridPatchLoader, aggregator: PatchAggregator, network: Any = lambda image: image) -> list[Any]:
    """All the loader's volumes, after a network."""
    with loader:
        whole = [volume for batch in loader for volume in aggregator.add(network(batch["image"]), batch)]
    aggregator.finish()
    return whole


def oblique() -> torch.Tensor:
    """An affine that is turned about the last axis."""
    turn = np.deg2rad(20)
    rows = [[np.cos(turn), -np.sin(turn), 0, 3], [np.sin(turn), np.cos(turn), 0, 4], [0, 0, 2, 5], [0, 0, 0, 1]]
    return torch.tensor(rows, dtype=torch.float64)


axes = st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(0, 8))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(axes, min_size=1, max_size=3),
    st.integers(-3, 5),
    st.booleans(),
    st.sampled_from(["constant", "average", "gaussian", "hann", "crop"]),
    st.sampled_from([None, 1, 3]),
)
def test_an_identity_network_gives_identical_volumes_for_any_shape_and_overlap(
    axes: list[tuple[int, int, int]], longer: int, pad_overlap: bool, mode: str, patches_at_once: int | None
) -> None:
    shape, size, overlap = (list(numbers) for numbers in zip(*axes, strict=True))
    overlap = [min(o, s - 1) for o, s in zip(overlap, size, strict=True)]
    items = volumes(shape, [max(1, n + longer) for n in shape])
    grid = GridPatchSamplesd("image", size, overlap, pad_overlap, padding_mode="edge")
    loader = GridPatchLoader(Dataset(items), grid, batch_size=3, patches_at_once=patches_at_once)
    whole = aggregated(loader, PatchAggregator(mode))
    assert len(whole) == 2
    for volume, item in zip(whole, items, strict=True):
        if mode == "crop":
            assert np.array_equal(volume.numpy(), item["image"])
        np.testing.assert_allclose(volume.numpy(), item["image"], rtol=1e-5)


@pytest.mark.parametrize(
    ("mode", "overlap", "shape"), [*product(["constant", "gaussian"], [0.25, 0.5], [(37, 30, 21), (16, 12, 40)])]
)
def test_a_network_gives_what_it_gives_with_monais_sliding_window(
    mode: str, overlap: float, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 3, 3, padding=1)
    (item,) = volumes(shape)
    inferer = SlidingWindowInferer((16, 12, 8), sw_batch_size=4, overlap=overlap, mode=mode)
    with torch.no_grad():
        expected = inferer(torch.from_numpy(item["image"])[None], network)[0]
        loader = GridPatchLoader(Dataset([item]), GridPatchSamplesd("image", (16, 12, 8), overlap), batch_size=5)
        (volume,) = aggregated(loader, PatchAggregator(mode), network)
    assert volume.shape == (3, *shape)
    torch.testing.assert_close(volume.as_tensor(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["constant", "gaussian", "hann"])
def test_outputs_are_averaged_with_the_modes_weights(mode: str) -> None:
    (item,) = volumes((10,))
    size, starts = 6, (0, 4)
    window = {
        "constant": np.ones(size),
        "hann": hann(size + 2)[1:-1],
        "gaussian": np.exp(-(((np.arange(size) - 2.5) / (0.25 * size)) ** 2) / 2),
    }[mode]
    total, weight = np.zeros(10), np.zeros(10)
    for number, start in enumerate(starts):
        total[start : start + size] += window * (number + 1)
        weight[start : start + size] += window
    loader = GridPatchLoader(Dataset([item]), GridPatchSamplesd("image", size, overlap=2))
    numbers = iter((1.0, 2.0))
    (volume,) = aggregated(loader, PatchAggregator(mode, sigma_scale=0.25), lambda x: torch.full_like(x, next(numbers)))
    np.testing.assert_allclose(volume.numpy()[0], total / weight, rtol=1e-5)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.permutations(range(9)), st.sampled_from(["gaussian", "crop"]))
def test_patches_may_come_in_any_order(order: list[int], mode: str) -> None:
    (item,) = volumes((11, 7))
    grid = GridPatchSamplesd("image", (5, 4), overlap=2)
    (batch,) = GridPatchLoader(Dataset([item]), grid, batch_size=9)
    batch = {"image": batch["image"][order], "grid_patch": {k: v[order] for k, v in batch["grid_patch"].items()}}
    (volume,) = PatchAggregator(mode).add(batch["image"], batch)
    np.testing.assert_allclose(volume.numpy(), item["image"], rtol=1e-5)


def test_rows_are_done_as_soon_as_no_patch_of_theirs_is_missing() -> None:
    grid = PatchGrid((100, 8, 8), (10, 4, 4), (5, 2, 2))
    rows = BlendedRows(grid, torch.ones(10, 4, 4), torch.device("cpu"))
    done = 0
    for patch in range(grid.count):
        for first, stop, values in rows.add(patch, torch.ones(50, 10, 4, 4)):
            assert first == done
            assert values.shape == (50, stop - first, 8, 8)
            done = stop
        assert done >= grid.start(patch)[0]
    assert done == 100
    assert rows.complete


@pytest.mark.parametrize("kind", ["argmax", "softmax argmax", "sigmoid threshold", "softmax"])
def test_labels_masks_and_probabilities_are_those_of_the_whole_volume(kind: str) -> None:
    (item,) = volumes((18, 17), channels=4)
    activation = next((name for name in ("softmax", "sigmoid") if name in kind), None)
    aggregator = PatchAggregator(
        activation=activation, argmax="argmax" in kind, threshold=0.6 if "threshold" in kind else None
    )
    (volume,) = aggregated(GridPatchLoader(Dataset([item]), GridPatchSamplesd("image", 8), batch_size=2), aggregator)
    logits = torch.from_numpy(item["image"])
    if "argmax" in kind:
        expected = logits.argmax(0, keepdim=True).to(torch.uint8)
    elif "threshold" in kind:
        expected = (logits.sigmoid() >= 0.6).to(torch.uint8)
    else:
        expected = logits.softmax(0)
    assert volume.dtype == expected.dtype
    torch.testing.assert_close(volume.as_tensor(), expected)


def test_many_classes_get_a_dtype_that_can_number_them() -> None:
    (item,) = volumes((4, 4), channels=300)
    item["image"][299] = 2
    loader = GridPatchLoader(Dataset([item]), GridPatchSamplesd("image", 4))
    (volume,) = aggregated(loader, PatchAggregator(argmax=True))
    assert volume.dtype == torch.int16
    assert (volume == 299).all()


@pytest.mark.parametrize("output_format", ["npy", "nii", "zarr"])
def test_files_hold_what_memory_holds(tmp_path: Path, output_format: str) -> None:
    if output_format == "zarr":
        pytest.importorskip("zarr")
    items = [
        {"image": meta(numbered(20, 9, 8).astype(np.float32), file)} for file in ("a/case.nii.gz", "b/case.nii.gz")
    ]
    grid = GridPatchSamplesd("image", 8, overlap=4)
    in_memory = aggregated(GridPatchLoader(Dataset(items), grid, batch_size=7), PatchAggregator("hann"))
    files = PatchAggregator("hann", output_dir=tmp_path / "out", output_format=output_format)
    on_disk = aggregated(GridPatchLoader(Dataset(items), grid, batch_size=7), files)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"0000_case.{output_format}",
        f"0001_case.{output_format}",
    ]
    for stored, volume in zip(on_disk, in_memory, strict=True):
        assert np.array_equal(stored.numpy(), volume.numpy())
        assert np.array_equal(stored.affine, volume.affine)
        assert isinstance(stored, LazyMetaTensor if output_format == "zarr" else MetaTensor)
        assert stored.meta["filename_or_obj"] == volume.meta["filename_or_obj"]
        path = Path(stored.meta["saved_to"])
        assert path.exists()
        if output_format == "zarr":
            read = LoadVolume()(path)
            assert np.array_equal(read, volume)
            assert np.array_equal(read.affine, volume.affine)
        if output_format == "npy":
            assert np.array_equal(np.load(path, mmap_mode="r"), volume.numpy())
        if output_format == "nii":
            assert np.array_equal(nib.load(path).get_fdata(), volume.numpy()[0])
            assert np.array_equal(nib.load(path).affine, volume.affine)


@pytest.mark.parametrize(("shape", "channels"), [((12, 9, 8), 1), ((12, 9, 8), 3), ((12, 9), 2)])
def test_nifti_files_are_as_monais_writers_make_them(tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
    item = {"image": MetaTensor(numbered(*shape, channels=channels).astype(np.float32), affine=oblique())}
    loader = GridPatchLoader(Dataset([item]), GridPatchSamplesd("image", 8, overlap=4), batch_size=3)
    (whole,) = aggregated(loader, PatchAggregator("crop", output_dir=tmp_path, output_format="nii"))
    assert np.array_equal(whole.numpy(), item["image"])
    SaveImage(tmp_path, "theirs", ".nii", separate_folder=False, resample=False, print_log=False)(item["image"])
    ours, theirs = nib.load(tmp_path / "0000_volume.nii"), nib.load(tmp_path / "0_theirs.nii")
    assert np.array_equal(np.squeeze(ours.get_fdata()), np.squeeze(theirs.get_fdata()))
    np.testing.assert_allclose(ours.affine, theirs.affine)
    assert np.array_equal(
        LoadImage()(tmp_path / "0000_volume.nii").affine, LoadImage()(tmp_path / "0_theirs.nii").affine
    )


def test_a_volume_that_is_still_mapped_outlives_the_next_epochs_file(tmp_path: Path) -> None:
    (item,) = volumes((16, 16))
    loader = GridPatchLoader(Dataset([item]), GridPatchSamplesd("image", 8), batch_size=4)
    aggregator = PatchAggregator(output_dir=tmp_path)
    (first,), (second,) = (aggregated(loader, aggregator, lambda x, f=factor: f * x) for factor in (1, 2))
    assert np.array_equal(2 * first.numpy(), second.numpy())


def test_volumes_have_the_affine_and_metadata_that_they_had_before_their_patches_were_taken() -> None:
    volume = meta(numbered(19, 14, 9).astype(np.float32))
    volume.affine = oblique()
    grid = GridPatchSamplesd("image", 8, overlap=4, pad_overlap=True)
    (whole,) = aggregated(GridPatchLoader(Dataset([{"image": volume}]), grid, batch_size=4), PatchAggregator())
    assert isinstance(whole, MetaTensor)
    assert torch.equal(whole.affine, volume.affine)
    assert whole.meta["filename_or_obj"] == "case.nii.gz"
    assert whole.applied_operations == volume.applied_operations == []
    assert not {"patch_index", "patch_location", "crop_center"} & set(whole.meta)


def test_crop_keeps_the_dtype_of_labels() -> None:
    label = numbered(15, 13)
    loader = GridPatchLoader(Dataset([{"image": label}]), GridPatchSamplesd("image", 6, overlap=3), batch_size=2)
    (whole,) = aggregated(loader, PatchAggregator("crop"))
    assert whole.dtype == torch.int32
    assert np.array_equal(whole.numpy(), label)


def test_half_precision_outputs_are_summed_in_single_precision() -> None:
    (item,) = volumes((16,))
    loader = GridPatchLoader(Dataset([item]), GridPatchSamplesd("image", 8, overlap=6), batch_size=4)
    (whole,) = aggregated(loader, PatchAggregator("gaussian"), lambda image: image.half())
    assert whole.dtype == torch.float32
    np.testing.assert_allclose(whole.numpy(), item["image"].astype(np.float16).astype(np.float32), rtol=1e-6)


@pytest.fixture
def batches() -> list[dict[str, Any]]:
    loader = GridPatchLoader(Dataset(volumes((8, 8), (4, 8))), GridPatchSamplesd("image", 4), batch_size=2)
    return list(loader)


def test_a_missing_patch_gives_an_error_and_no_volume(batches: list[dict[str, Any]]) -> None:
    aggregator = PatchAggregator()
    whole = [volume for batch in batches[1:] for volume in aggregator.add(batch["image"], batch)]
    assert [tuple(volume.shape) for volume in whole] == [(1, 4, 8)]
    with pytest.raises(RuntimeError, match=r"1 volumes are not whole: volume 0 lacks 2 of 4 patches \(0, 1\)"):
        aggregator.finish()
    aggregator.clear()
    aggregator.finish()


def test_a_patch_that_comes_twice_is_an_error(batches: list[dict[str, Any]]) -> None:
    aggregator = PatchAggregator()
    aggregator.add(batches[0]["image"], batches[0])
    with pytest.raises(ValueError, match="volume 0: patch 0 of 4 was added before"):
        aggregator.add(batches[0]["image"], batches[0])


def test_outputs_that_do_not_fit_are_refused(batches: list[dict[str, Any]]) -> None:
    batch = batches[0]
    image = batch["image"]
    with pytest.raises(TypeError, match="outputs are a tuple"):
        PatchAggregator().add((image, image), batch)
    with pytest.raises(KeyError, match="batches come from GridPatchLoader"):
        PatchAggregator().add(image, {"image": image})
    with pytest.raises(ValueError, match="outputs for 1 patches; the batch has 2"):
        PatchAggregator().add(image[:1], batch)
    with pytest.raises(ValueError, match=r"has shape \[1, 2, 2\]; expected channels and the patch's size \[4, 4\]"):
        PatchAggregator().add(image[..., ::2, ::2], batch)
    aggregator = PatchAggregator(argmax=True)
    with pytest.raises(ValueError, match="argmax of one channel"):
        aggregator.add(image, batch)
    aggregator = PatchAggregator()
    aggregator.add(image, batch)
    with pytest.raises(ValueError, match="has 3 channels; others had 1"):
        aggregator.add(batches[1]["image"].expand(-1, 3, -1, -1), batches[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "gauss"}, "expected one of constant, average, gaussian, hann, crop"),
        ({"output_format": "nrrd"}, "expected one of npy, nii, zarr"),
        ({"activation": "relu"}, "expected 'softmax', 'sigmoid' or something callable"),
        ({"argmax": True, "threshold": 0.5}, "exclude each other"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchAggregator(**arguments)
