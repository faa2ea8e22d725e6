# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.handlers import MeanDice, MetricsSaver, from_engine
from monai.inferers import SlidingWindowInferer
from monai.transforms import AsDiscreted, Compose, Invertd, LoadImaged, Orientationd, SaveImaged, Spacingd

from monai_patchqueue import GridPatchEvaluator, GridPatchLoader, GridPatchSamplesd, PatchAggregator
from tests.volumes import blobs, numbered

KEYS = ["image", "label"]


class Threshold(torch.nn.Module):
    """Two channels, the second one larger where the image is bright; half of the time wrong at patches' borders."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        ramp = torch.linspace(-1, 1, image.shape[-1])
        return torch.cat([0.5 + 0.2 * ramp.expand_as(image), image], dim=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Small oblique volumes of several shapes, with labels that intensities show."""
    folder = tmp_path_factory.mktemp("volumes")
    angle = np.deg2rad(15)
    affine = np.eye(4)
    affine[:3, :3] = [[-np.cos(angle), np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1.7]]
    affine[:3, 3] = (12, -7, 30)
    records = []
    for number, shape in enumerate([(24, 20, 12), (18, 26, 14), (30, 17, 11)]):
        label = blobs(*shape, classes=1, seed=number)[0]
        image = label + np.random.default_rng(number).normal(0, 0.4, shape).astype(np.float32)
        record = {"image": str(folder / f"case_{number}.nii.gz"), "label": str(folder / f"label_{number}.nii.gz")}
        nib.save(nib.Nifti1Image(image.astype(np.float32), affine), record["image"])
        nib.save(nib.Nifti1Image(label, affine), record["label"])
        records.append(record)
    return records


def pipeline() -> Compose:
    return Compose(
        [
            LoadImaged(KEYS, ensure_channel_first=True),
            Orientationd(KEYS, "RAS", labels=None),
            Spacingd(KEYS, (1.2, 1.0, 1.5), mode=("bilinear", "nearest")),
        ]
    )


def evaluate(files: list[dict[str, str]], folder: Path, engine: str) -> dict[str, Any]:
    """Metrics and saved label maps of an evaluation with MONAI's engine and inferer, or with ours."""
    dataset = Dataset(files, pipeline())
    arguments: dict[str, Any] = {
        "postprocessing": Compose(
            [
                SaveImaged("pred", output_dir=folder, output_postfix="logits", separate_folder=False, print_log=False),
                Invertd("pred", dataset.transform, orig_keys="image", nearest_interp=False, to_tensor=True),
                Invertd("label", dataset.transform, nearest_interp=True, to_tensor=True),
                AsDiscreted("pred", argmax=True),
                SaveImaged("pred", output_dir=folder, output_postfix="seg", separate_folder=False, print_log=False),
            ]
        ),
        "key_val_metric": {"dice": MeanDice(num_classes=2, output_transform=from_engine(["pred", "label"]))},
        "val_handlers": [
            MetricsSaver(
                folder,
                metrics=[],
                metric_details="*",
                batch_transform=lambda batch: [item["image"].meta for item in batch],
            )
        ],
    }
    if engine == "monai":
        inferer = SlidingWindowInferer((14, 16, 8), 4, overlap=0.5, mode="gaussian")
        loader: Any = DataLoader(dataset, batch_size=1)
        evaluator = SupervisedEvaluator(torch.device("cpu"), loader, Threshold(), inferer=inferer, **arguments)
    else:
        grid = GridPatchSamplesd(KEYS, (14, 16, 8), overlap=0.5)
        loader = GridPatchLoader(dataset, grid, num_workers=1, worker_type="thread", batch_size=5)
        evaluator = GridPatchEvaluator("cpu", loader, Threshold(), **arguments)
    for _ in range(2):
        evaluator.run()
    if isinstance(loader, GridPatchLoader):
        loader.close()
    saved = {path.name: nib.load(path) for path in sorted(folder.glob("*.nii.gz"))}
    assert evaluator.state.iteration == 3
    return {"dice": evaluator.state.metrics["dice"], "saved": saved, "details": (folder / "dice_raw.csv").read_text()}


