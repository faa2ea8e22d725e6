# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import multiprocessing
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from ignite.handlers.mlflow_logger import MLflowLogger
from monai.bundle import ConfigParser
from monai.engines import SupervisedTrainer
from monai.handlers import (
    CheckpointLoader,
    CheckpointSaver,
    MetricLogger,
    MLFlowHandler,
    StatsHandler,
    TensorBoardStatsHandler,
)
from monai.transforms import CastToTyped
from torch.utils.data import DistributedSampler

from monai_patchqueue import PatchQueueLoader, QueueStats, QueueStatsHandler
from monai_patchqueue.handlers.machine import MachineMonitor
from monai_patchqueue.handlers.queue_stats import BOTTLENECKS
from monai_patchqueue.handlers.queue_stats import FIGURES as KNOWN_FIGURES
from monai_patchqueue.report.patch_tally import PatchTally
from tests.pipelines import Patches
from tests.pipelines import make_loader as make_patches_loader
from tests.processes import on_ranks

VOLUMES, PATCHES, BATCH = 3, 4, 2
BATCHES = VOLUMES * PATCHES // BATCH
FIGURES = {"queue_bottleneck", "queue_length", "queue_memory_bytes"}
FIGURES |= {f"queue_{figure}" for figure in QueueStats().scalars() if figure != "queue_length"}


def make_loader(num_workers: int = 0) -> PatchQueueLoader:
    volumes = [
        [{"image": torch.full((1, 4, 4), 10.0 * v + p), "label": torch.zeros(1, 4, 4)} for p in range(PATCHES)]
        for v in range(VOLUMES)
    ]
    return PatchQueueLoader(
        volumes,
        num_workers,
        batch_size=BATCH,
        batch_unit="patch",
        samples_per_volume=PATCHES,
        worker_type="thread",
        shuffle=True,
        seed=0,
    )


@pytest.fixture
def loader() -> Iterator[PatchQueueLoader]:
    with make_loader() as loader:
        yield loader


@pytest.fixture
def engine() -> Engine:
    return Engine(lambda engine, batch: {"loss": batch["image"].mean()})


def make_trainer(loader: PatchQueueLoader, *handlers: object, max_epochs: int = 2) -> SupervisedTrainer:
    network = torch.nn.Conv2d(1, 1, 1)
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=max_epochs,
        train_data_loader=loader,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), 1e-6),
        loss_function=torch.nn.MSELoss(),
        train_handlers=handlers,
    )


def test_every_figure_is_a_metric_after_each_iteration(loader: PatchQueueLoader, engine: Engine) -> None:
    QueueStatsHandler(loader).attach(engine)
    seen: list[dict[str, float]] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(dict(engine.state.metrics)))
    engine.run(loader, max_epochs=2)
    assert len(seen) == 2 * BATCHES
    assert all(set(metrics) == FIGURES for metrics in seen)
    assert all(type(value) is float for metrics in seen for value in metrics.values())
    patches = [metrics["queue_patches"] for metrics in seen]
    assert patches == sorted(patches)
    assert patches[0] >= BATCH
    assert patches[-1] == 2 * VOLUMES * PATCHES


def test_every_figure_is_documented() -> None:
    documented = re.findall(r"^    ``([\w<>]+)``  ", QueueStatsHandler.__doc__ or "", re.MULTILINE)
    assert documented == list(KNOWN_FIGURES)
    assert documented[: len(QueueStats().scalars())] == list(QueueStats().scalars())


def test_the_metrics_are_the_loaders_own_figures(loader: PatchQueueLoader, engine: Engine) -> None:
    QueueStatsHandler(loader, name="train").attach(engine)
    engine.run(loader)
    stats = loader.stats()
    expected = {f"train_{figure}": value for figure, value in stats.scalars().items()}
    assert {name: engine.state.metrics[name] for name in expected} == expected
    assert engine.state.metrics["train_bottleneck"] == BOTTLENECKS.index(stats.bottleneck.split(":")[0])
    assert sum(stats.volume_counts.values()) == VOLUMES * PATCHES


