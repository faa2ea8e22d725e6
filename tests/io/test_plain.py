# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.utils import MetaKeys, SpaceKeys

from monai_patchqueue.io.plain import decode, encode


def nothing_elsewhere(*_: Any) -> None:
    return None


def again(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value, nothing_elsewhere))), nothing_elsewhere)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -0.5,
        math.inf,
        "",
        b"\0\xff",
        2j,
        [1, [2.0, "x"]],
        (1, (2,), [3]),
        {"a": {1: None, (2, 3): "b", 0.5: []}},
        Path("a/b.nii"),
        np.float32(0.1),
        np.int64(-3),
        np.str_("text"),
        torch.Size([1, 2]),
        torch.float16,
        np.dtype("<i2"),
        torch.device("cpu"),
        MetaKeys.AFFINE,
        {MetaKeys.SPACE: SpaceKeys.RAS},
        {"~": "dict", "v": [1]},
    ],
)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    result = again(value)
    assert result == value
    assert type(result) is type(value)
    assert repr(result) == repr(value)


@pytest.mark.parametrize("dtype", ["u1", "i8", "f2", "f8", "c16", "?", "S3", "U2", "M8[s]", ">f4"])
def test_arrays_come_back_to_the_bit_and_can_be_written_to(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    result = again(array)
    assert result.dtype == array.dtype
    np.testing.assert_array_equal(result, array)
    result[0] = result[1]
    for empty in (np.zeros((0, 3), np.float32), np.array(5)):
        np.testing.assert_array_equal(again(empty), empty, strict=True)


def test_nan_and_the_sign_of_zero_are_kept() -> None:
    bits = np.array([0x7FC00001, 0x80000000], np.uint32).view(np.float32)
    assert again(bits).tobytes() == bits.tobytes()
    assert math.isnan(again(math.nan))
    assert math.copysign(1, again(-0.0)) == -1


def test_a_metatensor_has_its_metadata_and_its_trace() -> None:
    operations = [{"class": "Flip", "orig_size": (4, 4), "extra_info": {"axes": np.array([0])}}]
    meta = {"affine": torch.eye(4, dtype=torch.float64), "filename_or_obj": "a.nii", "pixdim": np.ones(3, np.float32)}
    value = MetaTensor(torch.arange(4.0), meta=meta, applied_operations=operations)
    result = again({"image": value})["image"]
    assert type(result) is MetaTensor
    assert torch.equal(result.as_tensor(), value.as_tensor())
    assert torch.equal(result.affine, value.affine)
    assert result.meta["pixdim"].dtype == np.float32
    assert result.applied_operations[0]["orig_size"] == (4, 4)


class Unknown:
    pass


@pytest.mark.parametrize("value", [Unknown(), {1, 2}, np.array([Unknown()]), torch.zeros(2, dtype=torch.bfloat16)])
def test_what_is_no_plain_data_is_refused_with_its_path(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^case/parts\[1\] is .*leave it out \(DeleteItemsd\)"):
        encode({"case": {"parts": [0, value]}}, nothing_elsewhere)


def test_reading_looks_up_no_class_but_monais_enumerations() -> None:
    with pytest.raises((TypeError, AttributeError)):
        decode({"~": "enum", "v": ["Path", "/"]}, nothing_elsewhere)
    with pytest.raises((TypeError, AttributeError)):
        decode({"~": "enum", "v": ["os.system", "true"]}, nothing_elsewhere)
    with pytest.raises(KeyError):
        decode({"~": "torch dtype", "v": "torch.load"}, nothing_elsewhere)
