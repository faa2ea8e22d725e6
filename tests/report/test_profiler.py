# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from monai.data import DataLoader

from monai_patchqueue.queue.cpus import available_cpus
from monai_patchqueue.report.model import deliverable
from monai_patchqueue.report.profile_text import advice_of, profile_as_text
from monai_patchqueue.report.profiler import PipelineProfile, measure, profile_pipeline
from tests.report.slow_pipelines import Pipeline, Sleep

SLOW = Pipeline(load=0.04, cut=0.004, augment=Sleep(0.002), arguments={"queue_length": 16})


@pytest.fixture(scope="module")
def profile() -> PipelineProfile:
    with SLOW.loader() as loader:
        return profile_pipeline(loader, seconds=0.5, step=0.01, progress=False)


def test_what_volumes_take_and_what_patches_take_are_told_apart(profile: PipelineProfile) -> None:
    assert profile.times.volume == pytest.approx(0.04, rel=0.25)
    assert profile.times.patch == pytest.approx(0.006, rel=0.4)
    assert profile.times.volume_cpu < 0.01
    assert profile.stats.transform_seconds["LoadSlowly"] == pytest.approx(0.04, rel=0.25)
    assert {run.settings.samples_per_volume for run in profile.runs} == {4, 8}


@pytest.mark.parametrize(("num_workers", "samples"), [(0, 4), (3, 4), (6, 2), (2, 12)])
def test_other_settings_run_as_fast_as_predicted(profile: PipelineProfile, num_workers: int, samples: int) -> None:
    with SLOW.loader() as loader:
        run = measure(loader, 0.5, progress=False, num_workers=num_workers, samples_per_volume=samples)
        assert loader.dataset.transform.transforms[1].num_samples == 4
    predicted = deliverable(replace(profile.times, step=0.0), replace(run.settings, cpus=8.0))
    assert run.patches_per_second == pytest.approx(predicted, rel=0.25)


def test_the_advice_of_a_profile_ends_the_waiting_that_it_predicts(profile: PipelineProfile) -> None:
    profile = replace(profile, settings=replace(profile.settings, cpus=8.0))
    advice, promise = advice_of(profile)
    text = profile_as_text(profile, advice, promise)
    assert "The step would wait" in text
    assert promise == "end it"
    before, after = (
        Pipeline.run(replace(SLOW, step=0.01)),
        Pipeline.run(replace(SLOW, step=0.01).changed(advice[0].changes)),
    )
    assert after[0].starved < before[0].starved / 2


def test_a_profile_advises_nothing_where_the_step_never_waits(profile: PipelineProfile) -> None:
    slow_step = replace(profile, times=replace(profile.times, step=0.2))
    assert advice_of(slow_step) == ((), "")
    assert "never waits" in profile_as_text(slow_step, (), "")


def test_other_programs_that_keep_processors_busy_are_mentioned(profile: PipelineProfile) -> None:
    assert "Other programs kept 1.5 of 2 processors" in profile_as_text(
        replace(profile, others=1.5, settings=replace(profile.settings, cpus=2.0)), (), ""
    )


def test_a_loader_of_another_kind_is_timed_as_it_is_too() -> None:
    with Pipeline(load=0.02, augment=Sleep(0.001), volumes=8).loader() as queue:
        profile = profile_pipeline(DataLoader(queue.dataset, batch_size=2), seconds=0.3, progress=False)
    assert profile.own_patches_per_second == pytest.approx(4 / 0.024, rel=0.3)
    assert "The bundle's own loader" in profile_as_text(profile, (), "")


def test_a_containers_quota_limits_the_processors(tmp_path: Path) -> None:
    unlimited = available_cpus(tmp_path)
    assert unlimited >= 1
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert available_cpus(tmp_path) == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert available_cpus(tmp_path) == unlimited
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("25000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert available_cpus(tmp_path) == 0.25
