# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import html
import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.data import Dataset
from monai.handlers import CheckpointLoader, CheckpointSaver, StatsHandler
from monai.transforms import Compose
from PIL import Image

from monai_patchqueue import PatchQueueLoader, QueueReportHandler, QueueStats, RandLabelPatchd
from monai_patchqueue.report import run_report
from monai_patchqueue.report.run_record import RunRecord
from monai_patchqueue.report.run_report import RunReport
from monai_patchqueue.report.sampling_plots import deviations
from monai_patchqueue.report.time_plots import stage_rates
from tests.pipelines import Patches, make_loader
from tests.processes import on_ranks
from tests.volumes import blobs, meta, numbered

PLOTS = {"waits", "wait_histogram", "fill", "capacity", "transforms", "volumes", "classes", "patch_map", "memory"}


def labelled_loader(volumes: int = 3, **arguments: Any) -> PatchQueueLoader:
    items = [{"image": meta(numbered(16, 14, 12)), "label": meta(blobs(16, 14, 12, seed=i))} for i in range(volumes)]
    crop = RandLabelPatchd(["image", "label"], "label", 6, num_samples=4, label_probabilities={0: 1, 2: 3})
    return make_loader(Dataset(items, Compose([crop])), batch_size=4, shuffle=True, **arguments)


def engine_that(step: Any = lambda engine, batch: None) -> Engine:
    return Engine(step)


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots, which take most of a report's time, are left out."""
    monkeypatch.setattr(run_report, "as_png", lambda draw: b"")
    monkeypatch.setattr(run_report, "as_svg", lambda draw, name: f"<svg>{name}</svg>")


