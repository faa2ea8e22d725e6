# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.utils import SpaceKeys

from monai_patchqueue.io.copies import deep_copy, own_copy


class Box:
    """Somebody's class."""

    def __init__(self, content: Any) -> None:
        self.content = content


ARRAY = np.asfortranarray(np.arange(6.0).reshape(2, 3))
VALUE: dict[str, Any] = {
    "array": ARRAY,
    "again": ARRAY,
    "number": np.array(2, np.int16),
    "tensor": torch.arange(6).reshape(2, 3).T,
    "meta": MetaTensor(torch.zeros(1, 2), meta={"name": "a"}),
    "nested": {"list": [1, [ARRAY, "a"]], "tuple": ((1, 2), torch.ones(1)), "space": SpaceKeys.RAS, "nothing": None},
}


def arrays(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [array for part in value.values() for array in arrays(part)]
    if isinstance(value, (list, tuple)):
        return [array for part in value for array in arrays(part)]
    return [value] if isinstance(value, (np.ndarray, torch.Tensor)) else []


def addresses(value: Any) -> list[int]:
    return [a.data_ptr() if isinstance(a, torch.Tensor) else a.ctypes.data for a in arrays(value)]


@pytest.mark.parametrize("copied", [deep_copy(VALUE, {}), own_copy(VALUE)], ids=["deep_copy", "own_copy"])
def test_a_copy_has_the_same_values_and_no_array_of_the_original(copied: Any) -> None:
    assert repr(copied) == repr(copy.deepcopy(VALUE))
    assert not set(addresses(copied)) & set(addresses(VALUE))
    assert copied["nested"]["list"] is not VALUE["nested"]["list"]
    assert [type(array) for array in arrays(copied)] == [type(array) for array in arrays(VALUE)]


def test_a_deep_copy_keeps_strides_and_what_is_the_same_object() -> None:
    copied = deep_copy(VALUE, {})
    assert copied["array"].strides == ARRAY.strides
    assert copied["tensor"].stride() == VALUE["tensor"].stride()
    assert copied["again"] is copied["array"]
    assert copied["nested"]["list"][1][0] is copied["array"]


def test_a_deep_copy_ends_where_a_value_contains_itself() -> None:
    value: dict[str, Any] = {"list": []}
    value["list"].append(value)
    copied = deep_copy(value, {})
    assert copied["list"][0] is copied
    assert copied is not value


def test_a_deep_copy_goes_into_objects_and_takes_what_the_memo_has() -> None:
    lent = np.zeros(3)
    box = Box({"array": ARRAY, "lent": ARRAY[:1]})
    copied = deep_copy({"box": box, "lent": ARRAY}, {id(ARRAY): lent})
    assert copied["lent"] is lent
    assert copied["box"].content["array"] is lent
    assert copied["box"] is not box
    assert copied["box"].content["lent"].ctypes.data != ARRAY.ctypes.data


def test_a_tensor_with_gradients_is_copied_as_deepcopy_does() -> None:
    weight = torch.ones(2, requires_grad=True)
    copied = deep_copy([weight], {})[0]
    assert copied.requires_grad
    assert copied.data_ptr() != weight.data_ptr()
