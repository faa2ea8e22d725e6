# SPDX-License-Identifier: Apache-2.0
"""What can be known of a dataset's volumes without loading them: records, names, numbers of patches."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any

import numpy as np
from monai.transforms import (
    ClassesToIndices,
    ClassesToIndicesd,
    Compose,
    FgBgToIndices,
    FgBgToIndicesd,
    GridPatch,
    GridPatchd,
    GridSplitd,
    RandGridPatch,
    RandGridPatchd,
    SplitDimd,
    Transform,
)
from monai.transforms.traits import MultiSampleTrait, RandomizableTrait
from torch.utils.data import ConcatDataset, Dataset, Subset

from ..queue.timing import pipeline_stages
from ..transforms import GridPatchSamplesd
from .grid_pieces import GridPieces
from .shapes import spatial_shape

__all__ = [
    "SamplesPerVolume",
    "count_patches",
    "file_suffix",
    "gives_a_list",
    "grid_patch_count",
    "holder_of",
    "record_name",
    "sample_count_holder",
    "stages_after_sampling",
    "storable_stages",
    "transforms_of",
    "volume_name",
    "volume_record",
]

SamplesPerVolume = int | str | Callable[[Any], int]

# Give one item, unlike other multi-sample transforms: with a grid's patches stacked, or with indices of voxels.
_ONE_ITEM = (
    ClassesToIndices,
    ClassesToIndicesd,
    FgBgToIndices,
    FgBgToIndicesd,
    GridPatch,
    GridPatchd,
    RandGridPatch,
    RandGridPatchd,
)


def holder_of(dataset: Any, index: int) -> tuple[Any, int]:
    """The dataset that holds a volume's record, and the record's index there."""
    while True:
        if isinstance(dataset, Subset):
            dataset, index = dataset.dataset, int(dataset.indices[index])
        elif isinstance(dataset, ConcatDataset):
            part = bisect_right(dataset.cumulative_sizes, index)
            index -= dataset.cumulative_sizes[part - 1] if part else 0
            dataset = dataset.datasets[part]
        elif isinstance(getattr(dataset, "data", None), Dataset):
            dataset = dataset.data
        else:
            return dataset, index


def volume_record(dataset: Any, index: int) -> Any:
    """A volume's record as it is before any transform; ``None`` where the dataset does not show it."""
    holder, place = holder_of(dataset, index)
    data = getattr(holder, "data", None)
    try:
        return data[place] if data is not None else None
    except (TypeError, KeyError, IndexError):
        return None


def volume_name(dataset: Any, index: int) -> str:
    """What to call a volume in a message: its number and, where there are any, its files.

    Example:
        >>> from monai.data import Dataset
        >>> volume_name(Dataset([{"image": "images/case_7.nii.gz", "label": "labels/case_7.nii.gz"}]), 0)
        'volume 0 (images/case_7.nii.gz, ../labels/case_7.nii.gz)'
    """
    if isinstance(dataset, GridPieces):
        dataset, index = dataset.dataset, dataset.pieces[index].volume
    return record_name(volume_record(dataset, index), index)


def record_name(record: Any, index: int) -> str:
    """What to call a volume that has this record and number."""
    values = record.values() if isinstance(record, Mapping) else [record]
    firsts = [value[0] if isinstance(value, (list, tuple)) and value else value for value in values]
    names = [os.fspath(value) for value in firsts if isinstance(value, (str, os.PathLike))]
    if not names:
        return f"volume {index}"
    others = [os.path.relpath(name, os.path.dirname(names[0])) for name in names[1:] if os.path.splitext(name)[1]]
    return f"volume {index} ({', '.join([names[0], *others])})"