def test_chosen_figures_only(loader: PatchQueueLoader, engine: Engine) -> None:
    QueueStatsHandler(loader, figures=["fill", "starved"]).attach(engine)
    assert set(engine.run(loader).metrics) == {"queue_fill", "queue_starved"}


def test_an_unknown_figure_is_named_with_those_that_exist(loader: PatchQueueLoader) -> None:
    with pytest.raises(ValueError, match=r"'speed'.*patches_per_second"):
        QueueStatsHandler(loader, figures=["speed"])


def test_figures_must_not_be_one_string(loader: PatchQueueLoader) -> None:
    with pytest.raises(TypeError, match="'fill'"):
        QueueStatsHandler(loader, figures="fill")


def test_a_loader_without_statistics_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"stats\(\).*DataLoader"):
        QueueStatsHandler(torch.utils.data.DataLoader([1, 2]))  # type: ignore[arg-type]


def test_other_metrics_stay(loader: PatchQueueLoader, engine: Engine) -> None:
    engine.state.metrics["val_mean_dice"] = 0.5
    QueueStatsHandler(loader).attach(engine)
    assert engine.run(loader).metrics["val_mean_dice"] == 0.5


def test_two_loaders_have_figures_of_their_own(loader: PatchQueueLoader, engine: Engine) -> None:
    with make_loader() as other:
        for item, name in ((loader, "labelled"), (other, "unlabelled")):
            QueueStatsHandler(item, name=name, figures=["patches"]).attach(engine)
        metrics = engine.run(loader).metrics
    assert metrics == {"labelled_patches": VOLUMES * PATCHES, "unlabelled_patches": 0}


def test_attaching_twice_logs_once(loader: PatchQueueLoader, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    handler = QueueStatsHandler(loader)
    handler.attach(engine)
    handler.attach(engine)
    with caplog.at_level(logging.INFO, "monai_patchqueue"):
        engine.run(loader, max_epochs=3)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("monai_patchqueue.handlers")]
    assert len(lines) == 3
    assert all(line.startswith("queue: ") for line in lines)
    assert f"{3 * VOLUMES * PATCHES} patches" in lines[-1]


