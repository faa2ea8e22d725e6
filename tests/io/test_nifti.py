# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from monai.transforms import LoadImage

from monai_patchqueue import FastNiftiReader, LoadVolume
from monai_patchqueue.io.nifti import NiftiVoxels, open_nifti
from tests.nifti_files import AFFINE, DTYPES, assert_same_volume, voxels, write_nifti


def assert_read_as_by_monai(file: str, **kwargs: Any) -> None:
    """By the transform and by the reader, as MONAI's reader of nibabel does it; and by our own code."""
    reader = NIBABEL if file.endswith((".hdr", ".img")) else {}
    assert isinstance(open_nifti(file).dataobj, NiftiVoxels)  # type: ignore[union-attr]
    stock = LoadImage(**reader, **kwargs)(file)
    assert_same_volume(LoadVolume(**kwargs)(file), stock)
    assert_same_volume(LoadImage(reader=FastNiftiReader, **kwargs)(file), stock)


NIBABEL = {"reader": "NibabelReader"}


@pytest.mark.parametrize("endian", "<>")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_byte_order_is_read_as_monai_reads_it(tmp_path: Path, dtype: str, endian: str) -> None:
    for slope, inter in ((np.nan, np.nan), (0, 3), (1, 0), (0.1, -7.3)):
        file = write_nifti(tmp_path / "a.nii.gz", voxels((5, 6, 7), dtype), endian=endian, slope=slope, inter=inter)
        assert_read_as_by_monai(file)
        assert_read_as_by_monai(file, dtype=np.float64, ensure_channel_first=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_dtype_the_headers_counts(tmp_path: Path, dtype: str) -> None:
    for slope in (np.nan, 2.5):
        assert_read_as_by_monai(write_nifti(tmp_path / "a.nii", voxels((5, 6, 7), dtype), slope=slope), dtype=None)


@settings(max_examples=80, deadline=None, phases=(Phase.reuse, Phase.generate))
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=5).map(tuple),
    dtype=st.sampled_from(DTYPES),
    suffix=st.sampled_from([".nii", ".nii.gz", ".img"]),
    slope=st.sampled_from([np.nan, 0.0, 1.0, 0.37, -2.0, 1e30]),
    inter=st.sampled_from([0.0, -1024.0, 0.1]),
)
def test_any_header_is_read_as_monai_reads_it(
    data: st.DataObject, shape: tuple[int, ...], dtype: str, suffix: str, slope: float, inter: float
) -> None:
    header: dict[str, Any] = {
        "endian": data.draw(st.sampled_from("<>")),
        "version": data.draw(st.sampled_from([1, 2])),
        "sform": data.draw(st.integers(0, 4)),
        "qform": data.draw(st.integers(0, 4)),
        "units": data.draw(st.sampled_from([("mm", "sec"), ("micron", "msec"), ("unknown", "unknown")])),
        "extension": data.draw(st.sampled_from([b"", b"a comment"])),
        "zooms": data.draw(st.sampled_from([None, (1.0, 1.0, 1.0, 1.0, 1.0)[: len(shape)]])),
    }
    options: dict[str, Any] = {
        "dtype": data.draw(st.sampled_from([np.float32, np.int16, np.uint16, None])) if abs(slope) < 10 else None,
        "ensure_channel_first": data.draw(st.booleans()),
    }
    if data.draw(st.booleans()):
        options["squeeze_non_spatial_dims"] = True
    if header["endian"] == ">" and options["dtype"] is None:
        options["dtype"] = np.float64  # without one, MONAI refuses the byte order
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # casts that overflow, on both sides
        file = write_nifti(Path(folder) / f"a{suffix}", voxels(shape, dtype), slope=slope, inter=inter, **header)
        assert_read_as_by_monai(file, **options)


@pytest.mark.parametrize("sform", [0, 1])
@pytest.mark.parametrize("qform", [0, 1])
def test_the_affine_is_nibabels(tmp_path: Path, sform: int, qform: int) -> None:
    file = write_nifti(tmp_path / "a.nii.gz", voxels((4, 5, 6), "i2"), sform=sform, qform=qform)
    np.testing.assert_array_equal(LoadVolume()(file).affine.numpy(), nib.load(file).affine)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".img"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4", "f8"])
