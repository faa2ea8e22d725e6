# SPDX-License-Identifier: Apache-2.0
"""Patches that are views of their volumes, where a pipeline ends with them and the queue copies them next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from monai.transforms import Compose
from torch.utils.data import Subset

__all__ = ["giving_views", "last_transform"]

_PACKAGES = ("monai.data.", "monai_patchqueue.")


def last_transform(dataset: Any) -> Any:
    """The transform that an item's patches come from as they are; ``None`` where somebody may do more to them.

    That is known of MONAI's datasets and ours. One of somebody else's may write into what its transforms give.

    Example:
        >>> from monai.data import Dataset
        >>> from monai.transforms import Compose, RandFlip, ScaleIntensity
        >>> type(last_transform(Dataset([1], Compose([ScaleIntensity(), Compose([RandFlip()])])))).__name__
        'RandFlip'
    """
    while type(dataset) is Subset:
        dataset = dataset.dataset
    if not type(dataset).__module__.startswith(_PACKAGES):
        return None
    transform: Any = getattr(dataset, "transform", None)
    while type(transform) is Compose:
        transform = transform.transforms[-1] if transform.transforms else None
    return transform


@contextmanager
def giving_views(transform: Any) -> Iterator[None]:
    """Have a patch transform of ours give views of volumes instead of copies, within the block."""
    if not hasattr(transform, "copies"):
        yield
        return
    transform.copies = False
    try:
        yield
    finally:
        transform.copies = True
