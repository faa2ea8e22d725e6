# SPDX-License-Identifier: Apache-2.0
"""Random state: found wherever a pipeline keeps it, and set from (seed, what it is for) alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType

import numpy as np
import torch
from monai.transforms import Randomizable

__all__ = ["Reseeder", "global_random_state", "reachable"]

# A longer container is looked into only if its first element may lead to random state: data lists hold thousands of
# plain records.
_LONG = 256
_LEAVES = (str, bytes, bytearray, int, float, complex, bool, type(None), type, ModuleType, np.ndarray, np.generic,
           torch.Tensor, torch.dtype, torch.device, slice, range)  # fmt: skip


def reachable(root: object, until: Callable[[object], bool] = lambda obj: False) -> Iterator[object]:
    """The objects of a pipeline, each once: through attributes, containers, closures, partials and nested datasets.

    Arrays and long lists of plain records are not looked into, nor are objects for which ``until`` holds.
    """
    seen: set[int] = set()
    stack = [root]
    while stack:
        obj = stack.pop()
        if isinstance(obj, _LEAVES) or id(obj) in seen:
            continue
        seen.add(id(obj))
        yield obj
        if not until(obj):
            stack.extend(reversed(list(_children(obj))))


def _children(obj: object) -> Iterator[object]:
    if isinstance(obj, Mapping):
        yield from _worth_a_look(list(obj.values()))
    elif isinstance(obj, (list, tuple, set, frozenset)):
        yield from _worth_a_look(list(obj))
    elif isinstance(obj, MethodType):
        yield obj.__self__
        yield obj.__func__
    elif isinstance(obj, FunctionType):
        for cell in obj.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a name that isn't bound yet
                continue
        yield from obj.__defaults__ or ()
    elif isinstance(obj, partial):
        yield obj.func
        yield from obj.args
        yield from obj.keywords.values()
    if not isinstance(obj, FunctionType):
        yield from getattr(obj, "__dict__", {}).values()


def _worth_a_look(values: list[object]) -> list[object]:
    if len(values) > _LONG and _is_plain(values[0]):
        return []
    return values


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    return isinstance(value, (*_LEAVES, np.random.RandomState)) or type(value).__module__ == "pathlib"


class Reseeder:
    """Sets the random state of everything random in a pipeline.

    MONAI's ``Randomizable`` objects share one ``RandomState`` per call; generators that objects hold of their own
    (``numpy.random.Generator`` and ``RandomState``, ``random.Random``, ``torch.Generator``) are set each.

    Args:
        roots: where to look, for instance a dataset and a transform.

    Example:
        >>> from monai.transforms import Compose, RandFlip
        >>> from monai_patchqueue.queue.schedule import seed_sequence
        >>> flip = RandFlip(prob=0.5)
        >>> reseed = Reseeder(Compose([flip]))
        >>> reseed(seed_sequence(0, 1)); first = flip.R.rand()
        >>> reseed(seed_sequence(0, 1)); first == flip.R.rand()
        True
    """

    def __init__(self, *roots: object) -> None:
        self._randomizables: list[Randomizable] = []
        self._setters: list[Callable[[np.random.SeedSequence], None]] = []
        monai_states = set()
        found = [obj for root in roots for obj in reachable(root)]
        for obj in found:
            if isinstance(obj, Randomizable) and not any(obj is other for other in self._randomizables):
                self._randomizables.append(obj)
                monai_states.add(id(obj.R))
        for obj in found:
            setter = None if id(obj) in monai_states else _setter(obj)
            if setter is not None:
                self._setters.append(setter)

    def __call__(self, sequence: np.random.SeedSequence) -> None:
        """Set all random state from ``sequence``."""
        if self._randomizables:
            state = np.random.RandomState(np.random.Philox(sequence))
            for randomizable in self._randomizables:
                randomizable.R = state
        for setter, child in zip(self._setters, sequence.spawn(len(self._setters)), strict=True):
            setter(child)


def _setter(obj: object) -> Callable[[np.random.SeedSequence], None] | None:
    if isinstance(obj, np.random.Generator):
        kind = type(obj.bit_generator)
        return lambda sequence: setattr(obj.bit_generator, "state", kind(sequence).state)
    if isinstance(obj, np.random.RandomState):
        return lambda sequence: obj.seed(sequence.generate_state(4))
    if isinstance(obj, random.Random):
        return lambda sequence: obj.seed(_integer(sequence))
    if isinstance(obj, torch.Generator):

        def set_torch(sequence: np.random.SeedSequence) -> None:
            obj.manual_seed(_integer(sequence))

        return set_torch
    return None


def _integer(sequence: np.random.SeedSequence) -> int:
    return int(sequence.generate_state(1, np.uint64)[0])


def seed_globals(sequence: np.random.SeedSequence) -> None:
    """Seed the global generators of Python, numpy and torch (CPU)."""
    python, numpy, torch_seed = sequence.generate_state(3).tolist()
    random.seed(python)
    np.random.seed(numpy)  # noqa: NPY002 (the global generator is what is meant)
    torch.default_generator.manual_seed(torch_seed)


@contextmanager
def global_random_state(sequence: np.random.SeedSequence) -> Iterator[None]:
    """Run a block with the global generators seeded, and restore the caller's state."""
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        seed_globals(sequence)
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])  # noqa: NPY002
        torch.set_rng_state(saved[2])
