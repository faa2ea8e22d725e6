# SPDX-License-Identifier: Apache-2.0
"""Figures that ranks tell each other, without a collective: nobody waits for a rank that has no handler."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch.distributed as dist

__all__ = ["RankExchange"]


class RankExchange:
    """A board at which each rank pins a note an epoch, in the key-value store of torch's process group.

    Ranks that join say so beforehand, so only these are waited for, and no longer than ``patience`` seconds: a handler
    that some ranks lack must not stop the others.

    Args:
        name: of the board.
        patience: seconds to wait for other ranks' notes.
    """

    def __init__(self, name: str, patience: float = 10.0) -> None:
        self._name = name
        self._patience = timedelta(seconds=patience)
        self._runs = 0
        self._notes = 0

    def join(self) -> None:
        """Say that this rank takes part in the run that begins."""
        self._runs += 1
        self._notes = 0
        if _grouped():
            _store().set(self._key("joined", dist.get_rank()), "1")

    def exchange(self, note: dict[str, Any]) -> list[dict[str, Any]]:
        """Pin a note, and read those of all ranks that take part.

        Args:
            note: what JSON can hold.

        Returns:
            The notes by rank; an empty list without a process group of several ranks, or where a rank is not heard of.
        """
        if not _grouped():
            return []
        store, own = _store(), dist.get_rank()
        self._notes += 1
        store.set(self._key(f"note_{self._notes}", own), json.dumps(note))
        if self._notes > 2:  # all have read it: they have pinned the one after it since
            store.delete_key(self._key(f"note_{self._notes - 2}", own))
        joined = [rank for rank in range(dist.get_world_size()) if store.check([self._key("joined", rank)])]
        keys = [self._key(f"note_{self._notes}", rank) for rank in joined]
        try:
            store.wait(keys, self._patience)
        except RuntimeError:  # some rank ended early, or is far behind
            return []
        return [json.loads(store.get(key)) for key in keys]

    def _key(self, what: str, rank: int) -> str:
        return f"monai_patchqueue/{self._name}/{self._runs}/{what}/{rank}"


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
