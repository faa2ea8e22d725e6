# SPDX-License-Identifier: Apache-2.0
"""The same volume in several file formats, with an oblique affine."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np

SPACING = np.array([1.5, 0.8, 2.5])
ORIGIN = np.array([-31.0, 12.5, 40.25])


def oblique_affine() -> np.ndarray:
    """Voxel indices to world coordinates (right, anterior, superior), turned about all three axes."""
    angles = np.deg2rad([10, -15, 25])
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        rotation = rotation @ turn
    affine = np.eye(4)
    affine[:3, :3] = rotation * SPACING
    affine[:3, 3] = ORIGIN
    return affine


def write_image(file: Path, volume: np.ndarray) -> Path:
    """Write a volume [x, y, z] as NIfTI, MetaImage or NRRD by suffix, or as a folder of DICOM slices without one."""
    affine = oblique_affine()
    if file.name.endswith((".nii", ".nii.gz")):
        nib.save(nib.Nifti1Image(volume, affine), file)
        return file
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    if not file.suffix:
        _write_dicom(file, volume.astype(np.int16), lps)
        return file
    image = itk.image_from_array(np.ascontiguousarray(volume.T))
    image.SetSpacing(SPACING.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(lps[:3, :3] / SPACING)))
    itk.imwrite(image, str(file))
    return file


def _write_dicom(folder: Path, volume: np.ndarray, lps: np.ndarray) -> None:
    """A series of CT slices, each with the position and direction that the standard asks for (PS3.3, C.7.6.2)."""
    folder.mkdir()
    study = "1.2.826.0.1.3680043.10.1.1"
    directions = (lps[:3, :3] / SPACING).T
    for index in range(volume.shape[2]):
        position = (lps @ [0, 0, index, 1])[:3]
        instance = f"{study}.3.{index + 1}"
        dataset: list[tuple[int, int, str, Any]] = [
            (0x0008, 0x0016, "UI", "1.2.840.10008.5.1.4.1.1.2"),
            (0x0008, 0x0018, "UI", instance),
            (0x0008, 0x0060, "CS", "CT"),
            (0x0010, 0x0020, "LO", "nobody"),
            (0x0018, 0x0050, "DS", SPACING[2]),
            (0x0020, 0x000D, "UI", f"{study}.1"),
            (0x0020, 0x000E, "UI", f"{study}.2"),
            (0x0020, 0x0013, "IS", index + 1),
            (0x0020, 0x0032, "DS", position),
            (0x0020, 0x0037, "DS", directions[:2].ravel()),
            (0x0028, 0x0002, "US", 1),
            (0x0028, 0x0004, "CS", "MONOCHROME2"),
            (0x0028, 0x0010, "US", volume.shape[1]),
            (0x0028, 0x0011, "US", volume.shape[0]),
            (0x0028, 0x0030, "DS", SPACING[[1, 0]]),
            (0x0028, 0x0100, "US", 16),
            (0x0028, 0x0101, "US", 16),
            (0x0028, 0x0102, "US", 15),
            (0x0028, 0x0103, "US", 1),
            (0x0028, 0x1052, "DS", 0),
            (0x0028, 0x1053, "DS", 1),
            (0x7FE0, 0x0010, "OW", np.ascontiguousarray(volume[:, :, index].T).tobytes()),
        ]
        header = b"".join(
            _element(0x0002, element, "UI", value)
            for element, value in ((0x0002, dataset[0][3]), (0x0003, instance), (0x0010, "1.2.840.10008.1.2.1"))
        )
        start = bytes(128) + b"DICM" + _element(0x0002, 0x0000, "UL", len(header))
        body = b"".join(_element(*element) for element in dataset)
        (folder / f"slice_{index:03d}.dcm").write_bytes(start + header + body)


def _element(group: int, element: int, representation: str, value: Any) -> bytes:
    """A data element in explicit, little-endian form (PS3.5, 7.1.2)."""
    if representation in ("US", "UL"):
        content = struct.pack("<H" if representation == "US" else "<I", value)
    elif isinstance(value, bytes):
        content = value
    else:
        parts = np.atleast_1d(value).tolist() if representation == "DS" else [value]
        text = "\\".join(f"{part:.11g}" if isinstance(part, float) else str(part) for part in parts)
        content = (text + ("\0" if representation == "UI" else " ") * (len(text) % 2)).encode()
    length = struct.pack("<HI", 0, len(content)) if representation == "OW" else struct.pack("<H", len(content))
    return struct.pack("<HH", group, element) + representation.encode() + length + content
