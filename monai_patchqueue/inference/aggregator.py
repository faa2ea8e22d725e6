# SPDX-License-Identifier: Apache-2.0
"""``PatchAggregator``: whole volumes out of a network's outputs for their patches."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Activations, AsDiscrete
from monai.utils import ImageMetaKey, MetaKeys, TraceKeys

from ..data.grid_pieces import GRID_PATCH
from ..sampling import PatchGrid
from ..transforms import GridPatchSamples
from ..transforms._meta import PATCH_META
from .outputs import FORMATS, MemoryOutput, Output
from .rows import BlendedRows
from .weights import MODES, blend_weights

__all__ = ["PatchAggregator"]

# A channel more than these dtypes can number goes to the next one.
_LABEL_DTYPES = ((256, torch.uint8), (32768, torch.int16))


@dataclass
class _VolumeUnderWay:
    name: str
    rows: BlendedRows
    meta: dict[Any, Any]
    operations: list[Any]
    file: Path | None
    output: Output | None = None


class PatchAggregator:
    """Puts outputs for the patches of a :class:`GridPatchLoader` together, and gives back each volume when it is whole.

    Where patches overlap, outputs are averaged with weights. The volumes are MetaTensors with the affine, the metadata
    and the applied operations that the volume had before its patches were taken, so that ``Invertd`` and ``SaveImaged``
    go on as after ``SlidingWindowInferer``; what was padded is cut off.

    Rows are finished (divided by their weights, turned into labels) as soon as all of their patches have come: sums are
    held for no more rows than a patch is high. With ``argmax=True`` or with files as output, memory does not grow with
    the number of channels times the volume.

    Args:
        mode: weights of a patch's voxels. ``"constant"`` (also ``"average"``): all the same; ``"gaussian"``: as MONAI's
            ``SlidingWindowInferer``; ``"hann"``: as TorchIO's ``GridAggregator``; ``"crop"``: no average, each voxel
            from the one patch in whose middle it lies, in the dtype that it has. For labels.
        sigma_scale: standard deviation of the Gaussian, as a fraction of the patch.
        activation: applied to each batch of outputs before they are averaged: ``"softmax"``, ``"sigmoid"``, or a
            callable from and to a tensor of shape [B, C, *patch]. ``None``: outputs are averaged as they are (logits).
        argmax: give label maps: the channel with the largest value.
        threshold: give masks: 1 where a channel's value is at least that.
        dtype: of the volumes. Default: float32 (or float64, where the outputs are that); label maps and masks uint8;
            with ``"crop"``, that of the outputs.
        device: where sums are made, and where volumes in memory lie.
        output_dir: write volumes to files in this folder instead of memory. Names begin with the volume's number.
        output_format: ``"npy"`` or ``"nii"`` (NIfTI, with the affine): uncompressed files that are mapped into memory,
            and given back as MetaTensors over them; ``"zarr"``: arrays given back as :class:`LazyMetaTensor` (needs
            the extra ``zarr``).
        meta_key: key of the batch that has the volumes' metadata.

    Raises:
        ValueError: arguments that are none of these, or exclude each other.

    Example:
        >>> import numpy as np
        >>> from monai.data import Dataset
        >>> from monai_patchqueue import GridPatchLoader, GridPatchSamplesd, PatchAggregator
        >>> dataset = Dataset([{"image": np.random.rand(1, 30, 20).astype(np.float32)}])
        >>> loader = GridPatchLoader(dataset, GridPatchSamplesd("image", 16, overlap=4), batch_size=2)
        >>> aggregator = PatchAggregator("hann", argmax=True)
        >>> for batch in loader:
        ...     logits = torch.cat([0.5 - batch["image"], batch["image"] - 0.5], dim=1)
        ...     volumes = aggregator.add(logits, batch)
        >>> bool((volumes[0].numpy() == (dataset[0]["image"] > 0.5)).all()), volumes[0].dtype
        (True, torch.uint8)
    """

    def __init__(
        self,
        mode: str = "constant",
        *,
        sigma_scale: float | Sequence[float] = 0.125,
        activation: str | Callable[[torch.Tensor], torch.Tensor] | None = None,
        argmax: bool = False,
        threshold: float | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        output_dir: str | os.PathLike[str] | None = None,
        output_format: str = "npy",
        meta_key: str = "image",
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}.")
        if output_format not in FORMATS:
            raise ValueError(f"output_format={output_format!r}: expected one of {', '.join(FORMATS)}.")
        if argmax and threshold is not None:
            raise ValueError(
                "argmax and threshold exclude each other: a voxel gets one label, or each channel is a mask."
            )
        if isinstance(activation, str) and activation not in ("softmax", "sigmoid"):
            raise ValueError(f"activation={activation!r}: expected 'softmax', 'sigmoid' or something callable.")
        self.mode = mode
        self.sigma_scale = sigma_scale
        self.activation = activation
        self.argmax = argmax
        self.threshold = threshold
        self.dtype = dtype
        self.device = torch.device(device)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.output_format = output_format
        self.meta_key = meta_key
        self._discrete = AsDiscrete(argmax=argmax, threshold=threshold) if argmax or threshold is not None else None
        self._under_way: dict[int, _VolumeUnderWay] = {}
        self._weights: dict[tuple[int, ...], torch.Tensor] = {}

    def add(self, outputs: torch.Tensor, batch: Mapping[str, Any]) -> list[MetaTensor]:
        """Add a network's outputs for a batch.

        Args:
            outputs: of shape [B, C, *patch].
            batch: as the loader gave it.

        Returns:
            The volumes that are whole now, in the order in which they became so; of shape [C, *spatial] (label maps
            [1, *spatial]). Often there are none.

        Raises:
            KeyError: a batch of another loader.
            TypeError: outputs that are no tensor.
            ValueError: a patch that was there before, or outputs of another shape.
        """
        if not isinstance(outputs, torch.Tensor):
            raise TypeError(
                f"outputs are a {type(outputs).__name__}; expected one tensor of shape [B, C, *patch]. Of a network "
                "with several outputs, choose one, or use an aggregator for each."
            )
        places = batch.get(GRID_PATCH)
        if places is None:
            raise KeyError(
                f"the batch has no {GRID_PATCH!r}, by which patches find their places: batches come from "
                f"GridPatchLoader. It has {list(batch)}."
            )
        volumes, patches = places["volume"].tolist(), places["patch"].tolist()
        if len(outputs) != len(volumes):
            raise ValueError(f"there are outputs for {len(outputs)} patches; the batch has {len(volumes)}.")
        outputs = self._activated(outputs.as_tensor() if isinstance(outputs, MetaTensor) else outputs)
        whole = []
        for index, (volume, patch) in enumerate(zip(volumes, patches, strict=True)):
            if volume not in self._under_way:
                self._under_way[volume] = self._begin(volume, index, batch)
            under_way = self._under_way[volume]
            try:
                for first, stop, rows in under_way.rows.add(patch, outputs[index]):
                    self._write(under_way, first, stop, rows)
            except ValueError as error:
                raise ValueError(
                    f"{under_way.name}: {error}. clear() begins anew after an epoch that was left."
                ) from error
            if under_way.rows.complete:
                whole.append(self._whole(self._under_way.pop(volume)))
        return whole

    def finish(self) -> None:
        """Say that there are no more patches.

        Raises:
            RuntimeError: volumes that lack patches.
        """
        lacking = [
            f"{volume.name} lacks {len(missing)} of {volume.rows.grid.count} patches ({_first(missing)})"
            for volume in self._under_way.values()
            for missing in [volume.rows.missing()]
        ]
        if lacking:
            raise RuntimeError(f"{len(lacking)} volumes are not whole: {'; '.join(lacking[:5])}.")

    def clear(self) -> None:
        """Forget volumes that are under way."""
        self._under_way.clear()

    def _activated(self, outputs: torch.Tensor) -> torch.Tensor:
        if callable(self.activation):
            return self.activation(outputs)
        if self.activation is None:
            return outputs
        axis = 1  # of the channels, in a batch
        activate = Activations(softmax=self.activation == "softmax", sigmoid=self.activation == "sigmoid", dim=axis)
        activated: torch.Tensor = activate(outputs)
        return activated

    def _begin(self, number: int, index: int, batch: Mapping[str, Any]) -> _VolumeUnderWay:
        places = {key: value[index] for key, value in batch[GRID_PATCH].items()}
        shape, size, overlap = (tuple(places[key].tolist()) for key in ("shape", "size", "overlap"))
        grid = PatchGrid(shape, size, overlap, bool(places["pad_overlap"]))
        if self.mode != "crop" and size not in self._weights:
            self._weights[size] = blend_weights(self.mode, size, self.sigma_scale).to(self.device)
        meta: dict[Any, Any] = {}
        operations: list[Any] = []
        template = batch.get(self.meta_key)
        if isinstance(template, MetaTensor):
            patch = template[index]
            meta = {key: value for key, value in patch.meta.items() if key not in PATCH_META}
            grids = (GridPatchSamples.__name__,)
            operations = [op for op in patch.applied_operations if op[TraceKeys.CLASS_NAME] not in grids]
        affine = places.get("affine")
        meta[MetaKeys.AFFINE] = torch.eye(4, dtype=torch.float64) if affine is None else affine.cpu()
        file = meta.get(ImageMetaKey.FILENAME_OR_OBJ)
        return _VolumeUnderWay(
            name=f"volume {number}" + (f" ({file})" if file else ""),
            rows=BlendedRows(grid, self._weights.get(size), self.device),
            meta=meta,
            operations=operations,
            file=None if self.output_dir is None else self.output_dir / self._file_name(number, file),
        )

    def _file_name(self, number: int, file: Any) -> str:
        stem = Path(str(file)).name.split(".")[0] if file else "volume"
        return f"{number:04d}_{stem}.{self.output_format}"

    def _write(self, under_way: _VolumeUnderWay, first: int, stop: int, rows: torch.Tensor) -> None:
        channels = len(rows)
        if self.argmax and channels == 1:
            raise ValueError("argmax of one channel is 0 everywhere: give a threshold instead")
        if self._discrete is not None:
            rows = self._discrete(rows)
            rows = rows.as_tensor() if isinstance(rows, MetaTensor) else rows
        dtype = self.dtype or (rows.dtype if self._discrete is None else _label_dtype(channels if self.argmax else 2))
        if under_way.output is None:
            shape = (len(rows), *under_way.rows.grid.shape)
            if under_way.file is None:
                under_way.output = MemoryOutput(shape, dtype, self.device)
            else:
                under_way.output = FORMATS[self.output_format](
                    under_way.file, shape, dtype, under_way.meta[MetaKeys.AFFINE]
                )
        under_way.output.write(first, stop, rows.to(dtype))

    @staticmethod
    def _whole(under_way: _VolumeUnderWay) -> MetaTensor:
        if under_way.output is None:
            raise RuntimeError(f"{under_way.name} is whole, but has no rows")
        volume = under_way.output.volume(under_way.meta)
        volume.applied_operations = under_way.operations
        return volume


def _label_dtype(labels: int) -> torch.dtype:
    return next((dtype for most, dtype in _LABEL_DTYPES if labels <= most), torch.int32)


def _first(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
