# SPDX-License-Identifier: Apache-2.0
"""Libraries that make loaders anew of a loader's attributes keep the queue, or say why they cannot."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import accelerate
import ignite.distributed as idist
import lightning
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.fabric.utilities.data import _update_dataloader
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.data import _update_dataloader as update_of_trainer
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from monai_patchqueue import PatchQueueDataset, PatchQueueLoader
from tests.pipelines import Patches, add_one, drawn, every_patch, make_loader
from tests.processes import on_ranks

COUNTS = [3, 3, 3, 3]


def queue_of(**arguments: Any) -> PatchQueueLoader:
    return make_loader(COUNTS, batch_size=4, shuffle=True, **arguments)


class Module(lightning.LightningModule):
    """Notes the patches that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.draws: list[list[tuple[int, int]]] = []

    def on_train_epoch_start(self) -> None:
        self.draws.append([])

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        self.draws[-1] += drawn([batch])
        return self.weight * batch["image"].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder: Path, **arguments: Any) -> lightning.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(default_root_dir=folder, max_epochs=2, accelerator="cpu", **quiet, **arguments)


# -- Lightning


@pytest.mark.parametrize("workers", [0, 1])
def test_lightning_trains_on_exact_epochs(workers: int, tmp_path: Path) -> None:
    module = Module()
    with queue_of(num_workers=workers) as loader:
        trainer(tmp_path, devices=1).fit(module, loader)
    assert [Counter(draws) for draws in module.draws] == 2 * [every_patch(COUNTS)]
    assert module.draws[0] != module.draws[1]


@pytest.mark.parametrize("update", [_update_dataloader, update_of_trainer], ids=["Fabric", "Trainer"])
def test_lightning_rebuilds_the_queue_with_its_own_sampler(update: Any) -> None:
    settings: dict[str, Any] = {"queue_length": 7, "warmup": 2, "repeats": 2, "patch_transform": add_one, "seed": 5}
    loader = queue_of(**settings)
    sampler = DistributedSampler(loader.dataset, num_replicas=2, rank=1)  # type: ignore[arg-type]
    again = update(loader, sampler)
    assert type(again) is PatchQueueLoader
    assert again.sampler is sampler
    assert {name: getattr(again, name) for name in settings} == settings
    assert (again.batch_size, again.batch_unit, len(again)) == (4, "patch", 3)
    assert len({volume for batch in again for volume in batch["volume"].tolist()}) == 2


def test_lightning_rebuilds_the_queue_for_predictions_and_for_overfitting() -> None:
    loader = queue_of()
    predicting = update_of_trainer(loader, SequentialSampler(loader.dataset), mode=RunningStage.PREDICTING)  # type: ignore[arg-type]
    assert type(predicting) is PatchQueueLoader
    assert Counter(drawn(predicting)) == every_patch(COUNTS)


def test_lightning_divides_the_volumes_between_processes(tmp_path: Path) -> None:
    def rank() -> Any:
        from lightning.pytorch.plugins.environments import LightningEnvironment
        from lightning.pytorch.strategies import DDPStrategy

        class Environment(LightningEnvironment):
            """This process group's, instead of processes that Lightning starts."""

            creates_processes_externally = True  # type: ignore[assignment]

            def world_size(self) -> int:
                return dist.get_world_size()

            def global_rank(self) -> int:
                return dist.get_rank()

            def local_rank(self) -> int:
                return dist.get_rank()

        module = Module()
        strategy = DDPStrategy(cluster_environment=Environment(), process_group_backend="gloo")
        run = trainer(tmp_path, devices=2, strategy=strategy)
        run.fit(module, queue_of())
        return module.draws, type(run.train_dataloader).__name__

    (draws, name), (others, other_name) = on_ranks(2, rank, tmp_path)
    assert name == other_name == "PatchQueueLoader"
    for own, other in zip(draws, others, strict=True):
        assert Counter(own + other) == every_patch(COUNTS)
        assert not {volume for volume, _ in own} & {volume for volume, _ in other}


def test_fabric_keeps_the_queue(tmp_path: Path) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(queue_of())
    assert Counter(drawn(loader)) == every_patch(COUNTS)  # type: ignore[arg-type]


# -- Accelerate


@pytest.fixture
def accelerator() -> Any:
    yield accelerate.Accelerator(cpu=True)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_accelerate_keeps_the_queue(accelerator: accelerate.Accelerator) -> None:
    loader = queue_of()
    weight = torch.nn.Linear(1, 1)
    prepared, *_ = accelerator.prepare(loader, weight, torch.optim.SGD(weight.parameters(), 0.1))
    assert prepared is loader
    for _ in range(2):
        assert Counter(drawn(prepared)) == every_patch(COUNTS)
    assert accelerator.prepare_data_loader(loader) is loader


def test_accelerate_keeps_the_dataset_that_is_a_queue(accelerator: accelerate.Accelerator) -> None:
    dataset = PatchQueueDataset(Patches(COUNTS), samples_per_volume="count", seed=0)
    prepared = accelerator.prepare(DataLoader(dataset, batch_size=4))
    assert Counter(drawn(prepared)) == every_patch(COUNTS)


@pytest.mark.parametrize("workers", [0, 1])
def test_accelerate_cannot_skip_batches_of_a_queue_silently(workers: int, accelerator: accelerate.Accelerator) -> None:
    with pytest.raises((TypeError, ValueError)):
        list(accelerate.skip_first_batches(accelerator.prepare(queue_of(num_workers=workers)), 1))


def test_accelerate_does_not_let_every_process_train_on_everything(tmp_path: Path) -> None:
    def rank() -> Any:
        accelerator = accelerate.Accelerator(cpu=True)
        with pytest.raises(RuntimeError, match="DistributedSampler") as caught:
            accelerator.prepare(queue_of())
        dataset = Patches(COUNTS)
        loader = make_loader(dataset, batch_size=4, sampler=DistributedSampler(dataset))  # type: ignore[arg-type]
        assert accelerator.prepare(loader) is loader
        return str(caught.value), drawn(loader)

    (message, own), (_, other) = on_ranks(2, rank, tmp_path)
    assert "2 processes" in message
    assert Counter(own + other) == every_patch(COUNTS)


# -- Ignite


def test_ignites_auto_dataloader_keeps_the_dataset_that_is_a_queue() -> None:
    dataset = PatchQueueDataset(Patches(COUNTS), samples_per_volume="count", seed=0)
    loader = idist.auto_dataloader(dataset, batch_size=4, num_workers=0)
    assert isinstance(loader.dataset, IterableDataset)
    assert Counter(drawn(loader)) == every_patch(COUNTS)


def test_ignites_auto_dataloader_does_not_take_a_loader_for_a_dataset() -> None:
    with pytest.raises((TypeError, AttributeError, NotImplementedError)):
        next(iter(idist.auto_dataloader(queue_of(), batch_size=4)))


def test_ignite_starts_ranks_whose_queues_share_the_volumes(tmp_path: Path) -> None:
    def rank() -> Any:
        dataset = Patches(COUNTS)
        order = DistributedSampler(dataset, idist.get_world_size(), idist.get_rank())  # type: ignore[arg-type]
        return drawn(make_loader(dataset, batch_size=4, sampler=order))

    own, other = on_ranks(2, rank, tmp_path)
    assert Counter(own + other) == every_patch(COUNTS)