def count_patches(dataset: Any, samples_per_volume: SamplesPerVolume | None) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Number of patches that each volume gives.

    Args:
        dataset: map-style dataset.
        samples_per_volume: a number, the name of a key of the volumes' records that holds it (1 where a record lacks
            it), or a callable from a record to it. ``None`` reads it off the dataset's transforms.

    Raises:
        ValueError: where that cannot be known, or makes no sense.

    Example:
        >>> from monai.data import Dataset
        >>> from monai.transforms import RandSpatialCropSamplesd
        >>> crop = RandSpatialCropSamplesd("image", roi_size=8, num_samples=4)
        >>> count_patches(Dataset([{"image": "a.nii"}, {"image": "b.nii"}], crop), None).tolist()
        [4, 4]
    """
    if samples_per_volume is not None:
        counts = _spread(dataset, samples_per_volume, 1, "samples_per_volume")
    else:
        counts = _from_transforms(dataset)
    if not counts.sum():
        raise ValueError("no volume gives any patch: there is nothing to train on.")
    return counts


def _spread(dataset: Any, number: SamplesPerVolume, default: int, what: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    if isinstance(number, (str, Callable)):  # type: ignore[arg-type]
        values = [_own_number(dataset, index, number, default, what) for index in range(len(dataset))]
    else:
        values = [number] * len(dataset)
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
            raise ValueError(
                f"{what}={number!r} gives {value!r} for {volume_name(dataset, index)}; expected a number of "
                "patches, 0 or more."
            )
    return np.asarray(values, np.int64)


def _own_number(dataset: Any, index: int, number: Any, default: int, what: str) -> Any:
    record = volume_record(dataset, index)
    if record is None:
        raise ValueError(
            f"{what}={number!r} is looked up in a volume's record, but {type(dataset).__name__} has no 'data' to "
            "look in. "
            "Pass a number, or a dataset that keeps its records in 'data' as MONAI's do."
        )
    if callable(number):
        try:
            return number(record)
        except Exception as error:
            raise ValueError(
                f"{what} fails for {volume_name(dataset, index)}: {type(error).__name__}: {error}. Counts must be "
                "known "
                "before an epoch, so it is called with the volume's record, as it is before loading."
            ) from error
    return record.get(number, default) if isinstance(record, Mapping) else default


def _from_transforms(dataset: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    if isinstance(dataset, GridPieces):
        return np.asarray([piece.stop - piece.first for piece in dataset.pieces], np.int64)
    if isinstance(dataset, Subset):
        return _from_transforms(dataset.dataset)[np.asarray(dataset.indices, np.int64)]
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([_from_transforms(part) for part in dataset.datasets])
    inner = getattr(dataset, "data", None)
    if not hasattr(dataset, "transform"):
        raise ValueError(
            f"{type(dataset).__name__} does not show how many patches a volume gives (it has no 'transform'): pass "
            "samples_per_volume, 1 if each item is one patch."
        )
    samplers = [t for t in _flatten(dataset.transform) if gives_a_list(t)]
    if len(samplers) > 1:
        names = " and ".join(type(t).__name__ for t in samplers)
        raise ValueError(
            f"{names} each give several samples, which would nest them: keep one of them in the transforms."
        )
    if not samplers:
        return _from_transforms(inner) if isinstance(inner, Dataset) else np.ones(len(dataset), np.int64)
    return _from_sampler(dataset, samplers[0])


def _flatten(transform: Any) -> Iterator[Any]:
    if isinstance(transform, Compose):
        for part in transform.transforms:
            yield from _flatten(part)
    else:
        yield transform


def gives_a_list(transform: Any) -> bool:
    """Whether a transform takes several patches of a volume and gives them as a list."""
    if isinstance(transform, SplitDimd):
        return bool(transform.list_output)
    return isinstance(transform, MultiSampleTrait) and not isinstance(transform, _ONE_ITEM)


def _from_sampler(dataset: Any, sampler: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    name = type(sampler).__name__
    if isinstance(sampler, GridPatchSamplesd):
        before = list(takewhile(lambda transform: transform is not sampler, _flatten(dataset.transform)))
        return np.asarray([_count_grid(dataset, index, sampler, before) for index in range(len(dataset))], np.int64)
    if isinstance(sampler, GridSplitd):
        return np.full(len(dataset), int(np.prod(sampler.splitter.grid)), np.int64)
    holder = _count_holder(sampler)
    number = getattr(holder, "num_samples", None)
    if number is None:
        raise ValueError(f"{name} does not show how many patches it gives (no 'num_samples'): pass samples_per_volume.")
    default = int(getattr(holder, "default_num_samples", 1))
    return _spread(dataset, number, default, f"{name}.num_samples")


def _count_holder(sampler: Any) -> Any:
    """What has a sampler's ``num_samples``: itself, or the array transform that it holds."""
    return sampler if hasattr(sampler, "num_samples") else getattr(sampler, "cropper", None)


