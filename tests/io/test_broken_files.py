# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monai_patchqueue import LoadVolume, LoadVolumed
from monai_patchqueue.io import inflate
from tests.nifti_files import voxels, write_nifti

ARRAY = voxels((32, 31, 30), "i2")


@pytest.fixture(params=["isal", "standard library"])
def inflater(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "isal":
        pytest.importorskip("isal")
    else:
        monkeypatch.setattr(inflate, "isal_zlib", None)
    return str(request.param)


def cut(n: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:n]


def with_flipped_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def with_wrong_checksum(content: bytes) -> bytes:
    return content[:-8] + b"\1\2\3\4" + content[-4:]


def with_voxels_left_out(content: bytes) -> bytes:
    return gzip.compress(gzip.decompress(content)[:1000])


def with_a_greater_shape(content: bytes) -> bytes:
    plain = bytearray(gzip.decompress(content))
    plain[42:48] = np.array([32000, 32000, 32000], "<i2").tobytes()
    return gzip.compress(bytes(plain))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut(0), "the header"),
        (cut(100), "the header"),
        (cut(20000), r"shape \[32, 31, 30\] and dtype int16"),
        (cut(-4), "after 59872 bytes"),
        (with_flipped_byte, "voxels"),
        (with_wrong_checksum, "after 59872 bytes"),
        (with_voxels_left_out, "after 1000 bytes.* 59520 bytes were expected"),
        (with_a_greater_shape, r"65536000000000 bytes; its \d+ bytes cannot hold them"),
        (lambda content: b"<html>404</html>" + content, "the header"),
    ],
)
def test_a_broken_compressed_file_is_named_with_what_is_wrong(
    tmp_path: Path, inflater: str, spoil: Any, message: str
) -> None:
    path = tmp_path / "case_7.nii.gz"
    write_nifti(path, ARRAY)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(OSError, match=rf"(?s)case_7\.nii\.gz' is truncated or corrupt: .*{message}"):
        LoadVolume()(path)


@pytest.mark.parametrize("lazy_read", [False, True])
def test_a_file_that_is_too_short_is_named_with_its_size(tmp_path: Path, lazy_read: bool) -> None:
    path = tmp_path / "case_7.nii"
    write_nifti(path, ARRAY)
    path.write_bytes(path.read_bytes()[:5000])
    message = r"case_7\.nii' is truncated: it has 5000 bytes.* \[32, 31, 30\] and dtype int16 .* needs 59872"
    with pytest.raises(OSError, match=message):
        LoadVolume(lazy_read=lazy_read, ensure_channel_first=True)(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("nothing.nii", "nothing.nii.gz", "nothing.img"):
        with pytest.raises(Exception, match=re.escape(name)):
            LoadVolumed("image")({"image": tmp_path / name})


def test_a_pair_without_its_voxels_is_named(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.img", ARRAY)
    (tmp_path / "a.img").unlink()
    with pytest.raises(Exception, match=r"a\.(img|hdr)"):
        LoadVolume()(tmp_path / "a.hdr")


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4"])
def test_the_standard_library_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    pytest.importorskip("isal")
    file = write_nifti(tmp_path / "a.nii.gz", voxels((90, 91, 92), dtype), slope=0.5)
    fast = LoadVolume()(file)
    monkeypatch.setattr(inflate, "isal_zlib", None)
    assert np.asarray(LoadVolume()(file)).tobytes() == np.asarray(fast).tobytes()


def test_files_of_several_members_and_with_something_behind_them_are_read(tmp_path: Path, inflater: str) -> None:
    path = tmp_path / "a.nii.gz"
    write_nifti(path, ARRAY)
    plain = gzip.decompress(path.read_bytes())
    members = b"".join(gzip.compress(plain[a : a + 9999]) for a in range(0, len(plain), 9999))
    for content in (members, members + b"\0" * 512, gzip.compress(plain + b"more"), members + b"garbage" * 9):
        path.write_bytes(content)
        np.testing.assert_array_equal(np.asarray(LoadVolume(dtype=None)(path)), ARRAY)
