# SPDX-License-Identifier: Apache-2.0
"""How long a pipeline's transforms take, whoever's they are and wherever they run.

While a volume is prepared, each transform has a subclass of its own class, which differs only in that its calls are
timed; functions and other objects whose class cannot be exchanged are wrapped where they stand. Afterwards everything
is as it was.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from types import FunctionType
from typing import Any

from monai.transforms import Compose, OneOf, RandomOrder, SomeOf, Transform
from monai.transforms.traits import MultiSampleTrait
from torch.utils.data import Dataset, Subset

from .seeding import reachable

__all__ = ["Spent", "Stopwatch", "pipeline_stages"]

# Of these an item takes only some transforms, or takes them in another order: they are one stage.
_CHOOSING = (OneOf, RandomOrder, SomeOf)
# By this name a timed class has the original one, and a timed function what it calls.
_UNTIMED = "_patchqueue_untimed"


@dataclass
class Spent:
    """Seconds that preparing a volume took.

    Args:
        transforms: by transform, in the pipeline's order, and first, under its class's name, what the dataset itself
            took: reading from a cache, say, or resampling that a lazy pipeline had put off.
        sampling: in multi-sample transforms, whatever other transform they are part of.
    """

    transforms: dict[str, float] = field(default_factory=dict)
    sampling: float = 0.0


class _Clock(threading.local):
    """What this thread is timing."""

    def __init__(self) -> None:
        self.spent = Spent()
        self.in_stage = False
        self.in_sampler = False


_clock = _Clock()


class Stopwatch:
    """Times the transforms of a dataset's pipelines.

    Args:
        dataset: a dataset, with datasets in it perhaps.

    Example:
        >>> from monai.data import Dataset
        >>> from monai.transforms import Compose, RandFlip, ScaleIntensity
        >>> dataset = Dataset([[1.0, 2.0]], Compose([ScaleIntensity(), RandFlip(), ScaleIntensity(0, 2)]))
        >>> watch = Stopwatch(dataset)
        >>> with watch.running() as spent:
        ...     item = dataset[0]
        >>> list(spent.transforms)
        ['Dataset', 'ScaleIntensity', 'RandFlip', 'ScaleIntensity#2']
    """

    def __init__(self, dataset: Any) -> None:
        self._exchanged: list[tuple[object, type, type]] = []
        self._replaced: list[tuple[object, str, Any, Any]] = []
        self._name = _class_of(_innermost(dataset)).__name__
        stages = pipeline_stages(dataset)
        self._names = list(stages)
        unnamed = {id(obj): name for name, obj in stages.items()}
        wrapped: dict[int, Callable[..., Any]] = {}
        for obj in [*stages.values(), *_samplers(dataset, set(unnamed))]:
            name, sampler = unnamed.get(id(obj)), isinstance(obj, MultiSampleTrait)
            timed = _timed_class(_class_of(obj), name, sampler)
            if timed is not None and _exchangeable(obj, timed):
                self._exchanged.append((obj, _class_of(obj), timed))
            else:
                wrapped[id(obj)] = _timed(obj, name, sampler)
        if wrapped:
            self._replaced = list(_replacements(dataset, wrapped))

    @contextmanager
    def running(self) -> Iterator[Spent]:
        """Time what this thread does within the block. The figures are complete when it has ended."""
        spent = _clock.spent = Spent(dict.fromkeys((self._name, *self._names), 0.0))
        _clock.in_stage = _clock.in_sampler = False
        start = time.perf_counter()
        try:
            for obj, _, timed in self._exchanged:
                object.__setattr__(obj, "__class__", timed)
            for holder, attribute, _, timed in self._replaced:
                setattr(holder, attribute, timed)
            yield spent
        finally:
            for obj, cls, _ in self._exchanged:
                object.__setattr__(obj, "__class__", cls)
            for holder, attribute, original, _ in self._replaced:
                setattr(holder, attribute, original)
            spent.transforms[self._name] += time.perf_counter() - start - sum(spent.transforms.values())


def pipeline_stages(dataset: Any) -> dict[str, Any]:
    """The transforms that an item of a dataset goes through, by name, in order.

    ``Compose`` is taken apart, ``OneOf`` and its like are not. A transform's name is its class's or function's; the
    second of a name gets ``"#2"``.

    Example:
        >>> from monai.data import Dataset
        >>> from monai.transforms import Compose, RandFlip
        >>> list(pipeline_stages(Dataset([1], Compose([RandFlip(), Compose([abs, RandFlip()])]))))
        ['RandFlip', 'abs', 'RandFlip#2']
    """
    stages: dict[str, Any] = {}
    names: Counter[str] = Counter()
    members: set[int] = set()

    def is_stage(obj: object) -> bool:
        return not _is_pipeline(obj) and (id(obj) in members or isinstance(obj, Transform))

    for found in reachable(dataset, until=is_stage):
        members.update(id(part) for _, _, parts in _held(found) for part in parts)
        if is_stage(found):
            obj = _untimed(found)
            name = getattr(_underlying(obj), "__name__", None) or _class_of(obj).__name__
            names[name] += 1
            stages[name if names[name] == 1 else f"{name}#{names[name]}"] = obj
    return stages


def _is_pipeline(obj: object) -> bool:
    return isinstance(obj, Compose) and not isinstance(obj, _CHOOSING)


def _held(obj: object) -> Iterator[tuple[object, str, tuple[Any, ...]]]:
    """An object's attributes that hold transforms, with these."""
    if _is_pipeline(obj):
        yield obj, "transforms", tuple(obj.transforms)  # type: ignore[attr-defined]
    elif isinstance(obj, Dataset) and callable(getattr(obj, "transform", None)):
        yield obj, "transform", (obj.transform,)  # type: ignore[attr-defined]