def test_the_line_an_epoch_can_be_left_out(
    loader: PatchQueueLoader, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    QueueStatsHandler(loader, epoch_log=False).attach(engine)
    with caplog.at_level(logging.INFO, "monai_patchqueue.handlers"):
        engine.run(loader)
    assert not [record for record in caplog.records if record.name.startswith("monai_patchqueue.handlers")]


def test_the_figures_survive_a_second_run(loader: PatchQueueLoader, engine: Engine) -> None:
    QueueStatsHandler(loader).attach(engine)
    engine.run(loader)
    assert engine.run(loader).metrics["queue_patches"] == 2 * VOLUMES * PATCHES


@pytest.mark.parametrize("num_workers", [0, 2])
def test_monais_handlers_show_the_figures(num_workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with make_loader(num_workers) as loader:
        collected = MetricLogger()
        board = TensorBoardStatsHandler(log_dir=str(tmp_path), iteration_log=False)
        stats = StatsHandler(iteration_log=False, name="figures_for_the_test")
        stats.logger.propagate = True
        with caplog.at_level(logging.INFO, "figures_for_the_test"):
            make_trainer(loader, QueueStatsHandler(loader), stats, board, collected).run()
        board.close()
    assert set(collected.metrics) >= FIGURES
    assert len(collected.metrics["queue_fill"]) == 2 * BATCHES
    assert "queue_patches_per_second" in caplog.text
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= FIGURES
    assert [event.value for event in events.Scalars("queue_patches")] == [12.0, 24.0]


def test_ignites_progress_bar_shows_the_figures(
    loader: PatchQueueLoader, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    QueueStatsHandler(loader).attach(engine)
    ProgressBar(mininterval=0).attach(engine, metric_names=["queue_fill", "queue_starved"])
    engine.run(loader)
    shown = capsys.readouterr().err
    assert "queue_fill=" in shown
    assert "queue_starved=" in shown


@pytest.mark.parametrize("target", ["QueueStatsHandler", "monai_patchqueue.QueueStatsHandler"])
def test_a_bundle_config_names_it(loader: PatchQueueLoader, engine: Engine, target: str) -> None:
    parser = ConfigParser({"train": {"handler": {"_target_": target, "loader": "@loader"}}, "loader": loader})
    handler = parser.get_parsed_content("train#handler")
    assert isinstance(handler, QueueStatsHandler)
    handler.attach(engine)
    assert engine.run(loader).metrics["queue_batches"] == BATCHES


def labelled_loader(**arguments: Any) -> PatchQueueLoader:
    """Patches of which every other has class 2 at its center and all but the first of each volume any foreground."""
    volumes = []
    for _ in range(VOLUMES):
        labels = torch.zeros(PATCHES, 1, 5, 5, dtype=torch.uint8)
        labels[1:, 0, 0, 0] = 1
        labels[1::2, 0, 2, 2] = 2
        volumes.append([{"image": torch.zeros(1, 5, 5), "label": label} for label in labels])
    return PatchQueueLoader(
        volumes, batch_size=BATCH, batch_unit="patch", samples_per_volume=PATCHES, seed=0, **arguments
    )


def test_classes_at_centers_and_foreground_are_metrics(engine: Engine) -> None:
    with labelled_loader() as loader:
        QueueStatsHandler(loader, label_key="label", effort=1).attach(engine)
        metrics = engine.run(loader, max_epochs=2).metrics
    assert metrics["queue_centers_0"] == metrics["queue_centers_2"] == VOLUMES * PATCHES
    assert metrics["queue_foreground_share"] == 0.75
    assert metrics["queue_last_foreground_share"] == 1.0  # unshuffled: the last two patches of a volume


def test_looking_at_labels_takes_no_more_than_its_share_of_the_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []

    def slowly(tally: PatchTally, batch: Any) -> None:
        looked.append(len(batch["label"]))
        time.sleep(0.05)

    monkeypatch.setattr(PatchTally, "add", slowly)
    with labelled_loader() as loader:
        QueueStatsHandler(loader, label_key="label").attach(engine)
        assert engine.run(loader, max_epochs=4).metrics["queue_batches"] == 4 * BATCHES
    assert looked == [BATCH]


@pytest.mark.parametrize("effort", [0.0, -1.0, 2.0])
def test_an_effort_that_is_no_share_is_refused(effort: float, loader: PatchQueueLoader) -> None:
    with pytest.raises(ValueError, match=f"effort={effort}: expected a share"):
        QueueStatsHandler(loader, label_key="label", effort=effort)


def test_labels_that_are_counted_later_are_counted_by_the_end_of_the_epoch(engine: Engine) -> None:
    with labelled_loader(batch_transform=CastToTyped("label", torch.bfloat16)) as loader:  # as batches on a GPU are
        QueueStatsHandler(loader, label_key="label", effort=1).attach(engine)
        metrics = engine.run(loader).metrics
    assert metrics["queue_centers_0"] == metrics["queue_centers_2"] == VOLUMES * PATCHES / 2
    assert metrics["queue_foreground_share"] == 0.75


def test_the_memory_of_workers_counts(engine: Engine) -> None:
    with make_loader() as loader:
        QueueStatsHandler(loader, figures=["memory_bytes"]).attach(engine)
        metrics = engine.run(loader).metrics
    resident = psutil.Process().memory_info().rss
    assert 0.5 * resident < metrics["queue_memory_bytes"] < 2 * resident

    def hold(pages: Any) -> None:
        block = bytearray(2**27)
        block[::4096] = b"x" * len(block[::4096])
        pages.send(len(block))
        pages.recv()

    here, there = multiprocessing.Pipe()
    before = MachineMonitor().scalars()["memory_bytes"]
    child = multiprocessing.get_context("fork").Process(target=hold, args=(there,))
    child.start()
    here.recv()
    during = MachineMonitor().scalars()["memory_bytes"]
    here.send(None)
    child.join()
    assert during - before > 2**27


class FakeNvml:
    """Stands for the module ``pynvml`` of nvidia-ml-py, with one GPU that is busy 87 % of the time."""

    class NVMLError_DriverNotLoaded(Exception):
        pass

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked = 0

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"gpu {index}"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        assert handle == "gpu 1"
        self.asked += 1
        if self.error is not None:
            raise self.error
        return SimpleNamespace(gpu=87, memory=12)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A machine whose second GPU the process sees."""
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "pynvml", nvml, raising=False)
    monkeypatch.setattr(torch.cuda, "_HAS_PYNVML", True)
    monkeypatch.setattr(torch.cuda, "_get_nvml_device_index", lambda device: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    return nvml


def test_the_gpus_figures_are_metrics_where_there_is_one(
    one_gpu: FakeNvml, loader: PatchQueueLoader, engine: Engine
) -> None:
    QueueStatsHandler(loader).attach(engine)
    metrics = engine.run(loader, max_epochs=2).metrics
    assert metrics["queue_gpu_utilization"] == 0.87
    assert metrics["queue_gpu_memory_bytes"] == 5 * 2**30
    assert metrics["queue_gpu_allocated_bytes"] == 2**30
    assert 1 <= one_gpu.asked < 2 * BATCHES  # not at each step


def test_a_gpu_that_does_not_tell_its_utilisation_is_asked_once(
    one_gpu: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    one_gpu.error = RuntimeError("Not Supported")
    monitor = MachineMonitor("cuda:0", interval=0)
    with caplog.at_level(logging.INFO, "monai_patchqueue"):
        assert "gpu_utilization" not in monitor.scalars()
        assert monitor.scalars()["gpu_memory_bytes"] == 5 * 2**30
    assert one_gpu.asked == 1
    assert caplog.text.count("Not Supported") == 1


def test_without_the_library_it_is_named(
    one_gpu: FakeNvml, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "_HAS_PYNVML", False)
    monkeypatch.setattr(torch.cuda, "_PYNVML_ERR", None, raising=False)
    with caplog.at_level(logging.INFO, "monai_patchqueue"):
        assert "gpu_memory_bytes" in MachineMonitor().scalars()
    assert "nvidia-ml-py" in caplog.text


def test_an_engine_on_the_cpu_has_no_gpu(one_gpu: FakeNvml, loader: PatchQueueLoader) -> None:
    handler = QueueStatsHandler(loader)
    trainer = make_trainer(loader, handler, max_epochs=1)
    trainer.run()
    assert not [name for name in trainer.state.metrics if "gpu" in name]


def test_figures_go_on_after_a_checkpoint(tmp_path: Path) -> None:
    def trainer_and_handler(loader: PatchQueueLoader) -> tuple[SupervisedTrainer, QueueStatsHandler]:
        handler = QueueStatsHandler(loader, label_key="label", effort=1)
        return make_trainer(loader, handler, max_epochs=2), handler

    with labelled_loader() as loader:
        trainer, handler = trainer_and_handler(loader)
        saver = CheckpointSaver(str(tmp_path), {"queue": handler}, save_final=True, final_filename="checkpoint.pt")
        saver.attach(trainer)
        trainer.run()
        first = loader.stats()
    with labelled_loader() as loader:
        trainer, handler = trainer_and_handler(loader)
        CheckpointLoader(str(tmp_path / "checkpoint.pt"), {"queue": handler}).attach(trainer)
        trainer.run()
        second = loader.stats()
    metrics = trainer.state.metrics
    assert metrics["queue_patches"] == 4 * VOLUMES * PATCHES
    assert metrics["queue_volume_patches_min"] == metrics["queue_volume_patches_max"] == 4 * PATCHES
    assert metrics["queue_centers_2"] == 2 * VOLUMES * PATCHES
    assert metrics["queue_seconds"] == pytest.approx(first.seconds + second.seconds)


def test_a_checkpoint_that_is_loaded_where_it_was_saved_counts_nothing_twice(
    loader: PatchQueueLoader, engine: Engine
) -> None:
    handler = QueueStatsHandler(loader)
    handler.attach(engine)
    engine.run(loader)
    handler.load_state_dict(handler.state_dict())
    assert engine.run(loader).metrics["queue_patches"] == 2 * VOLUMES * PATCHES


def test_mlflows_file_store_has_the_figures(
    loader: PatchQueueLoader, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    store = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)  # as the logger does, for good
    logger = MLflowLogger(tracking_uri=store)
    QueueStatsHandler(loader).attach(engine)
    logger.attach_output_handler(engine, Events.EPOCH_COMPLETED, tag="train", metric_names="all")
    engine.run(loader, max_epochs=2)
    logger.close()
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs(["0"])
    history = client.get_metric_history(run.info.run_id, "train queue_patches")
    assert [metric.value for metric in history] == [VOLUMES * PATCHES, 2 * VOLUMES * PATCHES]
    assert {name.removeprefix("train ") for name in run.data.metrics} >= FIGURES


def test_monais_mlflow_handler_has_the_figures(loader: PatchQueueLoader, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    store = f"sqlite:///{tmp_path}/mlruns.db"  # MONAI's handler takes no file store
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(loader, QueueStatsHandler(loader), MLFlowHandler(store, iteration_log=False))
        trainer.run()
        client = mlflow.MlflowClient(store)
        (run,) = client.search_runs([client.get_experiment_by_name("monai_experiment").experiment_id])
    assert set(run.data.metrics) >= FIGURES
    assert run.data.metrics["queue_patches"] == 2 * VOLUMES * PATCHES


def test_all_ranks_figures_are_put_together(tmp_path: Path) -> None:
    def rank() -> Any:
        dataset = Patches([4] * 6)
        sampler = DistributedSampler(dataset)
        engine = Engine(lambda engine, batch: dist.all_reduce(torch.ones(1)))
        with make_patches_loader(dataset, 1, sampler=sampler, batch_size=4) as loader:
            QueueStatsHandler(loader).attach(engine)
            metrics = engine.run(loader, max_epochs=3).metrics
        return metrics

    ranks = on_ranks(2, rank, tmp_path)
    for metrics in ranks:
        assert metrics["queue_patches"] == 3 * 12
        assert metrics["queue_all_patches"] == 2 * 3 * 12
        assert metrics["queue_all_num_workers"] == 2
        assert metrics["queue_all_volumes_seen"] == 6
        shares = [each["queue_starved"] for each in ranks]
        assert min(shares) - 1e-9 <= metrics["queue_all_starved"] <= max(shares) + 1e-9
    assert ranks[0]["queue_all_max_wait_seconds"] == max(each["queue_max_wait_seconds"] for each in ranks)


def test_a_rank_without_the_handler_stops_nobody(tmp_path: Path) -> None:
    def rank() -> Any:
        with make_patches_loader([4] * 6, batch_size=4) as loader:
            engine = Engine(lambda engine, batch: dist.all_reduce(torch.ones(1)))
            if dist.get_rank() == 1:
                QueueStatsHandler(loader).attach(engine)
            return engine.run(loader, max_epochs=2).metrics

    without, with_it = on_ranks(2, rank, tmp_path)
    assert without == {}
    assert with_it["queue_all_patches"] == with_it["queue_patches"] == 48
