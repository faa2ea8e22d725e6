# SPDX-License-Identifier: Apache-2.0
"""``GridPatchEvaluator``: MONAI's evaluator, fed with patches, that steps from volume to volume."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys, ensure_tuple

from ..data import GridPatchLoader
from .aggregator import PatchAggregator

__all__ = ["GridPatchEvaluator"]


class GridPatchEvaluator(SupervisedEvaluator):
    """MONAI's ``SupervisedEvaluator`` over a :class:`GridPatchLoader`: batches hold patches, iterations are volumes.

    Each iteration runs the network on batches of patches until a volume is whole, which is then the iteration's output:
    a list with one dictionary, as a decollated batch of one volume is. So postprocessing, metrics and handlers are
    those of an evaluation with ``SlidingWindowInferer``, and give the same figures.

    Args:
        device: where the network is.
        val_data_loader: the patches.
        network: gives outputs of shape [B, C, *patch].
        aggregator: puts outputs together. Default: ``PatchAggregator("gaussian")``.
        keys: which of the grid's keys are put together as well, for metrics and postprocessing. Default: all of them,
            or none where the aggregator writes files, as these are for volumes that memory may not hold.
        kwargs: the other arguments of ``SupervisedEvaluator``. ``prepare_batch`` and ``inferer`` see batches of
            patches, all else whole volumes. ``decollate`` has no effect.

    Raises:
        TypeError: a loader of another kind.

    Example:
        >>> import numpy as np
        >>> from monai.data import Dataset
        >>> from monai.handlers import MeanDice, from_engine
        >>> from monai_patchqueue import GridPatchEvaluator, GridPatchLoader, GridPatchSamplesd
        >>> item = {"image": np.random.rand(1, 20, 24).astype(np.float32)}
        >>> dataset = Dataset([{**item, "label": (item["image"] > 0).astype(np.uint8)}])
        >>> evaluator = GridPatchEvaluator(
        ...     "cpu",
        ...     GridPatchLoader(dataset, GridPatchSamplesd(["image", "label"], 16, overlap=0.5), batch_size=4),
        ...     torch.nn.Identity(),
        ...     postprocessing=lambda item: {**item, "pred": item["pred"] > 0},
        ...     key_val_metric={"dice": MeanDice(output_transform=from_engine(["pred", "label"]))},
        ... )
        >>> evaluator.run()
        >>> evaluator.state.metrics["dice"]
        1.0
    """

    def __init__(
        self,
        device: str | torch.device,
        val_data_loader: GridPatchLoader,
        network: torch.nn.Module,
        *,
        aggregator: PatchAggregator | None = None,
        keys: KeysCollection | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(val_data_loader, GridPatchLoader):
            raise TypeError(f"val_data_loader is a {type(val_data_loader).__name__}; expected a GridPatchLoader.")
        kwargs["decollate"] = False
        super().__init__(torch.device(device), _OncePerVolume(val_data_loader), network, **kwargs)
        self.aggregator = PatchAggregator("gaussian") if aggregator is None else aggregator
        if keys is None:
            keys = val_data_loader.grid.keys if self.aggregator.output_dir is None else ()
        self._others = {key: PatchAggregator("crop", meta_key=key) for key in ensure_tuple(keys)}
        self._whole: deque[dict[str, Any]] = deque()
        self.add_event_handler(Events.EPOCH_STARTED, self._clear)

    def _clear(self) -> None:
        self._whole.clear()
        for aggregator in (self.aggregator, *self._others.values()):
            aggregator.clear()

    def _iteration(self, engine: Engine, batchdata: Iterator[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """Go on to the next volume."""
        while not self._whole:
            batch = next(batchdata, None)
            if batch is None:
                self.aggregator.finish()
                raise RuntimeError("the loader's epoch ended before its last volume.")
            outputs = self.aggregator.add(self._forward(batch), batch)
            others = {
                key: aggregator.add(batch[key], batch) for key, aggregator in self._others.items() if key in batch
            }
            for number, pred in enumerate(outputs):
                parts = {key: volumes[number] for key, volumes in others.items()}
                self._whole.append({**parts, CommonKeys.PRED: pred})
        volume = self._whole.popleft()
        self.state.output = [volume]
        self.state.batch = [{key: value for key, value in volume.items() if key != CommonKeys.PRED}]
        self.fire_event(IterationEvents.FORWARD_COMPLETED)
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return self.state.output  # type: ignore[no-any-return]

    def _forward(self, batch: dict[str, Any]) -> torch.Tensor:
        """The network's outputs for a batch of patches."""
        prepared = self.prepare_batch(batch, self.state.device, self.non_blocking, **self.to_kwargs)
        inputs, args, kwargs = (prepared[0], (), {}) if len(prepared) == 2 else (prepared[0], *prepared[2:])
        if isinstance(inputs, MetaTensor):
            inputs = inputs.as_tensor()  # the patches' metadata are not the network's affair
        autocast = torch.autocast("cuda", **self.amp_kwargs) if self.amp else nullcontext()
        with self.mode(self.network), autocast:
            outputs: torch.Tensor = self.inferer(inputs, self.network, *args, **kwargs)
        return outputs


class _OncePerVolume:
    """What the engine iterates: as often as there are volumes, the epoch's one iterator over batches."""

    def __init__(self, loader: GridPatchLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader.volumes)

    def __iter__(self) -> Iterator[Iterator[dict[str, Any]]]:
        batches = iter(self.loader)
        for _ in range(len(self)):
            yield batches
