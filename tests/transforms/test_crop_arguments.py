# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

import monai_patchqueue.transforms as patches
from monai_patchqueue.transforms import (
    GridPatchSamples,
    GridPatchSamplesd,
    LabelIndexd,
    RandLabelPatch,
    RandLabelPatchd,
    RandUniformPatch,
    RandUniformPatchd,
    RandWeightedPatch,
    RandWeightedPatchd,
    WeightIndexd,
)
from tests.volumes import blobs, meta, numbered


@pytest.mark.parametrize("name", ["RandUniformPatch", "RandWeightedPatch", "RandLabelPatch", "GridPatchSamples"])
def test_each_transform_has_a_dictionary_version_under_monais_three_names(name: str) -> None:
    assert {name, f"{name}d", f"{name}D", f"{name}Dict"} <= set(patches.__all__)
    assert getattr(patches, f"{name}d") is getattr(patches, f"{name}D") is getattr(patches, f"{name}Dict")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"spatial_size": 0}, ValueError, "at least 1, or -1"),
        ({"spatial_size": (4, -2)}, ValueError, "at least 1, or -1"),
        ({"spatial_size": 4.0}, TypeError, "int or one int per axis"),
        ({"spatial_size": "64"}, TypeError, "int or one int per axis"),
        ({"spatial_size": ()}, TypeError, "int or one int per axis"),
        ({"spatial_size": (True, 4)}, TypeError, "int or one int per axis"),
        ({"num_samples": 0}, ValueError, "at least 1"),
        ({"num_samples": -3}, ValueError, "at least 1"),
        ({"num_samples": 1.5}, TypeError, "int, a key's name or a callable"),
        ({"num_samples": True}, TypeError, "int, a key's name or a callable"),
        ({"border": "outside"}, ValueError, "'inside', 'clamp', 'pad'"),
        ({"padding_mode": "zeros"}, ValueError, "number or one of constant"),
        ({"padding_mode": ["constant"]}, ValueError, "1 entries for 2 keys"),
        ({"padding_mode": [{}, 0]}, TypeError, "mode's name or a number"),
        ({"default_num_samples": 0}, ValueError, "at least 1"),
        ({"default_num_samples": "n"}, TypeError, "n"),
        ({"default_num_samples": len}, TypeError, "must be an int"),
        ({"lazy": "yes"}, TypeError, "lazy"),
        ({"on_empty": "skip"}, ValueError, "'raise', 'uniform'"),
        ({"foreground_fraction": 1.2}, ValueError, "from 0 to 1"),
        ({"foreground_fraction": float("nan")}, ValueError, "from 0 to 1"),
        ({"foreground_fraction": "half"}, TypeError, "from 0 to 1"),
        ({"ignore_label": "255"}, TypeError, "ignore_label must be an int"),
        ({"label_probabilities": {"1": -0.5}}, ValueError, "class 1 must be finite and not negative"),
        ({"label_probabilities": [0.5, float("nan")]}, ValueError, "class 1 must be finite and not negative"),
        ({"label_probabilities": {"1": float("inf")}}, ValueError, "class 1 must be finite and not negative"),
        ({"label_probabilities": {"1": "2"}}, TypeError, "class 1 must be a number"),
        ({"label_probabilities": {"liver": 1}}, ValueError, "string of one, got 'liver'"),
        ({"label_probabilities": {1.5: 1}}, ValueError, "got 1.5"),
        ({"label_probabilities": {"1": 1, 1: 2}}, ValueError, "names class 1 twice"),
        ({"label_probabilities": {}}, ValueError, "no class to draw from"),
        ({"label_probabilities": [0, 0.0]}, ValueError, "no class to draw from"),
        ({"label_probabilities": {"1": 1}, "ignore_label": 1}, ValueError, "no class to draw from"),
        ({"label_probabilities": "even"}, ValueError, "'balanced'"),
        ({"label_probabilities": 3}, TypeError, "a mapping from class"),
    ],
)
def test_a_wrong_argument_fails_at_construction(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"keys": ["image", "label"], "label_key": "label", "spatial_size": 4, **arguments}
    with pytest.raises(error, match=words):
        RandLabelPatchd(**given)


@pytest.mark.parametrize(
    ("overlap", "error"),
    [
        (-1, ValueError),
        (1.0, ValueError),
        (4, ValueError),
        (float("nan"), ValueError),
        ("1", TypeError),
        (True, TypeError),
    ],
)
def test_a_wrong_overlap_fails_at_construction(overlap: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="overlap"):
        GridPatchSamples(4, overlap)


def test_an_array_transform_knows_no_item_keys() -> None:
    with pytest.raises(TypeError, match="only dictionary transforms have items"):
        RandUniformPatch(4, num_samples="n")  # type: ignore[arg-type]
    assert len(RandUniformPatch(2, num_samples=lambda img: img.shape[0])(np.zeros((3, 4, 4)))) == 3


def test_positional_arguments_are_in_the_documented_order() -> None:
    item = {"image": numbered(6, 6), "label": blobs(6, 6), "w": np.ones((1, 6, 6)), "n": 3}
    assert len(RandUniformPatchd(["image"], (2, 2), 4)(item)) == 4
    assert len(RandWeightedPatchd(["image"], "w", (2, 2), 4, "uniform")(item)) == 4
    assert (
        len(RandLabelPatchd(["image"], "label", 2, "n", None, 0.5, 255, "uniform", "clamp", 0, True, False)(item)) == 3
    )
    assert len(GridPatchSamplesd(["image"], 2, 0, True)(item)) == 9


