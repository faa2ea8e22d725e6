# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.benchmarks import check, evenness, harness, measure, predictions, report, sampling, slow_storage
from tests.benchmarks.contestants import CONTESTANTS, DEFAULT
from tests.benchmarks.pipelines import KEYS
from tests.benchmarks.sampling_contestants import Scene
from tests.benchmarks.setup import Setup
from tests.benchmarks.volumes import write_volumes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    items = write_volumes(tmp_path_factory.mktemp("volumes"), 3, (40, 36, 32))
    return Setup(
        items, patch_size=16, samples_per_volume=4, queue_length=6, batch_size=2, num_workers=0, epochs=1, sleep=0.001
    )


PREPARED = ("patchqueue-store", "monai-persistent", "patchqueue-cache-index", "monai-cache-index")
LIMITS = ("limit-decode", "limit-copy", "limit-ram")


@pytest.mark.parametrize("name", [*DEFAULT, *PREPARED, *LIMITS])
def test_a_contestant_delivers_the_stock_pipelines_patches_and_is_timed(name: str, tiny: Setup) -> None:
    contestant = CONTESTANTS[name]
    pytest.importorskip(contestant.requires)
    checked = measure.check_contestant(contestant, tiny)
    if contestant.layout:
        assert checked["patches"] == tiny.patches_per_epoch
        assert checked["exact_epoch"]
    run = {**measure.time_contestant(contestant, tiny), "peak_pss_mib": 1.0}
    assert run["free"]["patches_per_s"] > 0
    assert 0 <= run["paced"]["stalled"] <= 1
    assert contestant.title in report.table({name: [run]}, {name: checked}, name)


def test_a_patch_from_another_place_is_found(tiny: Setup) -> None:
    loader = [*CONTESTANTS["monai"].build(tiny)]
    loader[1]["image"][0, 0, 3, 3, 3] += 1
    with pytest.raises(AssertionError, match=r"image patch at .* voxels differ"):
        check.check_delivery(loader, check.unpack_monai, tiny)


def test_a_contestants_process_is_measured_from_outside(tiny: Setup) -> None:
    result = harness.run([CONTESTANTS["limit-ram"]], "time", tiny)
    assert result["measured"]["limit-ram"]["free"]["patches_per_s"] > 0
    assert result["peak_pss_mib"] > 10


def test_a_contestants_error_is_reported(tiny: Setup) -> None:
    with pytest.raises(harness.ContestantFailed, match=r"limit-ram \(time\) ended with status 1[\s\S]*non-negative"):
        harness.run([CONTESTANTS["limit-ram"]], "time", replace(tiny, sleep=-1.0))


def test_predictions_are_compared_with_what_loaders_give(
    tiny: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = [predictions.Setting(0), predictions.Setting(1, samples_per_volume=2, repeats=2, step=0.001)]
    monkeypatch.setattr(predictions, "SETTINGS", [replace(setting, queue_length=6) for setting in settings])
    monkeypatch.setattr(predictions, "write_volumes", lambda *_: tiny.items)
    parser = argparse.ArgumentParser()
    predictions.add_arguments(parser)
    written = tmp_path / "runs.json"
    options = ["--patch-size", "16", "--seconds", "0.2", "--rounds", "1", "--json", str(written)]
    assert predictions.main(parser.parse_args(options)) == 0
    assert "| 1 | 2 | 6 | 2 | 1 ms |" in capsys.readouterr().out
    [runs] = json.loads(written.read_text())
    assert all(run["predicted"] > 0 and run["measured"] > 0 for run in runs)


def test_choosing_and_cutting_patches_is_timed_scene_by_scene(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parser = argparse.ArgumentParser()
    sampling.add_arguments(parser)
    written = tmp_path / "times.json"
    options = ["--shape", "40", "36", "32", "--patch-size", "16", "--rounds", "2", "--json", str(written)]
    assert sampling.main(parser.parse_args(options)) == 0
    assert capsys.readouterr().out.count("| limit: copy of the patches |") == 3
    results = json.loads(written.read_text())["results"]
    assert [result["scene"]["kind"] for result in results] == ["label", "rare-class", "weighted"]
    assert all(len(times) == 2 and min(times) > 0 for result in results for times in result["ms"].values())
    monkeypatch.setattr(sampling, "make_item", None)
    monkeypatch.setattr(sampling, "check", lambda _: None)
    assert sampling.main(parser.parse_args(options)) == 0  # what is written is not timed again


def test_a_way_of_sampling_that_gives_other_patches_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    corner = {key: torch.zeros(1, 16, 16, 16) for key in KEYS}
    monkeypatch.setattr(sampling, "delivered", lambda *_: [corner] * 8)
    with pytest.raises(AssertionError, match=r"image patch at \[0, 0, 0\] differs from the volume"):
        sampling.check(Scene((40, 36, 32), 16, "label"))


def test_a_random_queue_draws_as_evenly_as_theory_predicts(tmp_path: Path) -> None:
    draws = evenness.Draws(items=40, steps=600, batch_size=4, queue_length=16, num_workers=1)
    evenness.write_items(tmp_path, draws.items)
    counts = evenness.count_ours(tmp_path, draws)
    assert counts.sum() == 600 * 4
    theory = evenness.predicted(draws)
    assert abs(evenness.variation(counts) / theory - 1) < 3 / (2 * draws.items) ** 0.5
    evenness.plot({"ours": counts}, draws, tmp_path / "draws.svg")
    assert "coefficient of variation" in (tmp_path / "draws.svg").read_text()


def test_training_on_slow_storage_is_timed() -> None:
    storage = slow_storage.Storage(0.02, items=40, batch_size=4, queue_length=8, num_workers=1)
    policy = slow_storage.Policy("onsample", 16)
    results = [slow_storage.train_plainly(storage, 4), slow_storage.train_from_queue(storage, policy, 12)]
    plain, queue = results
    assert plain.distinct == plain.steps * storage.batch_size
    assert 13 * 4 / (8 + 13 // 4) <= queue.reuse <= 13 * 4 / 8
    assert 0 < queue.distinct <= 8 + 13 // 4
    assert slow_storage.table(results).count("\n") == 3
