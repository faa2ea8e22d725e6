# SPDX-License-Identifier: Apache-2.0
"""Who takes part. A contestant is one function from a :class:`Setup` to an iterable of batches, once per epoch.

All load the image and label of each volume, put the channel first and cut patches by label; all batches are dicts with
float32 ``image`` and ``label`` of shape ``[n, 1, *patch]``. Imports are inside the functions, so that a contestant's
process holds only what this contestant needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from .setup import CLASS_PROBABILITIES, NUM_CLASSES, Setup
from .stores import NnunetBatches, chunked, persistent

KEYS = ["image", "label"]
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
        layout: how to find patches in a batch, ``"monai"`` or ``"torchio"``; ``None`` for a limit that delivers no real
            patches, so that there is nothing to compare.
    """

    name: str
    title: str
    build: Build
    requires: str = "monai"
    remedy: str | None = None
    layout: str | None = "monai"

    @property
    def missing(self) -> bool:
        return find_spec(self.requires) is None


CONTESTANTS: dict[str, Contestant] = {}
DEFAULT = ("patchqueue", "patchqueue-reader", "patchqueue-monai-crop", "monai", "torchio")
OUR_STORE = "'monai_patchqueue[store]'"
QUICK = ("patchqueue", "monai", "torchio")


def contestant(name: str, title: str, **options: Any) -> Callable[[Build], Build]:
    """Register a function under `name`."""

    def register(build: Build) -> Build:
        CONTESTANTS[name] = Contestant(name, title, build, **options)
        return build

    return register


@contestant("patchqueue", "PatchQueueLoader", requires="monai_patchqueue")
def patchqueue(setup: Setup) -> Batches:
    return _patchqueue_loader(setup, _dataset(setup, _our_crop(setup)), "process")


@contestant("patchqueue-reader", "PatchQueueLoader, LoadVolumed", requires="monai_patchqueue")
def patchqueue_reader(setup: Setup) -> Batches:
    """Our reader in place of LoadImaged: reads the patches of a volume only."""
    from monai.data import Dataset
    from monai.transforms import Compose

    from monai_patchqueue import LoadVolumed

    pipeline = Compose([LoadVolumed(KEYS, ensure_channel_first=True, lazy_read=True), _our_crop(setup)])
    return _patchqueue_loader(setup, Dataset(setup.items, pipeline), "process")


@contestant("patchqueue-thread", "PatchQueueLoader, threads", requires="monai_patchqueue")
def patchqueue_thread(setup: Setup) -> Batches:
    return _patchqueue_loader(setup, _dataset(setup, _our_crop(setup)), "thread")


@contestant("patchqueue-monai-crop", "PatchQueueLoader, MONAI's crop", requires="monai_patchqueue")
def patchqueue_monai_crop(setup: Setup) -> Batches:
    return _patchqueue_loader(setup, _dataset(setup, _monai_crop(setup)), "process")


@contestant("monai", "MONAI Dataset + DataLoader")
def monai_dataloader(setup: Setup) -> Batches:
    from monai.data import DataLoader

    return DataLoader(_dataset(setup, _monai_crop(setup)), **_monai_options(setup))


@contestant("monai-thread", "MONAI Dataset + ThreadDataLoader")
def monai_thread_dataloader(setup: Setup) -> Batches:
    from monai.data import ThreadDataLoader

    return ThreadDataLoader(_dataset(setup, _monai_crop(setup)), **_monai_options(setup))


@contestant("monai-cache", "MONAI CacheDataset (all in RAM) + DataLoader")
def monai_cache(setup: Setup) -> Batches:
    from monai.data import DataLoader

    return DataLoader(_cached(setup, _monai_crop(setup)), **_monai_options(setup))


@contestant("patchqueue-cache", "PatchQueueLoader, CacheDataset (all in RAM)", requires="monai_patchqueue")
def patchqueue_cache(setup: Setup) -> Batches:
    return _patchqueue_loader(setup, _cached(setup, _our_crop(setup)), "process")


@contestant("patchqueue-store", "PatchQueueLoader, ChunkedDataset", requires="blosc2", remedy=OUR_STORE)
def patchqueue_store(setup: Setup) -> Batches:
    return _patchqueue_loader(setup, chunked(setup, [*_loading(), _our_crop(setup)]), "process")


@contestant(
    "patchqueue-store-normalized",
    "PatchQueueLoader, ChunkedDataset, normalized images",
    requires="blosc2",
    remedy=OUR_STORE,
    layout=None,
)
def patchqueue_store_normalized(setup: Setup) -> Batches:
    """As nnU-Net stores images: no integers any more, which take fewer bytes."""
    from monai.transforms import NormalizeIntensityd

    return _patchqueue_loader(
        setup, chunked(setup, [*_loading(), NormalizeIntensityd("image"), _our_crop(setup)]), "process"
    )


@contestant("monai-persistent", "MONAI PersistentDataset + DataLoader")
def monai_persistent(setup: Setup) -> Batches:
    from monai.data import DataLoader

    return DataLoader(persistent(setup, [*_loading(), _monai_crop(setup)]), **_monai_options(setup))