def test_it_gives_what_monais_evaluator_gives_with_a_sliding_window(
    files: list[dict[str, str]], tmp_path: Path
) -> None:
    theirs, ours = (evaluate(files, tmp_path / engine, engine) for engine in ("monai", "ours"))
    assert 0.5 < ours["dice"] < 1
    assert ours["dice"] == pytest.approx(theirs["dice"], abs=1e-6)
    assert ours["details"] == theirs["details"]
    assert list(ours["saved"]) == list(theirs["saved"])
    assert len(ours["saved"]) == 6
    for name, image in ours["saved"].items():
        original = nib.load(files[int(name[5])]["image"]) if "seg" in name else theirs["saved"][name]
        assert image.shape == original.shape
        np.testing.assert_allclose(image.affine, original.affine, atol=1e-5)
        assert np.mean(np.abs(image.get_fdata() - theirs["saved"][name].get_fdata()) > 1e-5) < 1e-3


def test_an_epoch_that_was_left_early_does_not_spoil_the_next(files: list[dict[str, str]]) -> None:
    loader = GridPatchLoader(Dataset(files, pipeline()), GridPatchSamplesd(KEYS, (14, 16, 8)), batch_size=4)
    evaluator = GridPatchEvaluator("cpu", loader, Threshold())
    stop = evaluator.add_event_handler(Events.ITERATION_STARTED(once=2), evaluator.terminate)
    shapes = []
    evaluator.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: shapes.append(evaluator.state.output[0]["pred"].shape)
    )
    evaluator.run()
    stop.remove()
    shapes.clear()
    evaluator.run()
    assert len(shapes) == 3


def test_with_files_as_output_no_other_volumes_are_kept(tmp_path: Path) -> None:
    item = {"image": numbered(20, 18).astype(np.float32), "label": numbered(20, 18)}
    loader = GridPatchLoader(Dataset([item]), GridPatchSamplesd(KEYS, 8, overlap=4), batch_size=4)
    aggregator = PatchAggregator(output_dir=tmp_path)
    evaluator = GridPatchEvaluator("cpu", loader, torch.nn.Identity(), aggregator=aggregator)
    evaluator.run()
    assert [list(volume) for volume in evaluator.state.output] == [["pred"]]
    np.testing.assert_allclose(np.load(tmp_path / "0000_volume.npy"), item["image"], rtol=1e-6)


def test_a_loader_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="val_data_loader is a DataLoader; expected a GridPatchLoader"):
        GridPatchEvaluator("cpu", DataLoader(Dataset([1])), torch.nn.Identity())


def test_a_config_can_have_it(files: list[dict[str, str]]) -> None:
    parser = ConfigParser(
        {
            "loader": {
                "_target_": "GridPatchLoader",
                "dataset": {"_target_": "Dataset", "data": files, "transform": pipeline()},
                "grid": {"_target_": "GridPatchSamplesd", "keys": KEYS, "spatial_size": [14, 16, 8], "overlap": 0.25},
                "batch_size": 4,
            },
            "evaluator": {
                "_target_": "GridPatchEvaluator",
                "device": "cpu",
                "val_data_loader": "@loader",
                "network": Threshold(),
                "aggregator": {"_target_": "PatchAggregator", "mode": "hann", "argmax": True},
                "key_val_metric": {
                    "dice": {
                        "_target_": "MeanDice",
                        "num_classes": 2,
                        "output_transform": "$monai.handlers.from_engine(['pred', 'label'])",
                    }
                },
            },
        }
    )
    evaluator = parser.get_parsed_content("evaluator")
    evaluator.run()
    assert evaluator.state.metrics["dice"] > 0.5
