# SPDX-License-Identifier: Apache-2.0
"""Who chooses and cuts the patches of a volume in RAM, and the least work that this needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor, get_track_meta, set_track_meta
from monai.transforms import ClassesToIndicesd, RandCropByLabelClassesd, RandWeightedCropd

from monai_patchqueue import LabelIndexd, RandLabelPatchd, RandWeightedPatchd, WeightIndexd

from .pipelines import CLASS_INDICES, KEYS
from .setup import CLASS_PROBABILITIES, NUM_CLASSES
from .volumes import make_volume

Item = dict[str, Any]
MAPS = {"label": "label", "rare-class": "rare", "weighted": "weights"}
"""What centers are drawn by → the map of :func:`make_item` that they are drawn from."""
RARE_EDGE = 4


@dataclass(frozen=True)
class Scene:
    """One volume, and what is cut of it: ``num_samples`` patches, by ``kind`` (a key of :data:`MAPS`)."""

    shape: tuple[int, int, int]
    patch_size: int
    kind: str
    num_samples: int = 8


@dataclass(frozen=True)
class Way:
    """One way to get patches: ``prepare`` makes what it starts from, ``run`` is timed."""

    title: str
    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


def make_item(shape: tuple[int, int, int], seed: int = 0) -> Item:
    """A float32 image, a uint8 label, one whose last class is rare, and a float32 weight map, each ``[1, *shape]``."""
    image, label = make_volume(shape, seed)
    rare = np.where(label == NUM_CLASSES - 1, np.uint8(0), label)
    rare[tuple(slice(n // 2 - RARE_EDGE // 2, n // 2 + RARE_EDGE // 2) for n in shape)] = NUM_CLASSES - 1
    weights = np.where(image != 0, np.float32(0.05), np.float32(0)) + label.astype(np.float32)
    arrays = {"image": image.astype(np.float32), "label": label, "rare": rare, "weights": weights}
    return {key: torch.from_numpy(array[None]) for key, array in arrays.items()}


def needed_of(item: Item, scene: Scene) -> Item:
    """What a scene needs of an item: the keys that are cut, and the weight map if centers are drawn by that."""
    if scene.kind == "weighted":
        return {key: item[key] for key in (*KEYS, "weights")}
    return {**{key: item[key] for key in KEYS}, "label": item[MAPS[scene.kind]]}


def ways(item: Item, scene: Scene) -> dict[str, Way]:
    """Everyone, by name. All but those with an index get a map that nobody has seen."""
    needed = needed_of(item, scene)
    if scene.kind == "weighted":
        map_key = "weights"
        args = [scene.patch_size] * 3, scene.num_samples
        ours: Any = RandWeightedPatchd(KEYS, "weights", scene.patch_size, scene.num_samples)
        index: Any = WeightIndexd("weights")
        monai: Any = RandWeightedCropd(KEYS, "weights", *args)
    else:
        map_key = "label"
        ours = RandLabelPatchd(KEYS, "label", scene.patch_size, scene.num_samples, CLASS_PROBABILITIES)
        index = LabelIndexd("label")
        monai = _monai_label_crop(scene)
    everyone: dict[str, Way] = {}
    for container, tracked in (("tensors", False), ("MetaTensors", True)):
        fresh = _Fresh(needed, map_key, tracked)
        name = container.lower()
        everyone[f"ours-{name}"] = Way(f"ours, first use of the map, {container}", fresh, _tracked(ours, tracked))
        everyone[f"ours-index-{name}"] = Way(
            f"ours, index at hand, {container}", _Indexed(fresh, index, ours), _tracked(ours, tracked)
        )
        everyone[f"monai-{name}"] = Way(f"MONAI's crop, copied, {container}", fresh, _tracked(monai, tracked, _copied))
        if map_key == "label":
            indexed = _Indexed(fresh, ClassesToIndicesd("label", num_classes=NUM_CLASSES), None)
            crop, title = _monai_label_crop(scene, CLASS_INDICES), "MONAI's crop, class indices at hand"
            everyone[f"monai-index-{name}"] = Way(
                f"{title}, copied, {container}", indexed, _tracked(crop, tracked, _copied)
            )
        else:
            # A map that is listed too is cut; one that isn't is deep-copied whole for each patch.
            crop, title = RandWeightedCropd([*KEYS, "weights"], "weights", *args), "MONAI's crop, the map listed too"
            everyone[f"monai-listed-{name}"] = Way(
                f"{title}, copied, {container}", fresh, _tracked(crop, tracked, _copied)
            )
    if find_spec("torchio") is not None:
        everyone["torchio"] = _torchio(needed, scene)
    everyone["limit-copy"] = Way("limit: copy of the patches", _Starts(scene), _Copy(needed, scene.patch_size))
    map_ = needed[map_key]
    if map_key == "label":
        everyone["limit-map"] = Way("limit: locating the label's runs", map_.clone, _locate_runs)
    else:
        everyone["limit-map"] = Way("limit: one pass over the weights", map_.clone, torch.sum)
    return everyone


@dataclass
class _Fresh:
    """Items whose map is a new tensor each time."""

    item: Item
    map_key: str
    tracked: bool

    def __call__(self) -> Item:
        item = {**self.item, self.map_key: self.item[self.map_key].clone()}
        return {key: MetaTensor(value) for key, value in item.items()} if self.tracked else item


class _Indexed:
    """One item with its index, made and used once beforehand."""

    def __init__(self, fresh: _Fresh, index: Any, first_user: Any) -> None:
        self.item = _tracked(index, fresh.tracked)(fresh())
        if first_user is not None:
            _tracked(first_user, fresh.tracked)(self.item)

    def __call__(self) -> Item:
        return self.item


def _tracked(transform: Any, tracked: bool, finish: Callable[[Any], Any] | None = None) -> Callable[[Any], Any]:
    def run(item: Any) -> Any:
        before = get_track_meta()
        set_track_meta(tracked)
        try:
            result = transform(item)
            return result if finish is None else finish(result)
        finally:
            set_track_meta(before)

    return run


def _copied(patches: list[Item]) -> list[Item]:
    """MONAI's patches are views, which keep the whole volume in memory; ours and TorchIO's are copies."""
    return [{key: patch[key].clone() for key in KEYS} for patch in patches]


def _monai_label_crop(scene: Scene, indices_key: str | None = None) -> Any:
    return RandCropByLabelClassesd(
        KEYS,
        label_key="label",
        spatial_size=[scene.patch_size] * 3,
        num_classes=NUM_CLASSES,
        num_samples=scene.num_samples,
        ratios=[CLASS_PROBABILITIES.get(class_, 0.0) for class_ in range(NUM_CLASSES)],
        indices_key=indices_key,
    )


def _torchio(item: Item, scene: Scene) -> Way:
    import torchio as tio

    def subject() -> Any:
        images = {"image": tio.ScalarImage(tensor=item["image"]), "label": tio.LabelMap(tensor=item["label"].clone())}
        if scene.kind == "weighted":
            images["weights"] = tio.Image(tensor=item["weights"].clone(), type=tio.SAMPLING_MAP)
        return tio.Subject(images)

    sampler: Any
    if scene.kind == "weighted":
        sampler = tio.WeightedSampler(scene.patch_size, "weights")
    else:
        sampler = tio.LabelSampler(scene.patch_size, "label", CLASS_PROBABILITIES)
    return Way("TorchIO's sampler", subject, lambda given: [*sampler(given, scene.num_samples)])


class _Starts:
    """Random places of a volume's patches."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.rng = np.random.default_rng(0)

    def __call__(self) -> list[tuple[int, ...]]:
        highest = [n - self.scene.patch_size + 1 for n in self.scene.shape]
        return [tuple(self.rng.integers(highest).tolist()) for _ in range(self.scene.num_samples)]


@dataclass
class _Copy:
    """Patches at given places, copied to memory of their own."""

    item: Mapping[str, torch.Tensor]
    size: int

    def __call__(self, starts: list[tuple[int, ...]]) -> list[Item]:
        windows = [(slice(None), *[slice(start, start + self.size) for start in place]) for place in starts]
        return [{key: self.item[key][window].clone() for key in KEYS} for window in windows]


def _locate_runs(label: torch.Tensor) -> np.ndarray:
    flat = label.numpy().ravel()
    return np.flatnonzero(flat[1:] != flat[:-1])


def delivered(name: str, patches: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Plain image and label of each patch that a way gave."""
    for patch in patches:
        yield {key: patch[key].data if name == "torchio" else torch.as_tensor(patch[key]) for key in KEYS}
