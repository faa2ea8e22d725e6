# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from monai_patchqueue.io.chunks import ChunkedFile, compress, library
from monai_patchqueue.io.narrowing import narrowed

ARRAYS = {
    "u1": np.arange(2 * 30 * 20 * 25, dtype=np.uint8).reshape(2, 30, 20, 25),
    "f4": np.random.default_rng(0).random((1, 30, 20, 25)).astype(np.float32),
    "i2": np.random.default_rng(1).integers(-1000, 1000, (3, 40, 50)).astype(np.int16),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chunked")
    for name, array in ARRAYS.items():
        (folder / name).write_bytes(compress(array, (8,) * (array.ndim - 1)))
    return folder


def opened(folder: Path, name: str, mmap: bool = True) -> ChunkedFile:
    return ChunkedFile(str(folder / name), ARRAYS[name].shape, ARRAYS[name].dtype, mmap)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(sorted(ARRAYS)), mmap=st.booleans(), data=st.data())
def test_any_region_is_that_of_the_array(folder: Path, name: str, mmap: bool, data: Any) -> None:
    index = tuple(data.draw(st.slices(n).filter(lambda s: s.step in (None, 1))) for n in ARRAYS[name].shape)
    np.testing.assert_array_equal(opened(folder, name, mmap)[index], ARRAYS[name][index], strict=True)


def test_a_region_needs_only_the_chunks_that_it_touches(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "f4").read_bytes()
    middle = len(whole) // 2
    (tmp_path / "f4").write_bytes(whole[:middle] + bytes(500) + whole[middle + 500 :])
    damaged = ChunkedFile(str(tmp_path / "f4"), ARRAYS["f4"].shape, ARRAYS["f4"].dtype)
    for corner in (slice(0, 8), slice(22, 30)):
        region = (slice(0, 1), corner, corner, corner)
        np.testing.assert_array_equal(damaged[region], ARRAYS["f4"][region])
    with pytest.raises(OSError, match=r"f4' is damaged"):
        damaged[tuple(slice(n) for n in damaged.shape)]


def test_a_pickle_holds_the_files_name(folder: Path) -> None:
    file = opened(folder, "u1")
    index = tuple(slice(n) for n in file.shape)
    file[index]
    assert len(pickle.dumps(file)) < 500
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(file))[index], ARRAYS["u1"])


dtypes = st.sampled_from([np.dtype(t) for t in ("u1", "i1", "u2", "i2", "i4", "u4", "i8", "f2", "f4", "f8", "?", "c8")])
whole_floats = arrays.arrays(np.float32, 6, elements=st.integers(-70000, 70000).map(float))


@settings(max_examples=300, deadline=None)
@given(array=st.one_of(dtypes.flatmap(lambda dtype: arrays.arrays(dtype, (2, 3))), whole_floats))
def test_a_narrowed_array_gives_back_the_bits(array: np.ndarray) -> None:
    small = narrowed(array)
    assert small.dtype.itemsize <= array.dtype.itemsize
    assert small.astype(array.dtype).tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0.0, 255.0], "u1"),
        ([-1024.0, 3071.0], "i2"),
        ([0.0, 60000.0], "u2"),
        ([0.5, 1.0], "f4"),
        ([-0.0, 1.0], "f4"),
        ([np.nan, 1.0], "f4"),
        ([np.inf, 1.0], "f4"),
    ],
)
def test_whole_numbers_are_kept_as_such_and_nothing_else(values: list[float], dtype: str) -> None:
    assert narrowed(np.array(values, np.float32)).dtype == dtype
    assert narrowed(np.array(values, np.float64)).dtype == dtype


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blosc2", None)
    library.cache_clear()
    with pytest.raises(ImportError, match=r"blosc2: pip install 'monai_patchqueue\[store\]'"):
        library()


def test_the_library_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, monai_patchqueue; print('blosc2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"False\n"
