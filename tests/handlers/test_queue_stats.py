# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.bundle import ConfigParser
from monai.engines import SupervisedTrainer
from monai.handlers import MetricLogger, StatsHandler, TensorBoardStatsHandler

from monai_patchqueue import PatchQueueLoader, QueueStats, QueueStatsHandler
from monai_patchqueue.handlers.queue_stats import BOTTLENECKS
from monai_patchqueue.handlers.queue_stats import FIGURES as KNOWN_FIGURES

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
