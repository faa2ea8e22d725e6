# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ast
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser, verify_net_in_out
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai_patchqueue import PatchQueueLoader
from monai_patchqueue.data.synthetic import SYNTHETIC_LABELS, make_synthetic_dataset
from tests.programs import Interpreter, Program

BUNDLE = Path(__file__).parents[2] / "bundles" / "patch_segmentation"
CONFIG = BUNDLE / "configs" / "train.json"
METADATA = BUNDLE / "configs" / "metadata.json"
REAL_DATA = os.environ.get("PATCHQUEUE_TEST_DATA")
VOLUMES = 4

pytestmark = pytest.mark.usefixtures("global_state_is_restored")


def start_bundle(interpreter: Interpreter, folder: Path, fresh: bool = False, **settings: object) -> Program:
    """Begin to train as a user does, in a process and a working folder of its own."""
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return interpreter.start("-m", "monai.bundle", "run", "--config_file", str(CONFIG), *flags, cwd=folder, fresh=fresh)


def run_bundle(interpreter: Interpreter, folder: Path, **settings: object) -> str:
    """Train to the end; all that it printed."""
    program = start_bundle(interpreter, folder, **settings)
    assert program.wait(280) == 0, program.errors[-5000:]
    return program.output + program.errors


def losses(folder: Path) -> dict[int, float]:
    """The loss of each step, as TensorBoard has it."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train_loss")}


def metric(output: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"Metrics -- .*?\b{name}: ([0-9.]+)", output)]


def documented_settings() -> dict[str, str]:
    """Setting and default of each row in the README's table."""
    table = (BUNDLE / "docs" / "README.md").read_text(encoding="utf-8").split("## Settings")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:3] == "| `"]
    return {
        name.strip("` "): default.strip("` ")
        for names, defaults, _ in rows
        for name, default in zip(names.split(","), [defaults] if "[" in defaults else defaults.split(","), strict=False)
    }


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bundle") / "data"
    return make_synthetic_dataset(folder, num_volumes=VOLUMES, shape=(40, 36, 32), progress=False)


@pytest.fixture
def parser(small_data: str, tmp_path: Path) -> Iterator[ConfigParser]:
    parser = ConfigParser()
    parser.read_config(CONFIG)
    parser.update({"dataset_dir": small_data, "num_workers": 0, "output_dir": str(tmp_path / "out")})
    yield parser
    if "train::dataloader" in parser.ref_resolver.resolved_content:
        parser.get_parsed_content("train::dataloader").close()


@pytest.mark.slow
def test_it_learns_the_frequent_classes_of_its_own_data(interpreter: Interpreter, tmp_path: Path) -> None:
    output = run_bundle(interpreter, tmp_path, max_epochs=7, val_interval=7, batch_size=4)
    loss = metric(output, "train_mean_loss")
    assert len(loss) == 7
    assert loss[-1] < 0.7 * loss[0]
    # Fewer epochs than by default, so less than the 0.7 that a full run has to reach.
    assert metric(output, "val_dice_grainy_organ")[-1] > 0.5
    assert metric(output, "val_dice_layered_organ")[-1] > 0.5
    assert (tmp_path / "runs" / "patch_segmentation" / "model.pt").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA, reason="PATCHQUEUE_TEST_DATA does not name a folder with real volumes")
def test_it_learns_on_real_volumes(interpreter: Interpreter, tmp_path: Path) -> None:
    settings = {"dataset_dir": REAL_DATA, "max_epochs": 2, "val_interval": 2, "num_folds": 7, "num_samples": 24}
    output = run_bundle(interpreter, tmp_path, **settings)
    loss = metric(output, "train_mean_loss")
    assert loss[-1] < loss[0]
    assert metric(output, "val_mean_dice")[-1] > 0.1


