# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import kept_runs, performance, performance_page
from tests.benchmarks.bars import BARS, Results, bars_table
from tests.benchmarks.cases import CASES
from tests.benchmarks.contestants import CONTESTANTS
from tests.benchmarks.kept_runs import KeptRuns
from tests.benchmarks.sampling_contestants import MAPS

DOCS = Path(__file__).parents[1] / "docs"


def a_run(patches_per_s: float, stalled: float = 0.0) -> dict[str, Any]:
    """What one process measured."""
    free = {"patches_per_s": patches_per_s, "cpu_ms_per_patch": 1.0, "volumes_per_step": None, "epochs": 2}
    waits = {"wait_p50_ms": 0.0, "wait_p99_ms": 2.0, "wait_max_ms": 3.0}
    both = {"free": {**free, "others_cores": 0.1}, "paced": {"stalled": stalled, "others_cores": 0.0, **waits}}
    return {**both, "first_batch_s": 1.0, "peak_pss_mib": 300.0}


@pytest.fixture
def kept(tmp_path: Path) -> KeptRuns:
    """The first case, with one run of each contestant, of which ours are nine times as fast as others."""
    kept = KeptRuns(tmp_path / "folder" / "runs" / "gz.json", CASES["gz"].setting)
    kept.require_current()
    kept.keep_checks({name: {"exact_epoch": True} for name in CASES["gz"].contestants})
    for name in CASES["gz"].contestants:
        kept.keep(name, 0, a_run(900.0 if name.startswith("patchqueue") else 100.0))
    return kept


def test_finished_runs_are_kept_until_the_setting_or_the_sources_change(
    kept: KeptRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = KeptRuns(kept.file, CASES["gz"].setting)
    assert not again.require_current()
    assert again.has("monai", 0)
    assert not again.has("monai", 1)
    other = KeptRuns(kept.file, {**CASES["gz"].setting, "patch_size": 32})
    assert other.require_current()
    assert not other.has("monai", 0)
    monkeypatch.setattr(kept_runs, "package_state", lambda: "edited")
    assert again.require_current()
    assert again.runs() == {}


def test_a_round_counts_when_all_have_run_in_it(kept: KeptRuns) -> None:
    kept.keep("monai", 1, a_run(50.0))
    assert {len(runs) for runs in kept.runs().values()} == {1}
    for name in CASES["gz"].contestants:
        kept.keep(name, 1, a_run(50.0))
    assert {len(runs) for runs in kept.runs().values()} == {2}


def test_bars_say_what_was_reached(kept: KeptRuns) -> None:
    kept.keep("torchio", 0, a_run(300.0))
    kept.keep("patchqueue-reader", 0, a_run(900.0, stalled=0.02))
    table = bars_table(Results({"gz": kept.runs()}, []))
    assert "| ≥ 8 × TorchIO Queue | 3.00 × | **no** |" in table
    assert "| ≥ 6 × MONAI Dataset + DataLoader | 9.00 × | yes |" in table
    assert "| consumer of 80 patches/s: stalled < 1.0% | 2.0% | **no** |" in table
    assert "ChunkedDataset" not in table  # not measured


def test_the_time_over_a_limit_counts_without_the_copy() -> None:
    ms = {
        "ours-tensors": [5.0],
        "ours-index-tensors": [2.0],
        "limit-copy": [1.0],
        "limit-map": [2.0],
        "torchio": [40.0],
    }
    scene = {"shape": [192, 192, 160], "patch_size": 64, "kind": "label"}
    table = bars_table(Results({}, [{"scene": scene, "ms": ms, "titles": {name: name for name in ms}}]))
    assert "≤ 2 × limit-map | 192×192×160, 64³: 2.0 × | yes |" in table
    assert "≥ 10 × torchio | 192×192×160, 64³: 8.0 × | **no** |" in table
    assert "≤ 1.5 × limit-copy | 192×192×160, 64³: 2.0 × | **no** |" in table


def test_the_page_is_written_from_what_is_kept(kept: KeptRuns, tmp_path: Path) -> None:
    (tmp_path / "docs" / "_static").mkdir(parents=True)
    page = tmp_path / "docs" / "performance.md"
    page.write_text((DOCS / "performance.md").read_text(encoding="utf-8"), encoding="utf-8")
    parser = argparse.ArgumentParser()
    performance.add_arguments(parser)
    options = ["--folder", str(tmp_path / "folder"), "--page-only", "--docs", str(page.parent)]
    assert performance.main(parser.parse_args(options)) == 0
    text = page.read_text(encoding="utf-8")
    assert "| TorchIO Queue | 100 | 9.00 x |" in text
    assert text.count("<!-- end -->") == (DOCS / "performance.md").read_text(encoding="utf-8").count("<!-- end -->")
    assert sorted(path.name for path in (tmp_path / "docs/_static").iterdir()) == [
        "performance_paced.png",
        "performance_throughput.png",
    ]


def test_every_case_and_bar_is_of_contestants_and_has_its_place_on_the_page() -> None:
    assert {name for case in CASES.values() for name in case.contestants} <= set(CONTESTANTS)
    named = [vars(bar) for bar in BARS if "case" in vars(bar)]
    assert all({bar["ours"], *bar.get("others", ())} <= set(CASES[bar["case"]].contestants) for bar in named)
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    plots = [f"plot-{name}" for name in performance_page.PLOTS]
    regions = ["machine", "bars", "spent", *(f"sampling-{kind}" for kind in MAPS), *plots, *CASES]
    assert performance_page.fill(page, dict.fromkeys(regions, "filled")).count("\nfilled\n") == len(regions)
    with pytest.raises(ValueError, match="no region 'nobody'"):
        performance_page.fill(page, {"nobody": ""})
    json.dumps([case.setting for case in CASES.values()])
