# SPDX-License-Identifier: Apache-2.0
"""A place in a run, to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Position"]

_VERSION = 1


@dataclass(frozen=True)
class Position:
    """After so many batches of an epoch.

    Args:
        epoch: number of the epoch.
        batches: batches of it that were handed out.
        order: the epoch's order of volumes; empty where its sampler gives it again.
        sampler_epoch: the sampler's own epoch number, where it has one and the epoch has begun.
        rank: the process of a distributed run.
        replaced: entries of the order whose volume failed, with the number of replacements tried.
        generators: states of the sampler's own generators, by attribute.

    Example:
        >>> position = Position(epoch=2, batches=3, order=(1, 0))
        >>> Position.from_dict(position.as_dict()) == position
        True
    """

    epoch: int
    batches: int
    order: tuple[int, ...] = ()
    sampler_epoch: int | None = None
    rank: int = 0
    replaced: tuple[tuple[int, int], ...] = ()
    generators: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, which ``torch.load(weights_only=True)`` takes."""
        return {
            "version": _VERSION,
            "epoch": self.epoch,
            "batches": self.batches,
            "order": list(self.order),
            "sampler_epoch": self.sampler_epoch,
            "rank": self.rank,
            "replaced": [list(pair) for pair in self.replaced],
            "generators": dict(self.generators),
        }

    @staticmethod
    def from_dict(state: Mapping[str, Any]) -> Position:
        """The position that :meth:`as_dict` gave.

        Raises:
            ValueError: something that is no such state.
        """
        if not isinstance(state, Mapping) or "version" not in state:
            raise ValueError(f"this is not the state of a patch queue: {state!r:.100}")
        if state["version"] != _VERSION:
            raise ValueError(
                f"the state has version {state['version']}; this release of monai_patchqueue reads {_VERSION}."
            )
        return Position(
            epoch=int(state["epoch"]),
            batches=int(state["batches"]),
            order=tuple(state["order"]),
            sampler_epoch=state["sampler_epoch"],
            rank=int(state["rank"]),
            replaced=tuple((int(entry), int(attempts)) for entry, attempts in state["replaced"]),
            generators=dict(state["generators"]),
        )

    @property
    def is_of_its_rank_alone(self) -> bool:
        """Whether another rank could not go on from here."""
        return bool(self.order or self.replaced or self.generators)
