# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from pathlib import Path

import monai.bundle
import pytest

from monai_patchqueue.cli import main
from tests.report.bundles import write_bundle

QUICK = ["--no_progress", "--seconds", "0.2"]
FEW = ["--no_progress", "--patches", "8"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


def test_profile_prints_what_each_transform_takes_and_writes_settings_that_a_bundle_runs_with(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path(config).read_bytes()
    output = tmp_path / "override.json"
    assert main(["profile", "--config_file", config, *QUICK, "--step_ms", "1", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    for part in ("LoadImaged", "RandCropByPosNegLabeld", "RandFlipd", "collating", "4 samples", "8 samples", "memory"):
        assert part in text
    assert Path(config).read_bytes() == before
    values = json.loads(output.read_text())
    assert values["train#dataloader#_target_"] == "monai_patchqueue.PatchQueueLoader"
    assert set(values) > {"train#dataloader#batch_unit"}
    monai.bundle.run(config_file=[config, str(output)], logging_file=False)


def test_values_of_the_config_can_be_overridden(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--config_file",
        f"['{config}']",
        "--no_progress",
        "--samples",
        "3",
        "--train#crop#spatial_size=[8, 8, 8]",
    ]
    assert main(["inspect", *arguments, "--patches", "7"]) == 0
    assert "took 9 patches of 8 × 8 × 8 voxels" in capsys.readouterr().out


def test_inspect_writes_a_picture(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "case.png"
    assert main(["inspect", "--config_file", config, "--case", "1", *FEW, "--output", str(picture)]) == 0
    assert "class" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile", "--config_file", "nowhere.json"], "no config file 'nowhere.json'"),
        (["profile", "--config_file", "CONFIG", "--dataloader_id", "validate"], "has no 'validate'"),
        (
            ["profile", "--config_file", "CONFIG", "--dataloader_id", "samples"],
            "samples is a int; expected a DataLoader",
        ),
        (["profile", "--config_file", "CONFIG", "--step_ms", "-1"], "--step_ms -1.0: expected 0 or more"),
        (["profile", "--config_file", "CONFIG", "--output", "settings.txt"], "ends in .json"),
        (["profile", "--config_file", "CONFIG", "--num_workers"], "--num_workers has no value"),
        (["profile", "--config_file", "CONFIG", "stray"], "'stray' is neither an option"),
        (["profile", "--config_file", "CONFIG", "--dataset_dir", "/nowhere"], "/nowhere"),
        (["profile", *QUICK, "--config_file", "CONFIG", "--datalist", "[{'image': '/no.nii'}]"], "/no.nii"),
        (["inspect", "--config_file", "CONFIG", "--case", "9"], "no volume 9"),
        (["inspect", "--config_file", "CONFIG", "--patches", "0"], "--patches 0: expected 1 or more"),
        (["inspect", "--config_file", "CONFIG", "--output", "/nowhere/x.png"], "in a folder that is there"),
        (["inspect", "--config_file", "CONFIG", "--output", "x.gif"], ".jpg or .webp"),
    ],
)
def test_errors_are_told_in_one_line(
    config: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([config if word == "CONFIG" else word for word in arguments]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("monai-patchqueue: error: ")
    assert message in errors[0]


@pytest.mark.parametrize(
    "arguments", [[], ["profile"], ["profile", "--config_file", "x", "--seconds", "soon"], ["fly"]]
)
def test_wrong_usage_is_told_in_one_line_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "see --help" in errors[0]


@pytest.mark.parametrize("command", [[], ["profile"], ["inspect"]])
def test_help_has_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "examples:\n  python -m monai_patchqueue" in capsys.readouterr().out


def test_without_matplotlib_the_extra_is_named(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["inspect", "--config_file", config, *FEW, "--output", "x.png"]) == 2
    captured = capsys.readouterr()
    assert "monai_patchqueue[plot]" in captured.err
    assert "of centers" in captured.out
