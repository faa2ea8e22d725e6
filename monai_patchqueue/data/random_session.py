# SPDX-License-Identifier: Apache-2.0
"""What stands behind a random queue: filling it, drawing from it without end, and stopping and going on."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..queue.epoch import DrawnPatch
from ..queue.laps import Laps
from ..queue.random_schedule import RandomDraws, RandomPlan, Residents, ReusePolicy
from ..queue.ranks import ranks
from ..queue.runner import Runner
from ..queue.schedule import Ticket
from ..queue.settings import LoaderSettings
from ..queue.worker import PreparedVolume
from .launch import launch
from .options import QueueOptions
from .running import BatchIterator, RunningQueue
from .sizing import Sizing

__all__ = ["RandomOptions", "RandomSession"]

logger = logging.getLogger(__name__)

_VERSION = 1
# Draws of an item that no other has to come for.
_WITHOUT_LIMIT = 1e9


@dataclass(frozen=True)
class RandomOptions:
    """The arguments of a random queue that others don't have, checked.

    Args:
        policy: how often items are drawn.
        epoch_length: batches in an epoch.
        item_nbytes: bytes of an item, where that is given.
        wait_fill: items to wait for before the first batch; ``None``: a full queue.
        wait_fill_timeout: seconds to wait for them.
        log_sampling: log how evenly items were drawn at the end of each epoch.
    """

    policy: ReusePolicy
    epoch_length: int
    item_nbytes: int | None
    wait_fill: int | None
    wait_fill_timeout: float
    log_sampling: bool

    @property
    def least(self) -> int:
        """Items without which there is no batch."""
        return max(self.policy.batch_size, self.policy.min_size_to_sample)


class RandomSession(RunningQueue):
    """Runs a random queue; its epochs are parts of one stream of batches."""

    def __init__(self, options: QueueOptions, random: RandomOptions) -> None:
        items = -(-int(options.counts.sum()) // ranks()[1])
        super().__init__(options, replace(Sizing.of(options), patches=items, item_nbytes=random.item_nbytes))
        self._random = random
        self._length = self._sizing.wished_length
        self._drawn = 0  # batches handed out, of all epochs
        self._start: Residents | None = None
        self._opened = False
        self._resumed = False  # the next iterator goes on in the epoch under way
        self._asked = 0  # items that wait_fill_queue was asked for before the first batch
        if items < random.least:
            raise ValueError(
                f"data gives {items} items to draw from{' on this rank' if ranks()[1] > 1 else ''}, and a batch needs "
                f"{random.least} (batch_size={options.batch_size}, "
                f"min_size_to_sample={random.policy.min_size_to_sample}): no item comes twice in a batch. Lower it, or "
                "add data."
            )

    def anew(self) -> RandomSession:
        return RandomSession(self.options, self._random)

    def __reduce__(self) -> tuple[Any, ...]:
        return RandomSession, (self.options, self._random)

    def __len__(self) -> int:
        return self._random.epoch_length

    def describe(self) -> str:
        """What a ``repr`` shows."""
        stats = self.stats()
        mode = "always" if self._random.policy.always else "onsample"
        length = stats.queue_length or "?"
        return f"items={self._sizing.patches}, mode={mode!r}, qsize={self.qsize}/{length}, drawn={stats.patches}"

    def settings(self) -> LoaderSettings:
        policy = self._random.policy
        reuse = policy.samples_per_insert or (_WITHOUT_LIMIT if policy.always else policy.batch_size)
        return replace(super().settings(), repeats=reuse)

    # -- filling

    @property
    def qsize(self) -> int:
        """Items that are there."""
        draws = self._draws
        return draws.available if draws is not None else 0

    def _ready(self) -> int:
        return self.qsize

    @property
    def _draws(self) -> RandomDraws | None:
        drawing = self._runner.queue.drawing if self._runner else None
        return drawing if isinstance(drawing, RandomDraws) else None

    def start(self) -> Runner:
        if self._sizing.length is None and self._runner is None:
            self._length = self._sizing.queue_length(self.probe().patch_nbytes)
        runner = super().start()
        if not self._opened:
            runner.open(self._plan_ahead(), _nothing, self._start.batches if self._start else 0)
            self._opened = True
        return runner

    def stop(self) -> None:
        if self._opened:
            self._start = self._residents()
        self._opened = False
        super().stop()

    def _launch(self, prepared: tuple[Ticket, PreparedVolume] | None) -> tuple[Runner, weakref.finalize[..., Any]]:
        prioritized = self._random.policy.priority_exponent is not None
        return launch(
            self,
            self.options,
            self._sizing,
            seed=self.seed,
            recorder=self._recorder,
            prepared=prepared,
            keep_misfits=True,
            annotate=_annotate if prioritized else None,
        )

    def _plan_ahead(self) -> RandomPlan:
        rank, replicas = ranks()
        counts = self.options.counts
        # No volume is in the queue twice. One that begins to leave may have patches there when the next one begins.
        volumes = -(-self._length // int(counts[counts > 0].min())) + int(counts.max() > 1)
        laps = Laps(self.seed, counts.tolist(), rank, replicas, apart=volumes * replicas)
        return RandomPlan(self.seed, laps, max(self._random.least, 1), self._random.policy, self._start)

    def wait_fill(self, items: int | None, timeout: float) -> int:
        """Wait for so many items, or for a full queue; how many there are.

        Raises:
            RuntimeError: too few for a batch within ``timeout`` seconds.
        """
        runner = self.start()
        if not runner.wait_until(lambda: self._is_filled(items), timeout):
            self._report(items, timeout)
        self._check_length()
        draws = self._draws
        if draws is not None and draws.fill is None:
            self._asked = max(self._asked, min(items or draws.plan.queue_length, draws.available))
        return self.qsize

    def _is_filled(self, items: int | None) -> bool:
        draws = self._draws
        if draws is None:
            return False
        length = draws.plan.queue_length
        return draws.available >= (length if items is None else min(items, length)) or length < self._random.least

    def _begin_draws(self, runner: Runner) -> None:
        """Fill the queue before the first batch."""
        draws = self._draws
        if draws is not None and draws.fill is not None:
            return
        if self._start is not None and not self._random.policy.always:
            # It goes on with the items that it had, and waits for those that it draws.
            runner.wait_until(lambda: self._draws is not None, threading.TIMEOUT_MAX)
            return
        least, wished = self._random.least, self._random.wait_fill
        target = wished if wished is None else max(wished, least, self._asked)
        if wished != 0:
            self.wait_fill(target, self._random.wait_fill_timeout)
        else:
            runner.wait_until(lambda: self._draws is not None, threading.TIMEOUT_MAX)
            self._check_length()
        draws = self._draws
        if draws is None:
            raise RuntimeError("the queue was closed while it was filled.")
        length = draws.plan.queue_length
        target = length if target is None else min(target, length)
        draws.begin(target if wished == 0 else min(target, draws.available))
        runner.wake()

    def _check_length(self) -> None:
        draws = self._draws
        if draws is not None and draws.plan.queue_length < self._random.least:
            raise ValueError(
                f"the memory allows a queue of {draws.plan.queue_length} items, and a batch needs "
                f"{self._random.least}: raise ram_budget, or lower batch_size, min_size_to_sample or the size of items."
            )

    def _report(self, items: int | None, timeout: float) -> None:
        stats, draws = self.stats(), self._draws
        wished = self._length if items is None else items
        seconds = stats.load_seconds + stats.sample_seconds + stats.write_seconds
        workers = max(stats.num_workers, 1)
        if stats.volumes:
            why = f"{workers} worker{'s' * (workers > 1)} took {seconds:.3g} s for each of {stats.volumes} volumes"
        else:
            why = f"no volume was prepared in that time by {workers} worker{'s' * (workers > 1)}"
        text = f"{self.qsize} of {wished} items are in the queue after {timeout:g} s: {why}."
        if draws is None or draws.available < self._random.least:
            raise RuntimeError(
                f"{text} A batch needs {self._random.least}. Raise wait_fill_timeout or num_workers, or make loading "
                "faster."
            )
        warnings.warn(
            f"{text} It goes on with these. Raise wait_fill_timeout or num_workers, or lower wait_fill.", stacklevel=2
        )

    # -- drawing

    def iterate(self) -> Iterator[Any]:
        self.start()
        if self.batches and not self._resumed:
            self.epoch, self.batches = self.epoch + 1, 0
        self._resumed = False
        self._recorder.opened(0, 0, self.options.counts)
        self._iterators += 1
        self._fresh = True
        return BatchIterator(self, self._iterators)

    def endless(self) -> Iterator[Any]:
        """Batches without end."""
        while True:
            yield from self.iterate()

    def next_batch(self, iterator: int) -> Any:
        runner = self._runner_for(iterator)
        if self.batches >= len(self):
            if self._random.log_sampling:
                self._log_sampling()
            raise StopIteration
        requested = self._recorder.requested(first=self._fresh)
        try:
            self._begin_draws(runner)
            if self._random.policy.on_demand and self._draws is not None:
                self._draws.allow(self._drawn + 1)
                runner.wake()
            batch = runner.next(self.options.timeout)
        except TimeoutError:
            raise
        except BaseException:
            self.stop()  # the next iterator starts workers that know nothing of what went wrong
            raise
        if batch is None:
            raise RuntimeError("a random queue has come to an end.")
        self._drawn += 1
        return self._hand_out(batch, requested)

    def update_priorities(self, items: Iterable[int], values: Iterable[float]) -> None:
        """Set items' priorities, from the next batch on."""
        draws = self._draws
        if self._random.policy.priority_exponent is None:
            raise RuntimeError("draws are uniform: pass priority_exponent to draw by priorities.")
        if draws is not None:
            draws.update_priorities(items, values)

    def _log_sampling(self) -> None:
        counts = self.stats().volume_counts
        of_all = np.array([counts.get(volume, 0) for volume in np.flatnonzero(self.options.counts).tolist()])
        logger.info(
            "epoch %d: drawn so far %d to %d times, %.1f ± %.1f on average, from each of %d volumes",
            self.epoch,
            of_all.min(),
            of_all.max(),
            of_all.mean(),
            of_all.std(),
            len(of_all),
        )

    # -- state

    def _residents(self) -> Residents | None:
        draws = self._draws
        if draws is None or draws.fill is None:
            return self._start
        batches = draws.batches if draws.plan.policy.on_demand else self._drawn
        self._drawn = batches
        return draws.residents(batches)

    def state_dict(self) -> dict[str, Any]:
        residents = self._residents()
        over = self.batches == len(self)
        return {
            "version": _VERSION,
            "epoch": self.epoch + over,
            "batches": 0 if over else self.batches,
            "rank": ranks()[0],
            "residents": None if residents is None else residents.as_dict(),
            "decisive": self._decisive(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping) or "residents" not in state:
            raise ValueError(f"this is not the state of a random queue: {state!r:.100}")
        if state["version"] != _VERSION:
            raise ValueError(
                f"the state has version {state['version']}; this release of monai_patchqueue reads {_VERSION}."
            )
        own, decisive = self._decisive(), dict(state["decisive"])
        if self.options.seed is None:
            own["seed"] = decisive["seed"]
        if self.options.queue_length is None:
            own["queue_length"] = decisive["queue_length"]
        for name, value in own.items():
            if decisive.get(name) != value:
                raise ValueError(
                    f"the state was taken with {name}={decisive.get(name)!r}, and this queue has {value!r}: its "
                    f"batches would not go on where the state's end. Make it with {name}={decisive.get(name)!r}."
                )
        residents = None if state["residents"] is None else Residents.from_dict(state["residents"])
        if residents is not None and residents.times and state["rank"] != ranks()[0]:
            raise ValueError(
                f"the state was taken on rank {state['rank']}, and holds its items; this is rank {ranks()[0]}. Save a "
                "checkpoint on each rank, and load each rank's own."
            )
        self._opened = False
        self.stop()
        self.seed = decisive["seed"]
        if self.options.queue_length is None and decisive["queue_length"]:
            self._sizing = replace(self._sizing, length=decisive["queue_length"], budget=None)
        self._length = self._sizing.wished_length
        self._prepared = None
        self._start = residents
        self._drawn = residents.batches if residents else 0
        self.epoch, self.batches = int(state["epoch"]), int(state["batches"])
        self._resumed = True
        self._iterators += 1

    def _decisive(self) -> dict[str, Any]:
        draws, policy = self._draws, self._random.policy
        return {
            "seed": self.seed,
            "items": int(self.options.counts.sum()),
            "replicas": ranks()[1],
            "mode": "always" if policy.always else "onsample",
            "batch_size": policy.batch_size,
            "queue_length": draws.plan.queue_length if draws else self.options.queue_length,
            "samples_per_insert": policy.samples_per_insert,
            "min_size_to_sample": policy.min_size_to_sample,
            "max_times_sampled": policy.max_times_sampled,
            "priority_exponent": policy.priority_exponent,
        }

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.batches = int(epoch), 0


def _annotate(patches: Sequence[DrawnPatch]) -> dict[str, torch.Tensor]:
    return {
        "item_id": torch.tensor([patch.draw.item for patch in patches]),
        "importance_weight": torch.tensor([patch.draw.weight for patch in patches], dtype=torch.float32),
    }


def _nothing() -> None:
    """No plan for a following epoch."""
