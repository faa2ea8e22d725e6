# SPDX-License-Identifier: Apache-2.0
"""What the queue's public faces have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import Self

from ..queue.settings import LoaderSettings
from ..queue.stats import QueueStats
from ..queue.views import as_html
from .running import RunningQueue

__all__ = ["QueueFace"]


class QueueFace:
    """Statistics, state and shutdown of a queue. A copy, or what comes out of a pickle, has a queue of its own."""

    _session: RunningQueue

    def _begin(self, session: RunningQueue, start: bool) -> None:
        self.__dict__["_session"] = session
        if session.options.ram_budget is not None:
            session.probe()
        if start:
            self._session.start()

    def stats(self) -> QueueStats:
        """The queue's figures now; cheap enough for every step."""
        return self._session.stats()

    def settings(self) -> LoaderSettings:
        """What of the arguments, the pipeline and the machine decides how many patches a second there are."""
        return self._session.settings()

    def state_dict(self) -> dict[str, Any]:
        """Where the queue is, as plain Python values: all that is needed to go on with the very next batch.

        Counts what was handed out. Takes a few bytes per volume.
        """
        return self._session.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken: the next iterator begins there, whatever the number of workers.

        Only volumes with patches that are still to be drawn are prepared again.

        Raises:
            ValueError: a state of a queue with other arguments, with which its batches would be other ones.
        """
        self._session.load_state_dict(state)

    def set_epoch(self, epoch: int) -> None:
        """Name the next epoch; a sampler that has a ``set_epoch`` hears of it too."""
        self._session.set_epoch(epoch)

    def memory_bytes(self) -> int:
        """Memory of the queue: the slab and the batches in flight. Prepares one volume, which is used later."""
        return self._session.memory_bytes()

    def close(self) -> None:
        """End workers and give memory back; iterating again starts them anew."""
        self._session.stop()

    def _repr_html_(self) -> str:
        return as_html(self.stats(), repr(self))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": self._session.anew()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # torch guards some attributes of loaders against assignment
