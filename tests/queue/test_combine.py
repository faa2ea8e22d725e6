# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import time
from dataclasses import fields
from typing import Any

import pytest
import torch

from monai_patchqueue import PatchQueueLoader, QueueStats
from monai_patchqueue.queue.combine import Continued, as_plain, combined, from_plain
from tests.pipelines import make_loader


@pytest.fixture(scope="module")
def runs() -> list[QueueStats]:
    """Figures of a loader after one, two and three epochs."""
    figures = []
    with make_loader([5, 1, 3, 7, 0, 2], 1, worker_type="thread", batch_size=4, shuffle=True, repeats=2) as loader:
        for _ in range(3):
            for _ in loader:
                time.sleep(0.001)
            figures.append(loader.stats())
    return figures


def figures_of(stats: QueueStats) -> dict[str, Any]:
    return {f.name: getattr(stats, f.name) for f in fields(stats)}


def test_one_part_is_the_whole(runs: list[QueueStats]) -> None:
    for name, value in figures_of(combined([runs[-1]])).items():
        expected = getattr(runs[-1], name)
        assert value == (pytest.approx(expected) if isinstance(expected, float) else expected), name


def test_what_was_counted_twice_is_taken_off_again(runs: list[QueueStats]) -> None:
    one, two, _ = runs
    whole = combined([one, two], without=[one])
    for name, value in figures_of(whole).items():
        expected = getattr(two, name)
        if name in ("volume_expected", "transform_seconds"):
            assert dict(value) == pytest.approx(dict(expected)), name
        elif isinstance(expected, float):
            assert value == pytest.approx(expected, rel=1e-6, abs=1e-9), name
        else:
            assert value == expected, name


def test_a_run_that_goes_on_has_the_figures_of_all_runs_and_none_of_them_twice(runs: list[QueueStats]) -> None:
    one, two, three = runs
    assert figures_of(Continued()(two)) == figures_of(two)
    resumed = Continued(two)(one)
    assert resumed == combined([two, one])
    assert resumed.patches == 3 * one.patches
    taken_back = Continued(one, two)(three)  # the loader went on for an epoch after the checkpoint
    assert taken_back.patches == two.patches
    assert taken_back.volume_counts == two.volume_counts
    assert taken_back.volume_patches_max == two.volume_patches_max


def test_runs_one_after_the_other_add_up() -> None:
    one = QueueStats(batches=3, patches=12, volumes=4, seconds=2.0, starved=0.5, wait_seconds=0.3, max_wait_seconds=1.0)
    other = QueueStats(
        batches=1, patches=4, volumes=1, seconds=6.0, starved=0.1, wait_seconds=0.7, max_wait_seconds=0.7
    )
    both = combined([one, other])
    assert (both.batches, both.patches, both.volumes, both.seconds) == (4, 16, 5, 8.0)
    assert both.starved == pytest.approx((0.5 * 2 + 0.1 * 6) / 8)
    assert both.wait_seconds == pytest.approx((0.3 * 3 + 0.7) / 4)
    assert combined([QueueStats(max_wait_seconds=1.0), other]).max_wait_seconds == 1.0
    assert both.patches_per_second == 2.0


def test_ranks_side_by_side_are_faster_together() -> None:
    one = QueueStats(
        patches=40, seconds=2.0, starved=0.1, fill=0.5, num_workers=2, slab_bytes=10, bottleneck="consumer"
    )
    other = QueueStats(
        patches=20, seconds=2.0, starved=0.7, fill=0.1, num_workers=2, slab_bytes=10, bottleneck="workers:LoadImaged"
    )
    both = combined([one, other], ranks=True)
    assert (both.patches, both.patches_per_second, both.seconds) == (60, 30.0, 2.0)
    assert (both.num_workers, both.slab_bytes) == (4, 20)
    assert both.fill == pytest.approx(0.3)
    assert both.starved == pytest.approx(0.4)
    assert both.bottleneck == "workers:LoadImaged"


def test_plain_values_go_through_a_checkpoint_that_loads_weights_only(runs: list[QueueStats]) -> None:
    file = io.BytesIO()
    torch.save(as_plain(runs[-1]), file)
    file.seek(0)
    assert from_plain(torch.load(file, weights_only=True)) == runs[-1]


def test_plain_values_of_another_version_are_taken_as_far_as_they_are_known() -> None:
    stats = from_plain({"batches": 3, "invented_later": 1})
    assert stats == QueueStats(batches=3)


@pytest.fixture
def loader() -> PatchQueueLoader:
    return make_loader([2] * 3, batch_size=2)


def test_the_line_for_terminals_and_the_table_for_notebooks_have_the_figures(
    loader: PatchQueueLoader, capsys: pytest.CaptureFixture[str]
) -> None:
    loader.progress = True
    list(loader)
    stats = loader.stats()
    assert f"starved {stats.starved:.0%}, {stats.bottleneck}" in capsys.readouterr().err
    assert stats.line().startswith("queue |")
    page = loader._repr_html_()
    assert "PatchQueueLoader(volumes=3" in page
    for text in (f"{stats.starved:.0%} of the time", stats.bottleneck, "6 patches of 3 volumes"):
        assert text in page
        assert text in stats._repr_html_()