def _replacements(dataset: Any, wrapped: dict[int, Callable[..., Any]]) -> Iterator[tuple[object, str, Any, Any]]:
    """Attributes with something that is to be replaced: holder, name, value, and value with the replacements."""
    for obj in reachable(dataset):
        for holder, attribute, held in _held(obj):
            parts = tuple(map(_untimed, held))
            if any(id(part) in wrapped for part in parts):
                value = getattr(holder, attribute)
                timed = tuple(wrapped.get(id(part), part) for part in parts)
                if isinstance(value, (tuple, list)):
                    yield holder, attribute, value if tuple(value) == parts else parts, timed
                else:
                    yield holder, attribute, parts[0], timed[0]


def _samplers(dataset: Any, stages: set[int]) -> Iterator[Any]:
    """Multi-sample transforms that are no stages, but part of one."""
    for obj in reachable(dataset):
        if isinstance(obj, MultiSampleTrait) and callable(obj) and id(obj) not in stages:
            yield obj


def _innermost(dataset: Any) -> Any:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def _underlying(obj: Any) -> Any:
    while isinstance(obj, partial):
        obj = obj.func
    return obj


def _untimed(obj: Any) -> Any:
    """The object itself, where another thread is timing it in its place."""
    return getattr(obj, _UNTIMED, obj) if isinstance(obj, FunctionType) else obj


def _class_of(obj: object) -> type:
    """An object's class, also while its calls are being timed."""
    cls = type(obj)
    original: type = vars(cls).get(_UNTIMED, cls)
    return original


def _exchangeable(obj: object, timed: type) -> bool:
    cls = _class_of(obj)
    try:
        object.__setattr__(obj, "__class__", timed)
        object.__setattr__(obj, "__class__", cls)
    except TypeError:  # of another layout in memory, or immutable
        return False
    return True


@cache
def _timed_class(cls: type, name: str | None, sampler: bool) -> type | None:
    """A subclass that differs only in that its calls are timed, so that ``isinstance`` and messages stay the same."""
    if not callable(getattr(cls, "__call__", None)):  # noqa: B004 (the class's own is what is called)
        return None

    def reduce(self: Any, protocol: Any) -> Any:
        timed = type(self)
        object.__setattr__(self, "__class__", cls)  # pickles and copies are of the original's class
        try:
            reduced = self.__reduce_ex__(protocol)
        finally:
            object.__setattr__(self, "__class__", timed)
        # pickle compares the class where it knows the function
        return reduced if isinstance(reduced, str) else (_make, (reduced[0], *reduced[1]), *reduced[2:])

    namespace = {
        "__call__": _timed(cls.__call__, name, sampler),
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        _UNTIMED: cls,
    }
    try:
        return type(cls.__name__, (cls,), namespace)
    except TypeError:  # a final class, or one whose subclasses need arguments
        return None


def _make(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _timed(call: Callable[..., Any], name: str | None, sampler: bool) -> Callable[..., Any]:
    """A function that times its calls, but not those within one that is being timed: transforms call each other."""

    @wraps(call, updated=())
    def timed(*args: Any, **kwargs: Any) -> Any:
        clock = _clock
        as_stage = name is not None and not clock.in_stage
        as_sampler = sampler and not clock.in_sampler
        clock.in_stage |= as_stage
        clock.in_sampler |= as_sampler
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            seconds = time.perf_counter() - start
            if as_stage and name is not None:
                clock.spent.transforms[name] = clock.spent.transforms.get(name, 0.0) + seconds
                clock.in_stage = False
            if as_sampler:
                clock.spent.sampling += seconds
                clock.in_sampler = False

    setattr(timed, _UNTIMED, call)
    return timed