class Page(HTMLParser):
    """A page's texts by tag, and its elements that would load anything."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(("#", "data:")):
                self.loads.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.open, tag
        while self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def test_a_run_leaves_a_page_of_one_file_and_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with labelled_loader() as loader:
        engine = engine_that()
        names = {"0": "background", "2": "tumour <core>"}
        handler = QueueReportHandler(loader, tmp_path / "out", label_key="label", class_names=names, effort=1)
        handler.attach(engine)
        handler.attach(engine)
        with caplog.at_level(logging.INFO, "monai_patchqueue.handlers"):
            engine.run(loader, max_epochs=4)
        verdict = handler._report("").headline()[0]
    assert handler.path == tmp_path / "out" / "report.html"
    page = Page(handler.path)
    assert page.loads == []
    assert "var(--ink)" in handler.path.read_text()
    assert not re.search(r"#00f[ed]0", handler.path.read_text())  # each colour is the page's
    assert page.texts["h1"] == [verdict]
    assert len(page.texts["h3"]) >= len(PLOTS)
    assert any("tumour <core>" in text for text in page.texts["text"])
    assert any("label_probabilities" in text for text in page.texts["figcaption"])
    assert "3 volumes gave 48 patches; they deviate from what the sampler asked for by 0.0 %" in html.unescape(
        handler.path.read_text()
    )
    pictures = {path.stem: path for path in (tmp_path / "out" / "report").glob("*.png")}
    assert set(pictures) == PLOTS
    for path in pictures.values():
        with Image.open(path) as picture:
            assert len(set(picture.convert("L").resize((64, 64)).get_flattened_data())) > 5, path
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if verdict in line]
    assert [line for line in lines if str(handler.path) in line]


@pytest.mark.usefixtures("no_drawing")
def test_a_run_that_fails_leaves_its_report_and_its_error(tmp_path: Path) -> None:
    def step(engine: Engine, batch: Any) -> None:
        if engine.state.iteration == 5:
            raise ArithmeticError("loss is NaN")

    with labelled_loader() as loader:
        engine = engine_that(step)
        handler = QueueReportHandler(loader, tmp_path)
        handler.attach(engine)
        with pytest.raises(ArithmeticError, match="loss is NaN"):
            engine.run(loader, max_epochs=4)
    text = html.unescape(handler.path.read_text())
    assert "The run ended with ArithmeticError: loss is NaN" in text
    assert "2 epochs, 5 batches" in text


@pytest.mark.usefixtures("no_drawing")
def test_other_handlers_of_exceptions_have_their_say(tmp_path: Path) -> None:
    seen = []

    class Watching(StatsHandler):
        def exception_raised(self, engine: Engine, error: Exception) -> None:
            seen.append(error)
            super().exception_raised(engine, error)

    def step(engine: Engine, batch: Any) -> None:
        raise KeyboardInterrupt

    with labelled_loader() as loader:
        engine = engine_that(step)
        handler = QueueReportHandler(loader, tmp_path / "a")
        handler.attach(engine)
        Watching().attach(engine)
        with pytest.raises(KeyboardInterrupt):
            engine.run(loader)
        assert seen
        assert all(isinstance(error, KeyboardInterrupt) for error in seen)
        assert handler.path.exists()

        engine = engine_that(step)
        handler = QueueReportHandler(loader, tmp_path / "b")
        handler.attach(engine)
        engine.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: engine.terminate())
        engine.run(loader)  # dealt with
        assert handler.path.exists()


@pytest.mark.usefixtures("no_drawing")
def test_a_run_without_a_batch_is_reported_too(tmp_path: Path) -> None:
    def fault(volume: int) -> None:
        raise OSError("no such disk")

    with make_loader(Patches([2] * 3, fault=fault), batch_size=2) as loader:
        engine = engine_that()
        handler = QueueReportHandler(loader, tmp_path)
        handler.attach(engine)
        with pytest.raises(OSError, match="no such disk"):
            engine.run(loader)
    assert "No batch was drawn." in handler.path.read_text()


def test_a_report_that_cannot_be_written_does_not_hide_why_the_run_failed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")

    def step(engine: Engine, batch: Any) -> None:
        raise ArithmeticError("loss is NaN")

    with labelled_loader() as loader:
        engine = engine_that(step)
        QueueReportHandler(loader, tmp_path / "file").attach(engine)
        with pytest.raises(ArithmeticError):
            engine.run(loader)
    assert "no report could be written" in caplog.text


@pytest.mark.usefixtures("no_drawing")
def test_reports_are_written_on_demand_and_when_a_run_is_interrupted(tmp_path: Path) -> None:
    with labelled_loader() as loader:
        engine = engine_that()
        handler = QueueReportHandler(loader, tmp_path, interval=2)
        handler.attach(engine)
        seen: list[bool] = []
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: seen.append(handler.path.exists()))
        engine.add_event_handler(Events.EPOCH_COMPLETED(once=3), engine.interrupt)
        engine.run(loader, max_epochs=4)
        assert seen == [False, True, True]
        assert "The run was interrupted." in handler.path.read_text()
        assert handler.write("So far.") == handler.path
        assert "So far." in handler.path.read_text()
        engine.run(loader, max_epochs=4)  # goes on
        assert "4 epochs, 12 batches" in handler.path.read_text()


@pytest.mark.usefixtures("no_drawing")
def test_a_report_goes_on_after_a_checkpoint(tmp_path: Path) -> None:
    def handler_and_engine(loader: PatchQueueLoader) -> tuple[QueueReportHandler, Engine]:
        handler, engine = QueueReportHandler(loader, tmp_path, label_key="label", effort=1), engine_that()
        handler.attach(engine)
        return handler, engine

    with labelled_loader() as loader:
        handler, engine = handler_and_engine(loader)
        CheckpointSaver(str(tmp_path), {"report": handler}, save_final=True, final_filename="state.pt").attach(engine)
        engine.run(loader, max_epochs=2)
        before = handler.record.elapsed
    with labelled_loader() as loader:
        handler, engine = handler_and_engine(loader)
        CheckpointLoader(str(tmp_path / "state.pt"), {"report": handler}).attach(engine)
        engine.run(loader, max_epochs=1)
    assert handler.stats().patches == 3 * 12
    record = handler.record
    assert record.steps == 9
    assert record.history["patches"].tolist() == [4] * 9
    assert (np.diff(record.history["time"]) > 0).all()
    assert before * 0.5 < record.history["time"][5] < record.history["time"][6] < record.elapsed
    assert record.map is not None
    assert record.map.seen == 36
    assert "9 batches" in handler.path.read_text()


@pytest.mark.usefixtures("no_drawing")
def test_each_rank_reports_on_its_own_queue(tmp_path: Path) -> None:
    def rank() -> str:
        with make_loader([2] * 4, batch_size=2) as loader:
            engine = engine_that()
            handler = QueueReportHandler(loader, tmp_path)
            handler.attach(engine)
            engine.run(loader)
            assert dist.get_rank() < 2
            return handler.path.name

    assert on_ranks(2, rank, tmp_path) == ["report.html", "report_rank_1.html"]
    assert (tmp_path / "report_rank_1" / "volumes.png").exists()


def test_thousands_of_volumes_and_long_runs_make_no_large_page(tmp_path: Path) -> None:
    record = RunRecord()
    record.begin(QueueStats())
    for step in range(5000):
        record.step(QueueStats(patches=step, epoch=step // 100, fill=0.5, last_wait_seconds=0.001 * (step % 7)), {})
    counts = {volume: 3 + volume % 5 for volume in range(3000)}
    stats = QueueStats(
        batches=5000,
        patches=15000,
        volumes=3000,
        volume_counts=counts,
        volume_expected=dict.fromkeys(counts, 5.0),
        load_seconds=0.1,
        step_seconds=0.01,
        num_workers=2,
        reuse=1.0,
    )
    with labelled_loader() as loader:
        path = RunReport(record, stats, loader).write(tmp_path)
    assert path.stat().st_size < 600_000
    assert "3000 volumes gave" in path.read_text()


def test_volumes_that_nobody_asked_for_and_such_that_never_came_deviate() -> None:
    seen, expected = deviations(QueueStats(volume_counts={0: 4, 3: 2}, volume_expected={0: 4.0, 1: 2.0}))
    assert seen.tolist() == [4, 0, 0, 2]
    assert expected.tolist() == [4, 2, 0, 0]
    seen, expected = deviations(QueueStats(volume_counts={0: 4, 1: 2}))
    assert expected.tolist() == [3, 3]


def test_the_rate_of_each_stage_is_what_it_would_give_alone() -> None:
    stats = QueueStats(
        batches=10, patches=40, volumes=5, num_workers=2, load_seconds=0.3, sample_seconds=0.1, assemble_seconds=0.01,
        step_seconds=0.02,
    )  # fmt: skip
    assert stage_rates(stats) == pytest.approx({"2 workers": 40.0, "assembly": 400.0, "training step": 200.0})


def test_a_bundle_config_names_it(tmp_path: Path) -> None:
    with labelled_loader() as loader:
        config = {"_target_": "QueueReportHandler", "loader": "@loader", "output_dir": str(tmp_path)}
        parser = ConfigParser({"handler": config, "loader": loader})
        assert isinstance(parser.get_parsed_content("handler"), QueueReportHandler)


def test_a_loader_without_statistics_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"stats\(\).*DataLoader"):
        QueueReportHandler(torch.utils.data.DataLoader([1, 2]), tmp_path)  # type: ignore[arg-type]
