# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_patchqueue import LoadVolume
from monai_patchqueue.io.lazy import LazyVolume
from monai_patchqueue.io.regions import StoredFile
from monai_patchqueue.io.scaling import Scaling
from tests.nifti_files import write_nifti

SHAPE = (5, 4, 3, 2)
ARRAY = np.arange(120, dtype="<i2").reshape(SHAPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    for order in "CF":
        (folder / order).write_bytes(b"header" + ARRAY.tobytes(order=order))  # type: ignore[arg-type]
    return folder


def stored(folder: Path, order: str, mmap: bool) -> StoredFile:
    return StoredFile(str(folder / order), 6, SHAPE, ARRAY.dtype, order, mmap)


indices = st.one_of(
    st.integers(-2, 1),
    st.slices(5),
    st.slices(3),
    st.just(slice(None)),
    st.builds(slice, st.integers(-3, 3), st.none()),
)


@settings(max_examples=200, deadline=None)
@given(
    index=st.one_of(indices, st.lists(indices, max_size=4).map(tuple)),
    order=st.sampled_from("CF"),
    mmap=st.booleans(),
    channel_axis=st.sampled_from([0, 1, 3, -1, None]),
)
def test_any_part_is_that_of_the_whole_array(
    folder: Path, index: Any, order: str, mmap: bool, channel_axis: int | None
) -> None:
    scaling = Scaling(0.5, 3, np.dtype(np.float32))
    volume = LazyVolume(stored(folder, order, mmap), scaling, channel_axis=channel_axis)
    whole = ARRAY[None] if channel_axis is None else np.moveaxis(ARRAY, channel_axis, 0)
    whole = (whole * 0.5 + 3).astype(np.float32)
    assert volume.shape == whole.shape
    assert volume.ndim == whole.ndim
    np.testing.assert_array_equal(np.asarray(volume), whole)
    np.testing.assert_array_equal(volume.load(), whole)
    try:
        expected = whole[index]
    except IndexError:
        with pytest.raises(IndexError, match="is out of range for an axis of"):
            volume[index]
        return
    part = volume[index]
    assert part.dtype == volume.dtype == np.float32
    np.testing.assert_array_equal(part, expected, strict=True)


def test_what_is_no_index_is_refused(folder: Path) -> None:
    volume = LazyVolume(stored(folder, "F", False), Scaling())
    with pytest.raises(IndexError, match="6 indices for a volume with 5 axes"):
        volume[0, 0, 0, 0, 0, 0]
    with pytest.raises(IndexError, match="index 9 is out of range for an axis of 5"):
        volume[:, 9]
    with pytest.raises(TypeError, match="ints and slices, got \\[0, 1\\]"):
        volume[[0, 1]]


@pytest.mark.parametrize("mmap", [True, False])
def test_only_the_part_is_read(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "huge.nii"
    small = np.zeros((4, 4, 4), np.int16)
    write_nifti(path, small)
    content = bytearray(path.read_bytes())
    content[42:48] = np.array([4096, 4096, 2048], "<i2").tobytes()
    path.write_bytes(content[:352])
    os.truncate(path, 352 + 2 * 4096 * 4096 * 2048)  # 64 GiB, of which the disk holds nothing
    with path.open("r+b") as file:
        file.seek(352 + 2 * (7 + 4096 * (8 + 4096 * 2000)))
        file.write(b"\5\0")
    volume = LoadVolume(ensure_channel_first=True, lazy_read=True, mmap=mmap)(path)
    assert volume.shape == (1, 4096, 4096, 2048)
    part = volume[:, 5:10, 6:11, 1999:2003]
    assert part[0, 2, 2, 1] == 5
    assert part.sum() == 5


@pytest.mark.parametrize("mmap", [True, False])
def test_a_pickle_holds_the_files_name_and_not_its_content(folder: Path, mmap: bool) -> None:
    file = stored(folder, "F", mmap)
    file[tuple(slice(n) for n in SHAPE)]
    pickled = pickle.dumps(LazyVolume(file, Scaling()))
    assert len(pickled) < len(pickle.dumps(LazyVolume(ARRAY[:0], Scaling()))) + 300
    np.testing.assert_array_equal(pickle.loads(pickled), ARRAY[None])


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "case_7.raw"
    path.write_bytes(ARRAY.tobytes())
    file = StoredFile(str(path), 0, SHAPE, ARRAY.dtype, "C")
    os.truncate(path, 100)
    with pytest.raises(OSError, match=r"case_7\.raw' has become shorter"):
        file[tuple(slice(n) for n in SHAPE)]


def test_a_label_is_indexed_by_the_stored_numbers_if_they_are_its_values() -> None:
    label = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    assert LazyVolume(label, Scaling(dtype=np.dtype(np.float32))).values().dtype == np.uint8
    assert LazyVolume(label, Scaling(2, 0, np.dtype(np.float32))).values().dtype == np.float32
    assert LazyVolume(label.astype(np.int32), Scaling(dtype=np.dtype(np.int16))).values().dtype == np.int16
    assert LazyVolume(label.astype(">i2"), Scaling(dtype=np.dtype(np.float32))).values().dtype == np.float32


def test_a_converted_part_owns_its_memory() -> None:
    volume = LazyVolume(ARRAY[..., 0], Scaling(dtype=np.dtype(np.float32)))
    assert volume[:, 1:3, 1:3].base is None


def test_a_copy_is_one() -> None:
    stored = ARRAY.copy()
    volume = LazyVolume(stored, Scaling())
    whole = np.array(volume)
    loaded = volume.load()
    whole[:] = 0
    assert stored.any()
    loaded[:] = 0
    assert stored.any()
