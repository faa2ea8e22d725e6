# SPDX-License-Identifier: Apache-2.0
"""Priorities of a random queue's items, from the loss that training has on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from ignite.engine import Engine, Events

__all__ = ["PriorityHandler"]


class HasPriorities(Protocol):
    """What the handler asks of a queue."""

    def update_priorities(self, ids: Any, values: Any) -> None:
        """Set items' priorities."""
        ...


class PriorityHandler:
    """Set the priorities of a batch's items in a :class:`RandomQueueDataset` from the loss on each of them.

    Attached to a trainer, it runs after each iteration, so that the next batch is drawn with the new priorities. It
    works with MONAI's trainers, which take the batch apart into items, and with any other Ignite engine.

    Args:
        queue: a ``RandomQueueDataset`` with ``priority_exponent``.
        loss_function: called with predictions and labels, each [batch, channel, *spatial]; gives the loss with a first
            dimension for the batch, as MONAI's losses do with ``reduction="none"``, over whose rest the mean is taken.
        output_transform: called with ``engine.state.output``; gives (predictions, labels), or, without a
            ``loss_function``, the loss of each item, [batch]. Default: the values under ``"pred"`` and ``"label"`` (or
            ``"loss"``) of a dictionary, or of a list with one for each item.
        epsilon: added to each loss, so that no item is left out for good.
        event: when to do so. For a MONAI trainer whose postprocessing changes predictions,
            ``monai.engines.IterationEvents.LOSS_COMPLETED``.

    Raises:
        TypeError: a queue without ``update_priorities``.

    Example:
        In a bundle::

            {"_target_": "monai_patchqueue.PriorityHandler", "queue": "@train#dataset",
             "loss_function": {"_target_": "DiceLoss", "sigmoid": true, "reduction": "none"}}

        In Python:

        >>> import torch
        >>> from ignite.engine import Engine
        >>> from monai_patchqueue import PriorityHandler, RandomQueueDataset
        >>> volumes = [{"image": torch.full((1, 8, 8), float(i))} for i in range(6)]
        >>> queue = RandomQueueDataset(volumes, num_workers=0, batch_size=2, priority_exponent=1.0, epoch_length=20)
        >>> trainer = Engine(lambda engine, batch: {"loss": batch["image"].mean(dim=(1, 2, 3))})
        >>> PriorityHandler(queue).attach(trainer)
        >>> trainer.run(queue).iteration
        20
    """

    def __init__(
        self,
        queue: HasPriorities,
        loss_function: Callable[[Any, Any], torch.Tensor] | None = None,
        output_transform: Callable[[Any], Any] | None = None,
        epsilon: float = 1e-6,
        event: Any = Events.ITERATION_COMPLETED,
    ) -> None:
        if not callable(getattr(queue, "update_priorities", None)):
            raise TypeError(f"queue is a {type(queue).__name__}; expected a RandomQueueDataset.")
        self.queue = queue
        self.loss_function = loss_function
        self.output_transform = output_transform or (_predictions if loss_function is not None else _losses)
        self.epsilon = epsilon
        self.event = event

    def attach(self, engine: Engine) -> None:
        """Register the handler; attaching it twice to an engine is the same as once.

        Args:
            engine: the engine that draws from the queue, as a rule a trainer.
        """
        if not engine.has_event_handler(self.update, self.event):
            engine.add_event_handler(self.event, self.update)

    def update(self, engine: Engine) -> None:
        """Set the priorities of the items of ``engine.state.batch``.

        Args:
            engine: the engine.

        Raises:
            KeyError: a batch without ``"item_id"``.
            ValueError: a loss that is not one number for each item.
        """
        ids = _values(engine.state.batch, "item_id")
        output = self.output_transform(engine.state.output)
        with torch.no_grad():
            losses = torch.as_tensor(output if self.loss_function is None else self.loss_function(*output))
        if not losses.ndim or len(losses) != len(ids):
            raise ValueError(
                f"the loss has shape {list(losses.shape)} for a batch of {len(ids)} items: expected one value each, "
                "as a loss with reduction='none' gives."
            )
        each = losses.detach().to(torch.float64).reshape(len(losses), -1).mean(dim=1)
        self.queue.update_priorities(ids, each.abs() + self.epsilon)


def _values(content: Any, key: str) -> torch.Tensor:
    """What is under a key, of a batch or of its items."""
    items = content if isinstance(content, (list, tuple)) else [content]
    for item in items:
        if not isinstance(item, dict) or key not in item:
            found = sorted(map(str, item)) if isinstance(item, dict) else type(item).__name__
            raise KeyError(f"no {key!r} in {found}: pass output_transform, or priority_exponent to the queue.")
    if isinstance(content, (list, tuple)):
        return torch.stack([torch.as_tensor(item[key]) for item in content])
    return torch.as_tensor(content[key])


def _predictions(output: Any) -> Iterable[torch.Tensor]:
    return _values(output, "pred"), _values(output, "label")


def _losses(output: Any) -> torch.Tensor:
    return _values(output, "loss")
