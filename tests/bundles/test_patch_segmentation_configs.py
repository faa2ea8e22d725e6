# SPDX-License-Identifier: Apache-2.0
"""Evaluation, inference, export and the variants of training, as configs that MONAI runs."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_metadata
from monai.bundle import run as run_bundle
from monai.data import MetaTensor, load_net_with_metadata
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, LoadImage, NormalizeIntensity, Orientation

from monai_patchqueue.data.synthetic import make_synthetic_dataset
from tests.programs import Interpreter

BUNDLE = Path(__file__).parents[2] / "bundles" / "patch_segmentation"
CONFIGS = BUNDLE / "configs"
VOLUMES = 4

pytestmark = pytest.mark.usefixtures("global_state_is_restored")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small oblique volumes."""
    folder = tmp_path_factory.mktemp("bundle") / "data"
    return Path(make_synthetic_dataset(folder, num_volumes=VOLUMES, shape=(44, 36, 40), progress=False))


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle's network with weights that give every class somewhere."""
    torch.manual_seed(3)
    network = content("network_def", "train.json", dataset_dir=str(data))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    file = tmp_path_factory.mktemp("models") / "model.pt"
    torch.save(network.state_dict(), file)
    return file


def files(*names: str) -> list[str]:
    return [str(CONFIGS / name) for name in names]


def content(key: str, *names: str, **settings: Any) -> Any:
    """A part of configs, made."""
    parser = ConfigParser()
    parser.read_config(files(*names))
    parser.update({"num_workers": 0, **settings})
    return parser.get_parsed_content(key)


def run(*names: str, **settings: Any) -> None:
    """Run configs, as ``python -m monai.bundle run`` does."""
    run_bundle(config_file=files(*names), logging_file=False, num_workers=0, device="cpu", **settings)


