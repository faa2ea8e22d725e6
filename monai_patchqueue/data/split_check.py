# SPDX-License-Identifier: Apache-2.0
"""Whether a data module's samples can be loaded, and what they look like."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .split_datasets import PartPipeline, explained
from .splits import SplitPart
from .volumes import record_name

__all__ = ["SampleReport", "report_samples"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleReport:
    """What became of one sample.

    Args:
        split: the split's name.
        database: number of the database among the split's.
        name: the sample's number and files.
        patches: number of patches, or of items of another kind, that it gives.
        contents: shape and dtype of each array of the first of them, and the type of what else there is, by key.
        error: what went wrong, if something did.

    Example:
        >>> import numpy as np
        >>> from monai_patchqueue import PatchDataModule
        >>> samples = [np.zeros((1, 32, 32), np.float32)]
        >>> data = PatchDataModule({"train": [(samples, lambda volume: {"image": volume, "age": 40})]})
        >>> print(data.check_split()[0])
        train[0] volume 0: 1 × {image: [1, 32, 32] float32, age: int}
    """

    split: str
    database: int
    name: str
    patches: int = 0
    contents: Mapping[str, str] | None = None
    error: str | None = None

    def __str__(self) -> str:
        where = f"{self.split}[{self.database}] {self.name}"
        if self.error is not None:
            return f"{where}: {self.error}"
        contents = ", ".join(f"{key}: {what}" for key, what in (self.contents or {}).items())
        return f"{where}: {self.patches} × {{{contents}}}"


def report_samples(parts: Sequence[SplitPart], pipeline: PartPipeline, limit: int) -> Iterator[SampleReport]:
    """Load the first samples of each part, all transforms included; errors are reported, not raised.

    Args:
        parts: of any splits.
        pipeline: gives the transforms of each.
        limit: samples of each part.
    """
    for part in parts:
        transform = pipeline(part)
        for index in range(min(limit, len(part.samples))):
            record = part.samples[index]
            report = _report(part, record_name(record, index), transform, record)
            logger.log(logging.INFO if report.error is None else logging.ERROR, "%s", report)
            yield report


def _report(part: SplitPart, name: str, transform: Any, record: Any) -> SampleReport:
    try:
        item = transform(record)
    except Exception as error:
        return SampleReport(part.split, part.database, name, error=explained(error))
    items = item if isinstance(item, list) else [item]
    return SampleReport(part.split, part.database, name, len(items), dict(_contents(items[0])) if items else {})


def _contents(item: Any) -> Iterator[tuple[str, str]]:
    pairs = item.items() if isinstance(item, Mapping) else enumerate(item if isinstance(item, tuple) else [item])
    for key, value in pairs:
        if isinstance(value, (torch.Tensor, np.ndarray)):
            yield str(key), f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        else:
            yield str(key), type(value).__name__