def test_a_run_shows_progress_queue_figures_and_dice_and_leaves_a_network(
    interpreter: Interpreter, small_data: str, tmp_path: Path
) -> None:
    settings = {"max_epochs": 2, "val_interval": 1, "num_samples": 4, "batch_size": 2, "patch_size": [16, 16, 16]}
    output = run_bundle(interpreter, tmp_path, fresh=True, dataset_dir=small_data, num_workers=1, **settings)
    assert re.search(r"Epoch \[2/2\]: .*\[6/6\] 100%", output)
    assert re.search(
        r"queue_fill=[0-9.]+, queue_patches_per_second=[0-9.]+, queue_starved=[0-9.]+, loss=[0-9.]+", output
    )
    assert len(re.findall(r"queue: epoch", output)) == 2
    assert metric(output, "queue_patches") == [12, 24]
    for name in ("val_mean_dice", "val_dice_grainy_organ", "val_dice_layered_organ", "val_dice_lesion"):
        assert len(metric(output, name)) == 2

    folder = tmp_path / "runs" / "patch_segmentation"
    assert list(folder.glob("events.out.tfevents.*"))
    assert "grainy_organ" in (folder / "report.html").read_text(encoding="utf-8")
    state = torch.load(folder / "model.pt", weights_only=True)
    parser = ConfigParser()
    parser.read_config(CONFIG)
    parser["dataset_dir"] = small_data
    parser.get_parsed_content("network_def").load_state_dict(state)


def test_the_same_seed_gives_the_same_network(interpreter: Interpreter, small_data: str, tmp_path: Path) -> None:
    settings = {"dataset_dir": small_data, "max_epochs": 1, "val_interval": 1, "num_samples": 4}
    networks = []
    for workers in (0, 2):
        folder = tmp_path / f"workers_{workers}"
        run_bundle(
            interpreter,
            tmp_path,
            output_dir=folder,
            num_workers=workers,
            device="cpu",
            patch_size=[16, 16, 16],
            **settings,
        )
        networks.append(torch.load(folder / "model.pt", weights_only=True))
    first, second = networks
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_losses_of_an_unbroken_one(
    interpreter: Interpreter, small_data: str, tmp_path: Path
) -> None:
    settings = {"max_epochs": 3, "val_interval": 3, "num_samples": 4, "batch_size": 2, "patch_size": [16, 16, 16]}
    settings |= {"dataset_dir": small_data, "checkpoint_interval": 1, "num_workers": 1}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_bundle(interpreter, tmp_path, output_dir=whole, **settings)
    program = start_bundle(interpreter, tmp_path, output_dir=broken, **settings)
    while program.poll() is None and not (broken / "checkpoint.pt").exists():
        time.sleep(0.01)
    os.kill(program.pid, signal.SIGKILL)
    assert program.wait(20) == -signal.SIGKILL
    done = torch.load(broken / "checkpoint.pt", weights_only=True)["trainer"]["iteration"]
    assert 0 < done < 18
    run_bundle(interpreter, tmp_path, output_dir=broken, resume=True, **settings)
    assert len(losses(whole)) == 18
    resumed = {step: loss for step, loss in losses(broken).items() if step > done}
    assert resumed == {step: loss for step, loss in losses(whole).items() if step > done}
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, broken)]
    assert states[0]["loader"] == states[1]["loader"]
    assert states[0]["queue_stats"]["stats"]["patches"] == states[1]["queue_stats"]["stats"]["patches"] == 36
    assert states[0]["queue_report"]["record"]["steps"] == states[1]["queue_report"]["record"]["steps"] == 18
    assert "18 batches" in (broken / "report.html").read_text(encoding="utf-8")
    assert all(torch.equal(value, states[1]["network"][key]) for key, value in states[0]["network"].items())


def test_every_documented_setting_is_one_with_the_documented_default() -> None:
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    settings = documented_settings()
    assert len(settings) > 12
    assert set(settings) <= set(config)
    for name, default in settings.items():
        value = config[name]
        if not (isinstance(value, str) and value.startswith("$")):
            assert (value if isinstance(value, str) else json.dumps(value)) == default, name