def test_the_number_of_patches_comes_from_the_item_or_a_callable() -> None:
    image = numbered(6, 6)
    by_key = RandUniformPatchd("image", 2, "n", default_num_samples=5)
    assert by_key.num_samples == "n"
    assert by_key.default_num_samples == 5
    for given in (3, np.int64(3), torch.tensor(3), 3.0, np.array([3])):
        assert len(by_key({"image": image, "n": given})) == 3
    assert len(by_key({"image": image})) == 5
    assert by_key({"image": image, "n": 0}) == []
    assert len(RandUniformPatchd("image", 2, lambda item: item["n"] * 2)({"image": image, "n": 2})) == 4
    for wrong in (-1, 2.5, "3", None, np.nan, [1, 2]):
        with pytest.raises(ValueError, match="key 'n': the number of patches must be an int of 0 or more"):
            by_key({"image": image, "n": wrong})


@pytest.mark.parametrize("config", [{"1": 1, "2": 3}, [0, 1, 3], "balanced", None])
def test_json_configs_instantiate_by_short_name_and_by_path(config: Any) -> None:
    parser = ConfigParser(
        {
            "crop": {
                "_target_": "monai_patchqueue.transforms.RandLabelPatchd",
                "keys": ["image", "label"],
                "label_key": "label",
                "spatial_size": [4, 4],
                "num_samples": 6,
                "label_probabilities": config,
            },
            "grid": {"_target_": "GridPatchSamplesd", "keys": "image", "spatial_size": 4},
        }
    )
    crop = parser.get_parsed_content("crop")
    label = blobs(24, 24, classes=2)
    assert {int(p["label"][0, 2, 2]) for p in crop({"image": label, "label": label})} <= {1, 2}
    assert parser.get_parsed_content("grid").count((8, 8)) == 4


def test_a_volume_smaller_than_the_patch_is_named_with_its_shape_and_the_remedy() -> None:
    item = {"image": meta(numbered(8, 9, 10), "/data/case_7.nii.gz")}
    with pytest.raises(
        ValueError, match=r"'/data/case_7.nii.gz', key 'image'.*\[8, 9, 10\].*\[9, 9, 9\].*padding_mode"
    ):
        RandUniformPatchd("image", 9)(item)
    with pytest.raises(ValueError, match="smaller than the patch"):
        GridPatchSamplesd("image", 9)(item)


def test_a_volume_with_another_number_of_axes_is_named() -> None:
    with pytest.raises(ValueError, match=r"3 spatial axes, but the volume has 2 .*EnsureChannelFirstd"):
        RandUniformPatchd("image", (4, 4, 4))({"image": np.zeros((8, 9, 10))})


@pytest.mark.parametrize("value", ["scan.nii.gz", 3, None, np.float32(1), np.zeros(5)])
def test_what_is_no_volume_is_named_with_its_type(value: Any) -> None:
    with pytest.raises(TypeError, match="key 'image': expected a channel-first array or tensor, got"):
        RandUniformPatchd("image", 4)({"image": value})


def test_an_empty_volume_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the volume is empty, its spatial shape is \[0, 4\]"):
        RandUniformPatchd("image", (-1, 2), padding_mode=0)({"image": np.zeros((1, 0, 4))})


def test_a_missing_key_is_named_with_the_keys_there_are() -> None:
    item = {"image": meta(numbered(4, 4, 4)), "seg": 1}
    with pytest.raises(KeyError, match=r"case.nii.gz.*finds no key 'label'.*\['image', 'seg'\].*allow_missing_keys"):
        RandUniformPatchd(["image", "label"], 2)(item)
    with pytest.raises(KeyError, match="finds no key 'w'"):
        RandWeightedPatchd("image", "w", 2)(item)
    assert len(RandUniformPatchd(["image", "label"], 2, allow_missing_keys=True)(item)) == 1
    with pytest.raises(KeyError, match="finds no key 'label'"):
        RandUniformPatchd("label", 2, allow_missing_keys=True)(item)


def test_volumes_of_different_shape_are_an_error_with_both_shapes() -> None:
    item = {"image": numbered(6, 6), "label": numbered(6, 5), "w": np.ones((1, 5, 6))}
    with pytest.raises(ValueError, match=r"key 'label'.*\[6, 5\].*'image', \[6, 6\]"):
        RandUniformPatchd(["image", "label"], 2)(item)
    with pytest.raises(ValueError, match=r"key 'w': its spatial shape \[5, 6\] is not the volume's \[6, 6\]"):
        RandWeightedPatchd("image", "w", 2)(item)


def test_an_array_transform_asks_for_its_map() -> None:
    with pytest.raises(ValueError, match="weight_map must be given"):
        RandWeightedPatch(2)(numbered(4, 4))
    with pytest.raises(ValueError, match="label must be given"):
        RandLabelPatch(2)(numbered(4, 4))


def test_indexing_transforms_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"case.nii.gz.*key 'w'.*negative values, down to -1"):
        WeightIndexd("w")({"w": meta(-np.ones((1, 3, 3, 3), np.float32))})
    with pytest.raises(TypeError, match="key 'label': expected a channel-first"):
        LabelIndexd("label")({"label": "a.nii.gz"})
    with pytest.raises(KeyError, match="label"):
        LabelIndexd("label")({})
    assert LabelIndexd("label", allow_missing_keys=True)({"a": 1}) == {"a": 1}