def sample_count_holder(dataset: Any) -> Any:
    """The object whose ``num_samples`` decides how many patches a volume gives; ``None`` where no one number does."""
    samplers = [stage for stage in pipeline_stages(dataset).values() if gives_a_list(stage)]
    holder = _count_holder(samplers[0]) if len(samplers) == 1 else None
    number = getattr(holder, "num_samples", None)
    return holder if isinstance(number, (int, np.integer)) else None


def stages_after_sampling(dataset: Any) -> tuple[str, ...]:
    """Names of the transforms that are applied to each patch, after the one that cuts patches."""
    stages = pipeline_stages(dataset)
    names = list(stages)
    places = [place for place, stage in enumerate(stages.values()) if gives_a_list(stage)]
    return tuple(names[places[0] + 1 :]) if len(places) == 1 else ()


def storable_stages(dataset: Any) -> tuple[str, ...]:
    """Names of the transforms before the first that is random or cuts patches: those that a stored volume spares."""

    def varies(stage: Any) -> bool:
        return isinstance(stage, RandomizableTrait) or gives_a_list(stage) or not isinstance(stage, Transform)

    stages = pipeline_stages(dataset).items()
    return tuple(name for name, _ in takewhile(lambda stage: not varies(stage[1]), stages))


def file_suffix(dataset: Any) -> str:
    """How the first volume's first file ends, ``".gz"`` for instance; empty where the dataset shows no file."""
    record = volume_record(dataset, 0)
    values = record.values() if isinstance(record, Mapping) else [record]
    firsts = [value[0] if isinstance(value, (list, tuple)) and value else value for value in values]
    return next((os.path.splitext(value)[1] for value in firsts if isinstance(value, (str, os.PathLike))), "")


def _count_grid(dataset: Any, index: int, grid: GridPatchSamplesd, before: Iterable[Any]) -> int:
    try:
        return grid_patch_count(dataset, index, grid, before)
    except ValueError as error:
        raise ValueError(
            f"the number of patches that {type(grid).__name__} gives of {volume_name(dataset, index)} is not known "
            f"beforehand: {error}. Pass samples_per_volume, for instance a callable that has the shapes."
        ) from error


def grid_patch_count(dataset: Any, index: int, grid: GridPatchSamplesd, before: Iterable[Any]) -> int:
    """Number of patches that a grid has in a volume, told without loading it.

    Args:
        dataset: where the volume's record is.
        index: the volume.
        grid: cuts the patches.
        before: the transforms that the volume goes through.

    Raises:
        ValueError: where that is not known beforehand.
    """
    key = grid.keys[0]
    record = volume_record(dataset, index)
    if not isinstance(record, Mapping) or key not in record:
        raise ValueError(f"its record shows no {key!r}")
    return grid.count(spatial_shape(record[key], list(before), key))


def transforms_of(dataset: Any, index: int) -> list[Any]:
    """The transforms that a volume goes through, one after the other, those of nested datasets included.

    Raises:
        ValueError: a dataset that does not show them.
    """
    if isinstance(dataset, Subset):
        return transforms_of(dataset.dataset, int(dataset.indices[index]))
    if isinstance(dataset, ConcatDataset):
        part = bisect_right(dataset.cumulative_sizes, index)
        return transforms_of(dataset.datasets[part], index - (dataset.cumulative_sizes[part - 1] if part else 0))
    if not hasattr(dataset, "transform") or not hasattr(dataset, "data"):
        raise ValueError(f"{type(dataset).__name__} does not show its data and transforms")
    inner = dataset.data
    before = transforms_of(inner, index) if isinstance(inner, Dataset) else []
    return [*before, *(t for t in _flatten(dataset.transform) if t is not None)]
