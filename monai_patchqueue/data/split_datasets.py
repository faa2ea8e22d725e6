# SPDX-License-Identifier: Apache-2.0
"""The datasets of a split: its databases, loaded and transformed, in memory if asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from monai.data import CacheDataset, Dataset
from monai.transforms import Compose, Transform
from monai.transforms.traits import RandomizableTrait
from monai.utils import ensure_tuple
from torch.utils.data import ConcatDataset

from .splits import SplitPart
from .volumes import record_name

__all__ = ["PartPipeline", "SplitDatasets", "Transforms", "explained"]

Transforms = Callable[[Any], Any] | Sequence[Callable[[Any], Any]]


class PartPipeline:
    """Makes the transform of each part of a split.

    Args:
        model_transforms: what the model asks of any sample; applied after the part's loader.
        train_transforms: crops and augmentation; applied last, to training alone.

    Raises:
        TypeError: what is no transform and no sequence of them.
    """

    def __init__(self, model_transforms: Transforms, train_transforms: Transforms) -> None:
        self.model_transforms = _callables("model_transforms", model_transforms)
        self.train_transforms = _callables("train_transforms", train_transforms)
        self._made: dict[tuple[str, int], Compose] = {}

    def __call__(self, part: SplitPart) -> Compose:
        """The part's loader and what follows it, as one transform with the loader's own settings."""
        key = part.split, part.database
        if key not in self._made:  # once, as making a Compose sets its transforms' random state
            self._made[key] = self._compose(part)
        return self._made[key]

    def _compose(self, part: SplitPart) -> Compose:
        first = _loading(part.loader)
        shared = Compose([*first.transforms, *self.model_transforms]).flatten().transforms
        steps = [*map(_Deterministic.unless_known, shared)]
        if part.split == "train":
            steps += self.train_transforms
        return Compose(
            steps,
            map_items=first.map_items,
            unpack_items=first.unpack_items,
            log_stats=first.log_stats,
            lazy=first.lazy,
            overrides=first.overrides,
        ).flatten()


class _Deterministic(Transform):
    """A function that is no MONAI transform, taken to give the same for the same input, and so to be cached."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, data: Any) -> Any:
        return self.function(data)

    def __repr__(self) -> str:
        return f"{getattr(self.function, '__name__', type(self.function).__name__)}()"

    @staticmethod
    def unless_known(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return function if isinstance(function, (Transform, RandomizableTrait)) else _Deterministic(function)


def explained(error: BaseException) -> str:
    """What an error says, and its causes: MONAI's errors say which transform failed, and their causes why."""
    text = f"{type(error).__name__}: {error}"
    return text if error.__cause__ is None else f"{text}; {explained(error.__cause__)}"


def _loading(loader: Any) -> Compose:
    if type(loader) is Compose:
        return loader.flatten()
    if isinstance(loader, (list, tuple)):
        return Compose(loader).flatten()
    return Compose([loader if callable(loader) else loader.sample])


def _callables(name: str, transforms: Transforms) -> tuple[Callable[[Any], Any], ...]:
    steps: tuple[Any, ...] = ensure_tuple(transforms)
    for step in steps:
        if not callable(step):
            raise TypeError(f"{name} has a {type(step).__name__}; expected a transform, or a sequence of them.")
    return steps


class SplitDatasets:
    """Datasets of splits, made when they are asked for, and kept until they are dropped.

    Args:
        splits: parts of each split by its name.
        pipeline: makes the parts' transforms.
        cached: load each volume once, up to the first random transform, and keep it.
        progress: show a bar meanwhile.
    """

    def __init__(
        self, splits: Mapping[str, Sequence[SplitPart]], pipeline: PartPipeline, cached: bool, progress: bool
    ) -> None:
        self.splits = splits
        self.pipeline = pipeline
        self.cached = cached
        self.progress = progress
        self._made: dict[str, ConcatDataset[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}  # another process makes its own

    def uncached(self, name: str) -> ConcatDataset[Any]:
        """A split's dataset that loads each volume whenever it is asked for."""
        return ConcatDataset([Dataset(part.samples, self.pipeline(part)) for part in self.splits[name]])

    def get(self, name: str, num_workers: int) -> ConcatDataset[Any]:
        """A split's dataset.

        Args:
            name: the split's.
            num_workers: threads that fill its cache.

        Raises:
            RuntimeError: a volume that cannot be loaded into the cache; the message names it.
        """
        if name not in self._made:
            caches = [
                _PartCache(part, self.pipeline(part), num_workers, self.progress)
                for part in self.splits[name]
                if self.cached
            ]
            self._made[name] = ConcatDataset(caches) if caches else self.uncached(name)
        return self._made[name]

    def drop(self, *names: str) -> None:
        """Give splits' caches back, whoever still holds their datasets: these load what they are asked for then."""
        made = [self._made.pop(name) for name in names if name in self._made]
        for cache in (part for dataset in made for part in dataset.datasets):
            if isinstance(cache, CacheDataset):
                cache.set_num = 0
                cache.set_data(cache.data)


class _PartCache(CacheDataset):
    """A ``CacheDataset`` that names the volume that fails."""

    def __init__(self, part: SplitPart, transform: Compose, num_workers: int, progress: bool) -> None:
        self.part = part
        super().__init__(part.samples, transform, num_workers=max(num_workers, 1), progress=progress)

    def _load_cache_item(self, idx: int) -> Any:
        try:
            return super()._load_cache_item(idx)
        except Exception as error:
            name = record_name(self.data[idx], idx)
            raise RuntimeError(f"{self.part}, {name} cannot be loaded: {explained(error)}") from error