@contestant("nnunet", "nnU-Net v2, its blosc2 files", requires="nnunetv2", remedy="nnunetv2", layout=None)
def nnunet(setup: Setup) -> Batches:
    return NnunetBatches(setup, normalize=False)


@contestant(
    "nnunet-normalized",
    "nnU-Net v2, its blosc2 files, normalized images",
    requires="nnunetv2",
    remedy="nnunetv2",
    layout=None,
)
def nnunet_normalized(setup: Setup) -> Batches:
    return NnunetBatches(setup, normalize=True)


@contestant("torchio", "TorchIO Queue", requires="torchio", remedy="'monai_patchqueue[bench]'", layout="torchio")
def torchio_queue(setup: Setup) -> Batches:
    import torchio as tio

    subjects = [
        tio.Subject(image=tio.ScalarImage(item["image"]), label=tio.LabelMap(item["label"])) for item in setup.items
    ]
    sampler = tio.LabelSampler(setup.patch_size, "label", CLASS_PROBABILITIES)
    queue = tio.Queue(
        tio.SubjectsDataset(subjects),
        setup.queue_length,
        setup.samples_per_volume,
        sampler,
        num_workers=setup.num_workers,
    )
    return _TorchIOBatches(tio.SubjectsLoader(queue, batch_size=setup.batch_size, num_workers=0))


@contestant("limit-decode", "limit: LoadImaged alone, one core", layout=None)
def decode_only(setup: Setup) -> Batches:
    """No crops, no workers: the first corner of each loaded volume, seen `samples_per_volume` times."""
    corner = (slice(None), *[slice(setup.patch_size)] * 3)
    dataset = _dataset(setup)

    def epoch() -> Iterator[Mapping[str, Any]]:
        for number in range(len(dataset)):
            volume = dataset[number]
            yield {key: volume[key][corner].expand(setup.samples_per_volume, 1, -1, -1, -1) for key in KEYS}

    return _Epochs(epoch)


@contestant("limit-ram", "limit: copy of patches in RAM, one core", layout=None)
def copy_only(setup: Setup) -> Batches:
    """Batches gathered from as many patches as an epoch has, all in memory and in random order."""
    import torch

    count, size = setup.patches_per_epoch, setup.patch_size
    patches = {key: torch.rand(count, 1, size, size, size) for key in KEYS}

    def epoch() -> Iterator[Mapping[str, Any]]:
        for chosen in torch.randperm(count).split(setup.batch_size):
            yield {key: patches[key].index_select(0, chosen) for key in KEYS}

    return _Epochs(epoch)


@dataclass
class _Epochs:
    """A generator function as something to iterate again and again."""

    epoch: Callable[[], Iterator[Mapping[str, Any]]]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return self.epoch()


@dataclass
class _TorchIOBatches:
    """TorchIO keeps the files' integers, MONAI makes float32: the drawn patches are cast, which is least work."""

    loader: Batches

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self.loader:
            data = {key: batch[key]["data"].float() for key in KEYS}
            yield {**data, "location": batch["location"], "meta": {key: batch[key] for key in KEYS}}


def _loading() -> list[Any]:
    from monai.transforms import EnsureChannelFirstd, LoadImaged

    return [LoadImaged(KEYS), EnsureChannelFirstd(KEYS)]


def _pipeline(*crops: Any) -> Any:
    from monai.transforms import Compose

    return Compose([*_loading(), *crops])


def _dataset(setup: Setup, *crops: Any) -> Any:
    from monai.data import Dataset

    return Dataset(setup.items, _pipeline(*crops))


def _cached(setup: Setup, crop: Any) -> Any:
    """Volumes in RAM, not copied at each access: the crops don't change them."""
    from monai.data import CacheDataset

    workers = setup.num_workers or None
    return CacheDataset(setup.items, _pipeline(crop), num_workers=workers, progress=False, copy_cache=False)


def _our_crop(setup: Setup) -> Any:
    from monai_patchqueue import RandLabelPatchd

    return RandLabelPatchd(
        KEYS,
        label_key="label",
        spatial_size=setup.patch_size,
        num_samples=setup.samples_per_volume,
        label_probabilities=CLASS_PROBABILITIES,
    )


def _monai_crop(setup: Setup) -> Any:
    from monai.transforms import RandCropByLabelClassesd

    return RandCropByLabelClassesd(
        KEYS,
        label_key="label",
        spatial_size=[setup.patch_size] * 3,
        num_classes=NUM_CLASSES,
        num_samples=setup.samples_per_volume,
        ratios=[CLASS_PROBABILITIES.get(class_, 0.0) for class_ in range(NUM_CLASSES)],
    )


def _monai_options(setup: Setup) -> dict[str, Any]:
    """One volume a batch, the fewest patches there can be; workers that live on, as ours do."""
    workers = setup.num_workers
    return {"batch_size": 1, "shuffle": True, "num_workers": workers, "persistent_workers": workers > 0}


def _patchqueue_loader(setup: Setup, dataset: Any, worker_type: str) -> Batches:
    from monai_patchqueue import PatchQueueLoader

    return PatchQueueLoader(
        dataset,
        num_workers=setup.num_workers,
        batch_size=setup.batch_size,
        shuffle=True,
        queue_length=setup.queue_length,
        seed=setup.seed,
        worker_type=worker_type,
        batch_unit="patch",
    )
