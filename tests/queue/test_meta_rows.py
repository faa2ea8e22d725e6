# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import enum
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.data.utils import collate_meta_tensor_fn
from monai.utils import SpaceKeys

from monai_patchqueue.queue.meta_rows import MetaRows
from monai_patchqueue.queue.pickling import dumps


class Colour(enum.Enum):
    RED = 1


SHARED: dict[str, Any] = {
    "filename_or_obj": "a.nii.gz",
    "space": SpaceKeys.RAS,
    "dim": np.array([3, 64, 64, 64], dtype=np.int16),
    "pixdim": np.array([1.0, 0.8, 0.8], dtype=np.float32),
    "scl_slope": np.array(np.nan, dtype=np.float32),
    "affine": torch.eye(4, dtype=torch.float64),
    "original_affine": np.eye(4),
    "TE": 3.5,
    "frames": 7,
    "contrast": True,
    "scalar": np.float32(2.5),
    "history": ["loaded", "scaled"],
    "box": ((1, 2), (3, 4)),
    "nothing": [],
    "nested": {"name": "b", "value": [1.5, 2], "matrix": np.zeros((2, 3))},
}


def volume(name: str, patches: int = 3, **more: Any) -> list[dict[str, Any]]:
    """Attributes of the MetaTensors of a volume's patches."""
    own = [{"patch_index": i, "crop_center": (i, 2 * i), "offset": torch.full((4, 4), i)} for i in range(patches)]
    metas = [{**SHARED, "filename_or_obj": name, **more, **meta} for meta in own]
    trace = [{"class": "Flip", "axes": (0, 1)}]
    return [vars(MetaTensor(torch.zeros(1, 1, 1, 1), meta=meta, applied_operations=list(trace))) for meta in metas]


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def assert_same_attributes(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_same(dict(sorted(found.items())), dict(sorted(expected.items())))


def collated(patches: list[dict[str, Any]]) -> dict[str, Any]:
    tensors = []
    for attributes in patches:
        tensor = torch.zeros(1, 1, 1, 1).as_subclass(MetaTensor)
        tensor.__dict__.update(attributes)
        tensors.append(tensor)
    return vars(collate_meta_tensor_fn(tensors))


@pytest.mark.parametrize("numbers", [[0], [2, 0], [1, 1, 0, 2]])
def test_a_batch_of_several_volumes_has_the_metadata_of_monais_collation(numbers: list[int]) -> None:
    volumes = [volume(f"{i}.nii", TE=float(i), frames=i) for i in range(len(numbers))]
    rows = [MetaRows.of(patches) for patches in volumes]
    joined = MetaRows.joined([(row, number) for row, number in zip(rows, numbers, strict=True) if row], 4)
    assert joined is not None
    assert_same_attributes(
        joined, collated([patches[number] for patches, number in zip(volumes, numbers, strict=True)])
    )


def test_one_batch_shares_no_memory_with_another() -> None:
    rows = MetaRows.of(volume("a"))
    assert rows is not None
    first = MetaRows.joined([(rows, 0)], 4)
    assert first is not None
    first["_meta"]["affine"] += 1
    first["_meta"]["box"][0][0] += 1
    first["_applied_operations"][0][0]["class"] = "Crop"
    first["_pending_operations"].append("Flip")
    second = MetaRows.joined([(rows, 0)], 4)
    assert second is not None
    assert torch.equal(second["_meta"]["affine"][0], torch.eye(4, dtype=torch.float64))
    assert second["_meta"]["box"][0][0].tolist() == [1]
    assert second["_applied_operations"] == [[{"class": "Flip", "axes": (0, 1)}]]
    assert second["_pending_operations"] == []


def test_metadata_of_a_batch_can_be_saved() -> None:
    rows = MetaRows.of(volume("a"))
    assert rows is not None
    joined = MetaRows.joined([(rows, 0), (rows, 2)], 4)
    assert joined is not None
    file = io.BytesIO()
    torch.save(joined["_meta"], file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=False), joined["_meta"])


def test_one_patch_gets_its_attributes_back_to_the_type_in_memory_of_its_own() -> None:
    patches = volume("a")
    rows = pickle.loads(dumps(MetaRows.of(patches)))
    for number, patch in enumerate(patches):
        assert_same_attributes(rows.attributes(number), patch)
    rows.attributes(0)["_meta"]["pixdim"][0] = 9
    rows.attributes(0)["_meta"]["affine"][0] = 9
    rows.attributes(0)["_applied_operations"][0]["class"] = "Crop"
    assert_same_attributes(rows.attributes(0), patches[0])


def test_volumes_have_one_layout_wherever_they_come_from() -> None:
    rows = [MetaRows.of(volume("a")), MetaRows.of(volume("b", TE=1.0)), pickle.loads(dumps(MetaRows.of(volume("c"))))]
    assert len({id(row.layout) for row in rows}) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"TE": 3},
        {"dim": np.array([3, 64, 64, 64], dtype=np.int32)},
        {"dim": np.array([3, 64], dtype=np.int16)},
        {"history": ["loaded"]},
        {"more": 1},
        {"nested": {"name": "b"}},
    ],
)
def test_volumes_with_other_kinds_of_metadata_are_left_to_monai(other: dict[str, Any]) -> None:
    one, another = MetaRows.of(volume("a")), MetaRows.of(volume("b", **other))
    assert one is not None
    assert another is not None
    assert MetaRows.joined([(one, 0), (another, 0)], 4) is None


@pytest.mark.parametrize(
    "value",
    [None, Colour.RED, np.array(["a"]), np.array([1], dtype=">i2"), MetaTensor(torch.zeros(2)), object(), 2**70],
)
def test_metadata_of_an_unusual_kind_are_left_to_monai(value: Any) -> None:
    assert MetaRows.of(volume("a", strange=value)) is None


def test_patches_of_one_volume_with_different_entries_are_left_to_monai() -> None:
    patches = volume("a")
    patches[1]["_meta"]["more"] = 1
    assert MetaRows.of(patches) is None
    assert MetaRows.of([{**patch, "_is_batch": i > 0} for i, patch in enumerate(volume("a"))]) is None
