# SPDX-License-Identifier: Apache-2.0
"""``PatchDataModule``: named splits of one or more databases, and a loader for each."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch.utils.data import ConcatDataset, DataLoader

from ..queue.cpus import available_cpus
from ..queue.memory import ranks_on_this_host
from ..queue.ranks import ranks
from .arguments import positive
from .balancing import Balancing
from .chunks import Chunks
from .lightning_kind import LightningKind
from .patch_queue_loader import PatchQueueLoader
from .split_check import SampleReport, report_samples
from .split_datasets import PartPipeline, SplitDatasets, Transforms
from .split_loaders import check_loader_arguments, evaluation_loader, training_loader
from .splits import parse_splits, splits_of_stage
from .volumes import SamplesPerVolume, count_patches

__all__ = ["PatchDataModule"]

logger = logging.getLogger(__name__)


class PatchDataModule(LightningKind):
    """Named splits, each of samples of one or more databases, and loaders over them.

    After the behaviour of mednet's ``ConcatDataModule`` and ``CachingDataModule``. For plain Python, bundles, Ignite's
    and MONAI's engines; where Lightning is installed, an object of this class is a ``LightningDataModule`` too.

    A sample goes through its database's loader, ``model_transforms``, and in training ``train_transforms``.

    Args:
        splits: from names to sequences of pairs ``(samples, loader)``, one for each database. Names are ``"train"``
            (required), ``"validation"``, ``"test"``, and ``"monitor-…"`` for splits that are watched beside the
            validation. Samples are records as MONAI's datasets have them; the loader is a transform, a sequence of
            transforms, or an object with ``sample(record)``.
        database_name: what the databases are called together; for loggers and messages.
        split_name: what this way to split them is called.
        cache_samples: keep what comes before the first random transform in memory. Loaders and ``model_transforms``
            that are no MONAI transforms count as not random.
        balance_sampler_by_class: draw volumes with replacement so that patches of all classes are equally likely, in
            training, validation and what is watched.
        batch_size: patches in a batch, on each rank; volumes, with ``train_loader="plain"``. Cut to what the training
            split gives in an epoch.
        batch_chunk_count: parts that a batch is loaded in, for gradient accumulation; ``batch_size`` is a multiple.
        drop_incomplete_batch: leave out what is left of an epoch after its last whole batch.
        parallel: workers of each loader: none below 0, one for each CPU that this process may use with 0 (shared with
            the other ranks on this host), otherwise that many. As many threads fill the cache.
        model_transforms: follow the loader in all splits.
        train_transforms: follow in training: the crop into patches, and augmentation.
        balance_sampler_by_database: draw volumes with replacement so that patches of all databases are equally
            likely; with ``balance_sampler_by_class`` too, classes are balanced within each database.
        class_key: where records hold their class. Without it, the loader's ``target(record)`` tells; no volume is
            loaded for it.
        samples_per_volume: patches that a training volume gives, where the transforms don't tell, as
            :class:`PatchQueueLoader` takes it.
        train_loader: ``"queue"``: a :class:`PatchQueueLoader`; ``"plain"``: MONAI's ``DataLoader``.
        train_loader_arguments: more arguments of that loader, such as ``queue_length``.
        eval_batch_size: volumes in a batch of the other loaders.
        eval_loader_arguments: more arguments of these, which are MONAI's ``DataLoader``.
        seed: of the order and of patches. Default: torch's, which ``monai.utils.set_determinism`` sets; for the order
            that ranks share, 0. The transforms of a plain loader are up to ``set_determinism`` in any case.
        progress: show a bar while the cache is filled.

    Raises:
        TypeError, ValueError: splits or arguments that cannot work, with what to do.

    Example:
        >>> import numpy as np
        >>> from monai_patchqueue import PatchDataModule, RandUniformPatchd
        >>> records = [{"number": n, "organ": "left" if n < 3 else "right"} for n in range(4)]
        >>> def load(record):
        ...     return {**record, "image": np.full((1, 16, 16), record["number"], np.float32)}
        >>> data = PatchDataModule(
        ...     {"train": [(records[:3], load), (records[3:], load)], "validation": [(records, load)]},
        ...     batch_size=8,
        ...     batch_chunk_count=2,
        ...     train_transforms=RandUniformPatchd("image", spatial_size=8, num_samples=4),
        ...     balance_sampler_by_class=True,
        ...     class_key="organ",
        ...     seed=0,
        ... )
        >>> [tuple(batch["image"].shape) for batch in data.train_dataloader()]
        [(4, 1, 8, 8), (4, 1, 8, 8), (4, 1, 8, 8), (4, 1, 8, 8)]
        >>> data.accumulation_steps, list(data.val_dataloader())
        (2, ['validation'])
    """

    def __init__(
        self,
        splits: Mapping[str, Sequence[tuple[Sequence[Any], Any]]],
        database_name: str = "",
        split_name: str = "",
        cache_samples: bool = False,
        balance_sampler_by_class: bool = False,
        batch_size: int = 1,
        batch_chunk_count: int = 1,
        drop_incomplete_batch: bool = False,
        parallel: int = -1,
        *,
        model_transforms: Transforms = (),
        train_transforms: Transforms = (),
        balance_sampler_by_database: bool = False,
        class_key: str | None = None,
        samples_per_volume: SamplesPerVolume | None = None,
        train_loader: Literal["queue", "plain"] = "queue",
        train_loader_arguments: Mapping[str, Any] | None = None,
        eval_batch_size: int = 1,
        eval_loader_arguments: Mapping[str, Any] | None = None,
        seed: int | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        if train_loader not in ("queue", "plain"):
            raise ValueError(f"train_loader={train_loader!r}: expected 'queue' or 'plain'.")
        loader_class = PatchQueueLoader if train_loader == "queue" else DataLoader
        check_loader_arguments("train_loader_arguments", train_loader_arguments or {}, loader_class)
        check_loader_arguments("eval_loader_arguments", eval_loader_arguments or {}, DataLoader)
        positive("eval_batch_size", eval_batch_size)
        if seed is not None:
            positive("seed", seed, least=0)
        self.splits = parse_splits(splits)
        self.database_name = database_name
        self.split_name = split_name
        self.cache_samples = cache_samples
        self.drop_incomplete_batch = drop_incomplete_batch
        self.parallel = parallel
        self.samples_per_volume = samples_per_volume
        self.train_loader = train_loader
        self.train_loader_arguments = dict(train_loader_arguments or {})
        self.eval_batch_size = eval_batch_size
        self.eval_loader_arguments = dict(eval_loader_arguments or {})
        self.seed = seed
        self.progress = progress
        self._balancing = Balancing(balance_sampler_by_class, balance_sampler_by_database, class_key)
        self._loaders: weakref.WeakSet[PatchQueueLoader] = weakref.WeakSet()
        self._take_up(PartPipeline(model_transforms, train_transforms))
        self.set_chunk_size(batch_size, batch_chunk_count)

    def _take_up(self, pipeline: PartPipeline) -> None:
        """Datasets with these transforms, the numbers of patches that volumes then give, and their weights."""
        datasets = SplitDatasets(self.splits, pipeline, self.cache_samples, self.progress)
        names = splits_of_stage("fit", list(self.splits)) if self._balancing else ["train"]
        counts = {name: self._count(name, datasets.uncached(name)) for name in names}
        weights = {name: self._balancing.weights(self.splits[name], counts[name]) for name in names}
        self._datasets, self._counts, self._weights = datasets, counts, weights

    def _count(self, name: str, dataset: ConcatDataset[Any]) -> list[int]:
        if self.train_loader == "plain" and not self._balancing:
            return [1] * len(dataset)
        counts: list[int] = count_patches(dataset, self.samples_per_volume if name == "train" else None).tolist()
        return counts

    # -- settings

    @property
    def parallel(self) -> int:
        """Workers of each loader, as given; loaders made from now on heed it."""
        return self._parallel

    @parallel.setter
    def parallel(self, parallel: int) -> None:
        positive("parallel", parallel, least=-(2**31))
        self._parallel = parallel

    @property
    def num_workers(self) -> int:
        """Workers of each loader, as a number."""
        if self._parallel:
            return max(self._parallel, 0)
        return math.ceil(available_cpus() / ranks_on_this_host())

    @property
    def model_transforms(self) -> tuple[Callable[[Any], Any], ...]:
        """What follows the loaders. Setting it drops datasets that are there, and with them their caches."""
        return self._datasets.pipeline.model_transforms

    @model_transforms.setter
    def model_transforms(self, transforms: Transforms) -> None:
        before = self._datasets
        self._take_up(PartPipeline(transforms, before.pipeline.train_transforms))
        self._close_loaders()
        before.drop(*self.splits)

    def set_chunk_size(self, batch_size: int, batch_chunk_count: int) -> None:
        """Choose the size of batches, and in how many chunks they come; loaders made from now on heed it.

        Raises:
            ValueError: a batch that cannot be divided into that many equal chunks, or a training split with fewer
                patches than chunks.
        """
        chunks = Chunks(batch_size, batch_chunk_count)
        cut = chunks.size(self._train_size, self._unit) * chunks.count
        self._chunks = chunks
        if cut < batch_size:
            where = f"{self._train_size} {self._unit} in an epoch on each rank"
            logger.warning("batch_size=%d is cut to %d: the training split gives %s.", batch_size, cut, where)

    @property
    def chunk_size(self) -> int:
        """Patches in what a training loader gives at a time (volumes, in plain loading)."""
        return self._chunks.size(self._train_size, self._unit)

    @property
    def batch_chunk_count(self) -> int:
        """Chunks that a batch is loaded in."""
        return self._chunks.count

    @property
    def batch_size(self) -> int:
        """Patches in a batch (volumes, in plain loading), at most what the training split gives in an epoch."""
        return self.chunk_size * self._chunks.count

    @property
    def accumulation_steps(self) -> int:
        """Chunks over which the engine is to accumulate gradients before it updates the network.

        ``accumulation_steps`` of MONAI's ``SupervisedTrainer``, ``gradient_accumulation_steps`` of Ignite's
        ``create_supervised_trainer``, ``accumulate_grad_batches`` of Lightning's ``Trainer``.
        """
        return self._chunks.count

    @property
    def _unit(self) -> str:
        return "patches" if self.train_loader == "queue" else "volumes"

    @property
    def _train_size(self) -> int:
        """Patches, or volumes, that a rank gets in an epoch."""
        counts = self._counts["train"]
        return -(-(sum(counts) if self.train_loader == "queue" else len(counts)) // ranks()[1])

    # -- stages

    def setup(self, stage: str | None = None) -> None:
        """Make the datasets of a stage, and fill their caches; those that are there already are kept.

        Loaders do so by themselves when they are asked for.

        Args:
            stage: ``"fit"`` (training, validation and what is watched), ``"validate"`` (the latter two), ``"test"``,
                ``"predict"`` (both the test split), or ``None`` for all.

        Raises:
            ValueError: another stage.
            RuntimeError: a volume that cannot be loaded into the cache.
        """
        for name in splits_of_stage(stage, list(self.splits)):
            self._datasets.get(name, self.num_workers)

    def teardown(self, stage: str | None = None) -> None:
        """Give a stage's memory back: caches, and the workers and memory of queues that train on it.

        Loaders that are still held can be used all the same; they load each volume anew.
        """
        names = splits_of_stage(stage, list(self.splits))
        if "train" in names:
            self._close_loaders()
        self._datasets.drop(*names)

    def _close_loaders(self) -> None:
        for loader in list(self._loaders):
            loader.close()

    def check_split(self, limit: int = 1) -> list[SampleReport]:
        """Load the first samples of each database of each split, and say what they look like or what went wrong.

        Args:
            limit: samples of each database.

        Returns:
            One report for each sample, also in the log; those of samples that failed have an ``error``.
        """
        positive("limit", limit)
        parts = [part for parts in self.splits.values() for part in parts]
        return list(report_samples(parts, self._datasets.pipeline, limit))

    # -- loaders

    def train_dataloader(self) -> DataLoader[Any]:
        """Chunks of the training split, shuffled or balanced."""
        length = self._train_size
        if self.drop_incomplete_batch:
            length -= length % self.batch_size
        return self._training_loader(length, self._weights["train"], shuffle=True)

    def unshuffled_train_dataloader(self) -> DataLoader[Any]:
        """Chunks of the training split in its own order, each volume once."""
        return self._training_loader(self._train_size, None, shuffle=False)

    def val_dataloader(self) -> dict[str, DataLoader[Any]]:
        """Loaders of the validation and of what is watched, by the splits' names; there may be none.

        Each volume comes once, in order. Balanced splits are drawn with replacement, the same in every epoch.
        """
        return {name: self._evaluation_loader(name) for name in splits_of_stage("validate", list(self.splits))}

    def test_dataloader(self) -> dict[str, DataLoader[Any]]:
        """The test split's loader, by the split's name.

        Raises:
            ValueError: there is no such split.
        """
        if "test" not in self.splits:
            raise ValueError(f"there is no split 'test' to test on or to predict; splits has {list(self.splits)}.")
        return {"test": self._evaluation_loader("test")}

    def predict_dataloader(self) -> dict[str, DataLoader[Any]]:
        """The same as :meth:`test_dataloader`."""
        return self.test_dataloader()

    def _training_loader(self, length: int, weights: list[float] | None, shuffle: bool) -> DataLoader[Any]:
        loader = training_loader(
            self._datasets.get("train", self.num_workers),
            length=length,
            counts=self._counts["train"] if self.train_loader == "queue" else None,
            weights=weights,
            shuffle=shuffle,
            seed=self.seed,
            batch_size=self.chunk_size,
            num_workers=self.num_workers,
            samples_per_volume=self.samples_per_volume,
            arguments=self.train_loader_arguments,
        )
        if isinstance(loader, PatchQueueLoader):
            self._loaders.add(loader)
        return loader

    def _evaluation_loader(self, name: str) -> DataLoader[Any]:
        return evaluation_loader(
            self._datasets.get(name, self.num_workers),
            weights=self._weights.get(name),
            seed=self.seed,
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            arguments=self.eval_loader_arguments,
        )

    # -- the rest

    def __repr__(self) -> str:
        sizes = {name: sum(len(part.samples) for part in parts) for name, parts in self.splits.items()}
        named = "".join(f"{name!r}, " for name in (self.database_name, self.split_name) if name)
        return (
            f"{type(self).__name__}({named}volumes={sizes}, batch_size={self.batch_size}, "
            f"batch_chunk_count={self.batch_chunk_count})"
        )

    def __str__(self) -> str:
        return repr(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_loaders"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _loaders=weakref.WeakSet())