def test_every_documented_setting_has_its_effect(parser: ConfigParser, small_data: str, tmp_path: Path) -> None:
    values = {
        "dataset_dir": small_data,
        "output_dir": str(tmp_path / "elsewhere"),
        "max_epochs": 7,
        "val_interval": 3,
        "learning_rate": 0.5,
        "patch_size": [8, 12, 16],
        "num_samples": 6,
        "batch_size": 3,
        "queue_length": 9,
        "num_workers": 0,
        "label_probabilities": {"0": 1, "3": 2},
        "num_folds": 2,
        "fold": 1,
        "val_cache_num": 1,
        "resume": True,
        "checkpoint_interval": 2,
        "seed": 5,
        "device": "cpu",
    }
    assert set(values) == set(documented_settings())
    parser.update(values)
    parser.get_parsed_content("initialize::0")
    assert torch.initial_seed() == 5
    trainer, loader = (parser.get_parsed_content(f"train::{name}") for name in ("trainer", "dataloader"))
    assert isinstance(loader, PatchQueueLoader)
    assert trainer.state.max_epochs == 7
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5
    assert (loader.batch_size, loader.queue_length, loader.num_workers) == (3, 9, 0)
    assert len(loader) == 2 * 6 / 3
    batch = next(iter(loader))
    assert batch["image"].shape == batch["label"].shape == (3, 1, 8, 12, 16)
    # The patches' centers, as RandLabelPatchd defines them, are of the two classes that were given a probability.
    assert set(loader.dataset[0][0]["label"][0, 4:5, 6:7, 8:9].unique().tolist()) <= {0, 3}
    training, validation = (
        {item["image"] for item in parser.get_parsed_content(f"{part}::dataset").data} for part in ("train", "validate")
    )
    assert [Path(path).name for path in sorted(validation)] == ["volume_001.nii.gz", "volume_003.nii.gz"]
    assert len(training) == 2
    assert not training & validation
    assert parser.get_parsed_content("validate::dataset").cache_num == 1
    assert parser["resume"]
    assert parser["checkpoint_interval"] == 2
    assert parser["train::handlers::3::interval"] == "@val_interval"
    assert parser.get_parsed_content("validate::handlers::2").save_dir == str(tmp_path / "elsewhere")


@pytest.mark.parametrize("fold", range(3))
def test_each_case_is_for_training_or_validation_never_both(parser: ConfigParser, fold: int) -> None:
    parser.update({"fold": fold, "num_folds": 3})
    parts = [
        [item["image"] for item in parser.get_parsed_content(f"{part}::dataset").data] for part in ("train", "validate")
    ]
    assert sorted(parts[0] + parts[1]) == sorted(item["image"] for item in parser.get_parsed_content("datalist"))
    assert parts[1]


def test_handlers_stand_where_configs_for_several_gpus_expect_them(parser: ConfigParser) -> None:
    targets = [handler["_target_"] for handler in parser["train::handlers"]]
    assert targets[0] == "monai_patchqueue.QueueStatsHandler"
    # `multi_gpu_train.json` takes handlers[: -2] on all ranks but the first.
    assert targets[-2:] == ["StatsHandler", "TensorBoardStatsHandler"]


def test_the_metadata_name_the_classes_of_the_synthetic_data_and_this_version() -> None:
    metadata = json.loads(METADATA.read_text(encoding="utf-8"))
    assert metadata["version"] in metadata["changelog"]
    formats = metadata["network_data_format"]
    for tensor in (formats["inputs"]["image"], formats["outputs"]["pred"]):
        assert len(tensor["channel_def"]) == tensor["num_channels"]
    channels = {int(value): name for value, name in formats["outputs"]["pred"]["channel_def"].items()}
    assert channels == SYNTHETIC_LABELS


def test_the_network_is_as_the_metadata_says(small_data: str) -> None:
    verify_net_in_out("network_def", str(METADATA), str(CONFIG), device="cpu", n=8, dataset_dir=small_data)


def test_a_data_set_with_several_channels_and_gaps_in_its_labels_fits(parser: ConfigParser, tmp_path: Path) -> None:
    description = {
        "modality": {"0": "T1", "1": "T2"},
        "labels": {"0": "background", "2": "tumour core"},
        "training": [],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    parser["dataset_dir"] = str(tmp_path)
    assert parser.get_parsed_content("num_classes") == 3
    assert set(parser.get_parsed_content("validate::additional_metrics")) == {"val_dice_tumour_core"}
    assert parser.get_parsed_content("network_def")(torch.zeros(1, 2, 16, 16, 16)).shape[1] == 3


def test_the_config_is_json_that_python_can_evaluate() -> None:
    def expressions(config: object) -> Iterator[str]:
        if isinstance(config, dict | list):
            for value in config.values() if isinstance(config, dict) else config:
                yield from expressions(value)
        elif isinstance(config, str) and config.startswith("$"):
            yield config[1:]

    found = list(expressions(json.loads(CONFIG.read_text(encoding="utf-8"))))
    assert len(found) > 20
    for expression in found:
        ast.parse(re.sub(r"@[\w#:]*\w", "reference", expression))