@pytest.mark.parametrize("forms", [(1, 0), (0, 1), (1, 1)])
def test_values_and_affine_are_itks(tmp_path: Path, suffix: str, dtype: str, forms: tuple[int, int]) -> None:
    array = voxels((4, 5, 6), dtype)
    file = write_nifti(tmp_path / f"a{suffix}", array, sform=forms[0], qform=forms[1], slope=0.5, inter=3)
    volume = LoadVolume()(file)
    np.testing.assert_allclose(np.asarray(volume), itk.array_from_image(itk.imread(file)).T, rtol=1e-6)
    np.testing.assert_allclose(volume.affine, LoadImage(reader="ITKReader")(file).affine, atol=1e-5)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)


def test_a_header_that_contradicts_itself_is_mended_as_monai_does(tmp_path: Path) -> None:
    for forms in ((1, 1), (1, 0), (0, 1), (0, 0)):
        path = tmp_path / "a.nii"
        write_nifti(path, voxels((4, 5, 6), "i2"), sform=forms[0], qform=forms[1])
        content = bytearray(path.read_bytes())
        content[80:92] = np.array([7, 8, 9], "<f4").tobytes()  # pixdim
        path.write_bytes(content)
        assert_read_as_by_monai(str(path))


@pytest.mark.parametrize("channel_dim", [0, 2, -1, "no_channel"])
def test_channels_are_where_the_reader_is_told_they_are(tmp_path: Path, channel_dim: int | str) -> None:
    file = write_nifti(tmp_path / "a.nii.gz", voxels((2, 5, 3, 4), "i2"))
    assert_read_as_by_monai(file, channel_dim=channel_dim, ensure_channel_first=True)


def test_either_file_of_a_pair_names_it(tmp_path: Path) -> None:
    image = write_nifti(tmp_path / "a.img", voxels((4, 5, 6), "f4"), slope=2)
    header = str(tmp_path / "a.hdr")
    assert_read_as_by_monai(image)
    assert_read_as_by_monai(header)


@pytest.mark.parametrize("kind", ["rgb", "complex", "empty", "analyze", "canonical", "kwargs", "list"])
def test_what_is_unusual_is_read_by_monai(tmp_path: Path, kind: str) -> None:
    path, options = tmp_path / "a.nii.gz", {}
    file: Any = str(path)
    array: np.ndarray = voxels((4, 5, 6), "i2")
    if kind == "rgb":
        array = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    if kind == "complex":
        array = array.astype(np.complex64)
        options = {"dtype": None}
    if kind == "empty":
        array = array[:0]
    if kind == "analyze":
        file = str(tmp_path / "a.img")
        nib.save(nib.AnalyzeImage(array, np.eye(4)), file)
        options = NIBABEL
    else:
        nib.save(nib.Nifti1Image(array, AFFINE), file)
    if kind == "canonical":
        options = {"as_closest_canonical": True}
    if kind == "kwargs":
        options = {"mmap": False}
    if kind == "list":
        file = [file, file]
    try:
        stock = LoadImage(**options)(file)
    except Exception as error:  # whatever MONAI makes of it, we do
        with pytest.raises(type(error)):
            LoadVolume(**options)(file)
        return
    assert_same_volume(LoadVolume(**options)(file), stock)
    if kind != "analyze":
        assert_same_volume(LoadImage(reader=FastNiftiReader, **options)(file), stock)


def test_the_reader_reorients_as_monais_does(tmp_path: Path) -> None:
    file = write_nifti(tmp_path / "a.nii.gz", voxels((4, 5, 6), "i2"), slope=0.5)
    stock = LoadImage(reader="NibabelReader", as_closest_canonical=True)(file)
    assert_same_volume(LoadImage(reader=FastNiftiReader, as_closest_canonical=True)(file), stock)