@pytest.fixture(scope="module")
def predictions(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predictions")
    run("inference.json", dataset_dir=str(data), model_file=str(model), prediction_dir=str(folder))
    return folder


def test_inference_gives_what_a_sliding_window_gives_on_the_images_own_grid(
    data: Path, model: Path, predictions: Path
) -> None:
    network = content("network_def", "train.json", dataset_dir=str(data))
    network.load_state_dict(torch.load(model, weights_only=True))
    prepare = Compose(
        [LoadImage(ensure_channel_first=True), Orientation("RAS", labels=None), NormalizeIntensity(channel_wise=True)]
    )
    window = SlidingWindowInferer((32, 32, 32), 4, overlap=0.25, mode="gaussian")
    for number in range(VOLUMES):
        image = nib.load(data / "imagesTr" / f"volume_{number:03d}.nii.gz")
        assert not np.allclose(image.affine[:3, :3], np.diag(np.diag(image.affine[:3, :3])))  # oblique
        predicted = nib.load(predictions / f"volume_{number:03d}_seg.nii.gz")
        assert predicted.get_data_dtype() == np.uint8
        assert predicted.shape == image.shape
        np.testing.assert_allclose(predicted.affine, image.affine, atol=1e-4)
        prepared = prepare(image.get_filename())
        with torch.no_grad():
            labels = window(prepared[None], network)[0].argmax(0, keepdim=True)
        expected = Orientation("LPS", labels=None)(MetaTensor(labels.float(), affine=prepared.affine))[0].numpy()
        assert len(np.unique(expected)) > 1
        assert np.mean(predicted.get_fdata() != expected) < 1e-3


def test_of_large_volumes_label_maps_are_written_to_files_as_they_come(
    data: Path, model: Path, predictions: Path, tmp_path: Path
) -> None:
    settings = {"dataset_dir": str(data), "model_file": str(model), "prediction_dir": str(tmp_path)}
    run("inference.json", "large_volumes.json", patches_at_once=3, **settings)
    load = Compose([LoadImage(ensure_channel_first=True), Orientation("RAS", labels=None)])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{number:04d}_volume_{number:03d}.nii" for number in range(VOLUMES)]
    for name in names:
        mapped, compressed = load(tmp_path / name), load(predictions / f"{name[5:-4]}_seg.nii.gz")
        assert (mapped != compressed).float().mean() < 1e-3  # the image was normalized with another last bit
        np.testing.assert_allclose(mapped.affine, compressed.affine, atol=1e-4)


def test_the_evaluations_dice_is_that_of_the_predictions_that_it_can_save(
    data: Path, model: Path, tmp_path: Path
) -> None:
    settings = {
        "dataset_dir": str(data),
        "model_file": str(model),
        "output_dir": str(tmp_path),
        "num_folds": 2,
        "fold": 0,
    }
    run("train.json", "evaluate.json", **settings, **{"validate#postprocessing#transforms#1#_disabled_": False})
    with (tmp_path / "evaluation" / "val_mean_dice_raw.csv").open() as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + 2
    for name, *dice in rows[1:]:
        case = Path(name).name.removesuffix(".nii.gz")
        predicted = nib.load(tmp_path / "evaluation" / f"{case}_seg.nii.gz").get_fdata()
        label = nib.load(data / "labelsTr" / f"{case}.nii.gz").get_fdata()
        for value in (1, 2, 3):
            both = np.sum((predicted == value) & (label == value))
            expected = 2 * both / (np.sum(predicted == value) + np.sum(label == value))
            assert float(dice[value - 1]) == pytest.approx(expected, abs=1e-3)


def test_weighted_sampling_takes_the_datas_weight_maps(data: Path) -> None:
    weights = {"weights": "$[item['weight'] for item in @cases]", "num_samples": 8, "patch_size": [8, 8, 8]}
    loader = content("train#dataloader", "train.json", "weighted.json", dataset_dir=str(data), **weights)
    load = Compose([LoadImage(ensure_channel_first=True), Orientation("RAS", labels=None)])
    maps = {item["image"]: load(item["weight"])[0] for item in loader.dataset.data}
    seen = 0
    for batch in loader:
        assert set(batch) == {"image", "label"}
        for image, label in zip(batch["image"], batch["label"], strict=True):
            assert image.shape == label.shape == (1, 8, 8, 8)
            assert maps[image.meta["filename_or_obj"]][tuple(image.meta["crop_center"])] > 0
            seen += 1
    assert seen == 8 * len(maps)


def test_weighted_sampling_trains(data: Path, tmp_path: Path) -> None:
    small = {"max_epochs": 1, "val_interval": 1, "num_samples": 2, "patch_size": [16, 16, 16]}
    run("train.json", "weighted.json", dataset_dir=str(data), output_dir=str(tmp_path), **small)
    assert (tmp_path / "model.pt").is_file()


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("train", ["train.json"]),
        ("train", ["train.json", "weighted.json"]),
        ("train", ["train.json", "random_queue.json"]),
        ("train", ["train.json", "evaluate.json"]),
        ("infer", ["inference.json"]),
        ("infer", ["inference.json", "large_volumes.json"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_a_workflow_has_all_required_and_all_optional_properties(
    kind: str, names: list[str], data: Path, model: Path, tmp_path: Path
) -> None:
    settings = {"dataset_dir": str(data), "num_workers": 0, "output_dir": str(tmp_path), "model_file": str(model)}
    workflow = ConfigWorkflow(
        config_file=files(*names),
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=False,
        workflow_type=kind,
        **settings,
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    optional = {"train": {"train_postprocessing"}, "infer": {"key_metric"}}[kind]
    assert {name for name in workflow.properties if getattr(workflow, name) is None} <= optional


def test_the_exported_network_gives_the_same_output(data: Path, model: Path, tmp_path: Path) -> None:
    exported = tmp_path / "model.ts"
    ckpt_export(
        net_id="network_def",
        filepath=str(exported),
        ckpt_file=str(model),
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=files("inference.json"),
        dataset_dir=str(data),
    )
    script, metadata, extra = load_net_with_metadata(str(exported), more_extra_files=("inference.json",))
    network = content("network_def", "inference.json", dataset_dir=str(data))
    network.load_state_dict(torch.load(model, weights_only=True))
    image = torch.randn(2, 1, 32, 32, 32)
    with torch.no_grad():
        assert torch.equal(script.eval()(image), network.eval()(image))
    assert metadata["name"] == "Patch segmentation"
    assert json.loads(extra["inference.json"]) == json.loads((CONFIGS / "inference.json").read_text())


def test_the_metadata_passes_monais_check(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text((Path(__file__).parent / "metadata_schema.json").read_text())
    verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=str(schema))
    for broken in ({"version": None}, {"network_data_format": {"inputs": {"image": {}}, "outputs": {}}}):
        metadata = {**json.loads((CONFIGS / "metadata.json").read_text()), **broken}
        (tmp_path / "metadata.json").write_text(json.dumps(metadata))
        with pytest.raises(ValueError, match="Failed validating"):
            verify_metadata(meta_file=str(tmp_path / "metadata.json"), filepath=str(schema))


def test_the_settings_that_the_readme_names_are_there() -> None:
    readme = (BUNDLE / "docs" / "README.md").read_text(encoding="utf-8")
    table = readme.split("## Inference")[1].split("## ")[0]
    named = re.findall(r"^\| (\w[\w, ]+) \|", table, re.MULTILINE)[1:]
    settings = [name for cell in named for name in cell.split(", ")]
    assert len(settings) == 6
    assert set(settings) <= set(json.loads((CONFIGS / "inference.json").read_text()))
    for name in re.findall(r"configs/(\w+\.json)", readme):
        assert (CONFIGS / name).is_file()


@pytest.mark.slow
def test_two_ranks_train_and_validate_together(interpreter: Interpreter, data: Path, tmp_path: Path) -> None:
    settings = {
        "dataset_dir": data,
        "output_dir": tmp_path / "out",
        "max_epochs": 2,
        "val_interval": 1,
        "num_samples": 6,
    }
    settings |= {
        "num_workers": 0,
        "patch_size": [16, 16, 16],
        "num_folds": 2,
        "batch_size": 4,
        "checkpoint_interval": 3,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    configs = ["--config_file", str(files("train.json", "multi_gpu_train.json"))]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = interpreter.start(*torchrun, "-m", "monai.bundle", "run", *configs, *flags, cwd=tmp_path)
    assert program.wait(200) == 0, program.errors[-5000:]
    output = program.output + program.errors
    for rank in range(2):
        drawn = re.findall(rf"queue of rank {rank}: epoch (\d): (\d+) patches", output)
        assert drawn == [("0", "6"), ("1", "12")]
    # Only the first rank speaks of metrics, which are those of both ranks' volumes.
    assert len(re.findall(r"Metrics -- .*val_mean_dice", output)) == 2
    checkpoint = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert checkpoint["trainer"]["iteration"] == 3
    assert checkpoint["loader"]["batches"] == 1
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert state.keys() == content("network_def", "train.json", dataset_dir=str(data)).state_dict().keys()
