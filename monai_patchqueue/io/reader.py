# SPDX-License-Identifier: Apache-2.0
"""A reader for MONAI's ``LoadImage``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from monai.data.image_reader import NibabelReader
from monai.data.utils import correct_nifti_header_if_necessary
from monai.utils import ensure_tuple

from .nifti import open_nifti

__all__ = ["FastNiftiReader"]


class FastNiftiReader(NibabelReader):
    """MONAI's ``NibabelReader``, with its own way to the voxels of NIfTI files.

    Values, dtype, affine and metadata are those of ``NibabelReader``. What is no NIfTI file, or holds other voxels than
    plain integers and floats, is read by it. :class:`~monai_patchqueue.LoadVolumed` is faster still: ``LoadImage``
    brings the voxels into C order, which takes as long as decompressing them.

    Args:
        channel_dim: axis of the channels, or ``"no_channel"``.
        as_closest_canonical: reorient to the canonical order of axes that is closest.
        squeeze_non_spatial_dims: leave out axes of length 1 after the spatial ones.
        kwargs: for ``nibabel.load``, where that reads a file.

    Example:
        >>> import tempfile
        >>> import nibabel
        >>> import numpy as np
        >>> from monai.transforms import LoadImage
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 6), np.int16), np.eye(4)), f"{folder}/a.nii.gz")
        ...     LoadImage(reader=FastNiftiReader)(f"{folder}/a.nii.gz").shape
        torch.Size([4, 5, 6])
    """

    def __init__(
        self,
        channel_dim: str | int | None = None,
        as_closest_canonical: bool = False,
        squeeze_non_spatial_dims: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(channel_dim, as_closest_canonical, squeeze_non_spatial_dims, **kwargs)

    def verify_suffix(self, filename: Sequence[Any] | Any) -> bool:
        """Whether files are .nii, .nii.gz, or .hdr and .img that are NIfTI: Analyze's pairs have the same names."""
        files = [os.fspath(file) for file in ensure_tuple(filename)]
        if all(file.lower().endswith((".hdr", ".img")) for file in files):
            return all(open_nifti(file) is not None for file in files)
        known: bool = super().verify_suffix(filename)
        return known

    def read(self, data: Sequence[Any] | Any, **kwargs: Any) -> Any:
        """Read the headers of files; their voxels are read by :meth:`get_data`.

        Args:
            data: file or files.
            kwargs: for ``nibabel.load``, where that reads a file.

        Returns:
            A nibabel image, or a list of them.

        Raises:
            OSError: a file is missing, truncated or corrupt.
        """
        files = ensure_tuple(data)
        images = [self._open(file, kwargs) for file in files]
        self.filenames = files  # after the calls above, which set it to one file
        return images if len(images) > 1 else images[0]

    def _open(self, file: Any, kwargs: dict[str, Any]) -> Any:
        image = None if self.to_gpu or kwargs or self.kwargs else open_nifti(os.fspath(file))
        return super().read(file, **kwargs) if image is None else correct_nifti_header_if_necessary(image)
