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
        order: the epoch's order of volumes; empty where its sampler is still to be asked.
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
    replaced: tuple[tuple[int, int], ...] = ()
    generators: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, which ``torch.load(weights_only=True)`` takes."""
        return {
            "version": _VERSION,
            "epoch": self.epoch,
            "batches": self.batches,
            "order": list(self.order),
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
            int(state["epoch"]),
            int(state["batches"]),
            tuple(state["order"]),
            tuple((int(entry), int(attempts)) for entry, attempts in state["replaced"]),
            dict(state["generators"]),
        )
