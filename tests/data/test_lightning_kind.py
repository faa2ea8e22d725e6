# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
import os
import pickle
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from monai_patchqueue import PatchDataModule
from tests.numbered_volumes import Numbered, crop, make_module, numbers, records
from tests.processes import in_child

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:Total length of `dict` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
]


@pytest.fixture
def no_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("no_lightning")
def test_without_lightning_a_module_works_and_is_nothing_else() -> None:
    module = make_module(4, cache_samples=True)
    assert type(module) is PatchDataModule
    assert not any("lightning" in base.__module__ for base in type(module).__mro__[2:])
    module.setup("fit")
    assert Counter(numbers(module.train_dataloader())) == dict.fromkeys(range(4), 4)
    assert type(pickle.loads(pickle.dumps(module))) is PatchDataModule
    module.teardown("fit")


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_a_module_belongs_to_the_lightning_that_is_in_use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip(name, reason="the extra 'lightning' is not installed")
    for other in {"lightning.pytorch", "pytorch_lightning"} - {name}:
        monkeypatch.setitem(sys.modules, other, None)
    module = make_module(4)
    assert isinstance(module, package.LightningDataModule)
    assert isinstance(module, PatchDataModule)
    assert type(module).__name__ == "PatchDataModule"
    other = pickle.loads(pickle.dumps(module))
    assert type(other) is type(module)


class Mine(PatchDataModule):
    """A user's own."""


def test_a_subclass_stays_one() -> None:
    module = Mine({"train": [(records(range(3)), Numbered())]}, train_transforms=crop())
    assert isinstance(module, Mine)
    assert isinstance(pickle.loads(pickle.dumps(module)), Mine)


@pytest.fixture(scope="module")
def lightning() -> Any:
    package = pytest.importorskip("lightning.pytorch", reason="the extra 'lightning' is not installed")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return package


def make_network(lightning: Any) -> Any:
    class Network(lightning.LightningModule):  # type: ignore[misc, name-defined]
        """Notes what it is given in each phase."""

        def __init__(self) -> None:
            super().__init__()
            self.network = torch.nn.Conv2d(1, 1, 3, padding=1)
            self.given: list[tuple[str, list[int]]] = []

        def training_step(self, batch: Any, _: int) -> Any:
            self.given.append(("train", numbers([batch])))
            return torch.nn.functional.mse_loss(self.network(batch["image"]), batch["label"])

        def validation_step(self, batch: Any, _: int, dataloader_idx: int = 0) -> None:
            name = ["validation", "monitor-train"][dataloader_idx]
            if not self.trainer.sanity_checking:
                self.given.append((name, numbers([batch])))

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.given.append(("test", numbers([batch])))

        def predict_step(self, batch: Any, _: int) -> Any:
            return numbers([batch])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

        def taken(self) -> dict[str, list[int]]:
            """What was given since last asked, by phase."""
            found: dict[str, list[int]] = {}
            for name, given in self.given:
                found.setdefault(name, []).extend(given)
            self.given = []
            return found

    return Network()


def make_trainer(lightning: Any, **arguments: Any) -> Any:
    quiet: dict[str, Any] = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "barebones"], False
    )
    return lightning.Trainer(accelerator="cpu", **{**quiet, **arguments})


@pytest.mark.parametrize("train_loader", ["queue", "plain"])
def test_a_trainer_fits_validates_tests_and_predicts(lightning: Any, train_loader: str) -> None:
    load = Numbered()
    splits = {
        "train": [(records(range(4)), load), (records(range(4, 6)), load)],
        "validation": [(records(range(10, 13)), load)],
        "monitor-train": [(records(range(2)), load)],
        "test": [(records(range(20, 22)), load)],
    }
    samples = 4 if train_loader == "queue" else 1
    module = PatchDataModule(
        splits,
        cache_samples=True,
        batch_size=6 * samples,
        batch_chunk_count=3,
        train_transforms=crop(samples),
        train_loader=train_loader,  # type: ignore[arg-type]
        seed=0,
        progress=False,
    )
    network = make_network(lightning)
    trainer = make_trainer(lightning, max_epochs=2, accumulate_grad_batches=module.accumulation_steps)
    trainer.fit(network, datamodule=module)
    assert trainer.global_step == 2
    given = network.taken()
    assert Counter(given["train"]) == dict.fromkeys(range(6), 2 * samples)
    assert given["validation"] == [10, 11, 12] * 2
    assert given["monitor-train"] == [0, 1] * 2
    assert Counter(load.loaded) == {**dict.fromkeys([2, 3, 4, 5, 10, 11, 12], 1), 0: 2, 1: 2}
    trainer.validate(network, datamodule=module, verbose=False)
    assert network.taken() == {"validation": [10, 11, 12], "monitor-train": [0, 1]}
    trainer.test(network, datamodule=module, verbose=False)
    assert network.taken() == {"test": [20, 21]}
    assert trainer.predict(network, datamodule=module) == [[20], [21]]


def test_a_trainer_fits_without_a_validation_and_goes_on_in_mid_epoch(lightning: Any, tmp_path: Path) -> None:
    def fit(checkpoint: Path | None = None) -> list[int]:
        network = make_network(lightning)
        saver = lightning.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
        trainer = make_trainer(lightning, max_epochs=2, enable_checkpointing=True, callbacks=[saver])
        trainer.fit(network, datamodule=make_module(6, others=(), batch_size=4), ckpt_path=checkpoint)
        taken: list[int] = network.taken()["train"]
        return taken

    whole = fit()  # 2 epochs of 6 batches of 4 patches
    assert fit(tmp_path / "step=8.ckpt") == whole[8 * 4 :]


def test_a_trainers_ranks_keep_the_modules_own_shares(lightning: Any, tmp_path: Path) -> None:
    def fit() -> None:
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        module = make_module(7, ("validation",), train_transforms=crop(2), batch_size=6, batch_chunk_count=3)
        network = make_network(lightning)

        def note() -> None:
            sampler = type(network.trainer.train_dataloader.sampler).__name__
            report = {"sampler": sampler, **network.taken()}
            (tmp_path / f"rank_{network.global_rank}.json").write_text(json.dumps(report))

        network.on_fit_end = note
        ranks = {"devices": 2, "strategy": "ddp_fork"}
        make_trainer(lightning, max_epochs=2, accumulate_grad_batches=3, **ranks).fit(network, datamodule=module)

    in_child(fit)
    one, other = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2))
    assert one["sampler"] == other["sampler"] == "EpochSampler"
    assert len(one["train"]) == len(other["train"]) == 14
    for epoch in (slice(0, 7), slice(7, 14)):
        assert len(set(one["train"][epoch]) & set(other["train"][epoch])) <= 1
    assert sorted(one["validation"] + other["validation"]) == [100, 100, 101, 101, 102, 102]
