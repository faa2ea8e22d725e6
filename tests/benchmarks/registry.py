# SPDX-License-Identifier: Apache-2.0
"""What a contestant is, and the list of all of them.

A contestant is one function from a :class:`Setup` to an iterable of batches, once per epoch. All batches are dicts with
``image`` and ``label`` of shape ``[n, 1, *patch]``. Imports are inside the functions, so that a contestant's process
holds only what this contestant needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from .setup import Setup

Batches = Iterable[Mapping[str, Any]]
Build = Callable[[Setup], Batches]


@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Args:
        name: as on the command line.
        title: as in the table.
        build: gives the loader; called in a fresh process, its time counts for the first batch.
        requires: module that has to be there.
        remedy: what to install where it isn't.
        imports: what else is imported before the clock starts.
        layout: how to find patches in a batch, ``"monai"`` or ``"torchio"``; ``None`` where batches don't say what they
            were cut from, so that there is nothing to compare.
        read: the consumer reads every voxel; not so for a limit that is the bare work.
        prepare: what is to be done once beforehand, not timed, such as writing a store.
    """

    name: str
    title: str
    build: Build
    requires: str = "monai"
    remedy: str | None = None
    imports: tuple[str, ...] = ()
    layout: str | None = "monai"
    read: bool = True
    prepare: Callable[[Setup], Any] | None = None

    @property
    def is_limit(self) -> bool:
        return self.name.startswith("limit")

    @property
    def missing(self) -> bool:
        return find_spec(self.requires) is None


CONTESTANTS: dict[str, Contestant] = {}


def contestant(name: str, title: str, **options: Any) -> Callable[[Build], Build]:
    """Register a function under `name`."""

    def register(build: Build) -> Build:
        CONTESTANTS[name] = Contestant(name, title, build, **options)
        return build

    return register
