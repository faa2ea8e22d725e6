# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from monai_patchqueue.io.ngff import axes_in_order, image_layout, multiscales_of


def axis(name: str, kind: str | None = "space", **more: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, **more}


def scale(*numbers: float) -> dict[str, Any]:
    return {"type": "scale", "scale": list(numbers)}


def translation(*numbers: float) -> dict[str, Any]:
    return {"type": "translation", "translation": list(numbers)}


def affine_of(axes: list[dict[str, Any]], *level: dict[str, Any], whole: Any = None) -> np.ndarray:
    image = {"axes": axes, "coordinateTransformations": whole}
    return image_layout(image, {"coordinateTransformations": list(level)}, [4] * len(axes)).affine


@pytest.mark.parametrize(
    ("names", "shape", "order"),
    [
        ("zyx", (5, 6, 7), ((2, 1, 0), False)),
        ("xyz", (5, 6, 7), ((0, 1, 2), False)),
        ("yx", (6, 7), ((1, 0), False)),
        ("czyx", (3, 5, 6, 7), ((0, 3, 2, 1), True)),
        ("czyx", (1, 5, 6, 7), ((0, 3, 2, 1), True)),
        ("tczyx", (1, 3, 5, 6, 7), ((1, 4, 3, 2), True)),
        ("tzyx", (1, 5, 6, 7), ((3, 2, 1), False)),
        ("zyxc", (5, 6, 7, 3), ((3, 2, 1, 0), True)),
        ("cxyz", (3, 7, 6, 5), ((0, 1, 2, 3), True)),
    ],
)
def test_channels_come_first_and_then_x_y_z(names: str, shape: tuple[int, ...], order: Any) -> None:
    assert axes_in_order(names, shape) == order


def test_axes_of_other_names_go_by_their_types() -> None:
    names, kinds = ["angle", "depth", "row", "column"], ["other", "space", "space", "space"]
    assert axes_in_order(names, (1, 5, 6, 7), kinds) == ((3, 2, 1), False)
    assert axes_in_order(names, (4, 5, 6, 7), kinds) == ((0, 3, 2, 1), True)


@pytest.mark.parametrize(
    ("names", "shape", "message"),
    [
        ("tzyx", (4, 5, 6, 7), "there are 4 time points, and a volume has one; write each"),
        ("tcx", (1, 2, 3), "expected 2 or 3 of type 'space', found 1"),
        ("zyx", (5, 6, 7, 3), "expected a name for each axis"),
        ("cazyx", (2, 3, 5, 6, 7), "expected one axis of channels, found ['c', 'a']"),
    ],
)
def test_what_is_no_volume_is_refused(names: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        axes_in_order(names, shape)


def test_a_levels_transformations_and_then_the_images_make_the_affine() -> None:
    zyx = [axis(name) for name in "zyx"]
    affine = affine_of(zyx, scale(4, 3, 2), translation(30, 20, 10), whole=[scale(10, 10, 10), translation(1, 2, 3)])
    assert np.array_equal(affine, [[20, 0, 0, 103], [0, 30, 0, 202], [0, 0, 40, 301], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("unit", "millimeters"),
    [("millimeter", 1), (None, 1), ("micrometer", 1e-3), ("meter", 1000), ("centimeter", 10), ("inch", 25.4)],
)
def test_lengths_are_in_millimetres(unit: str | None, millimeters: float) -> None:
    yx = [axis("y", unit="millimeter"), axis("x", **({"unit": unit} if unit else {}))]
    affine = affine_of(yx, scale(1, 2), translation(3, 4))
    expected = [[2 * millimeters, 0, 0, 4 * millimeters], [0, 1, 0, 3], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert np.allclose(affine, expected, rtol=1e-15, atol=0)


def test_axes_that_say_their_anatomical_orientation_go_there() -> None:
    orientations = {"x": "right-to-left", "y": "inferior-to-superior", "z": "anterior-to-posterior"}
    zyx = [axis(name, orientation={"type": "anatomical", "value": orientations[name]}) for name in "zyx"]
    affine = affine_of(zyx, scale(4, 3, 2), translation(30, 20, 10))
    assert np.array_equal(affine, [[-2, 0, 0, -10], [0, 0, -4, -30], [0, 3, 0, 20], [0, 0, 0, 1]])
    sagittal = affine_of(zyx[:2], scale(4, 3))
    assert np.array_equal(sagittal, [[0, 0, 1, 0], [0, -4, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("value", ["dorsal-to-ventral", "left-to-right", None])
def test_orientations_that_do_not_tell_three_directions_are_left_aside(value: str | None) -> None:
    zyx = [axis(name, orientation={"type": "anatomical", "value": value}) for name in "zyx"]
    assert np.array_equal(affine_of(zyx, scale(4, 3, 2)), np.diag([2, 3, 4, 1]))


@pytest.mark.parametrize(
    "step",
    [
        scale(1, 2),
        scale(1, 2, 0),
        translation(1, 2, float("nan")),
        {"type": "scale", "path": "scales"},
        {"type": "affine", "affine": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]},
    ],
)
def test_other_transformations_are_refused(step: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected a 'scale' or 'translation' of 3 numbers"):
        affine_of([axis(name) for name in "zyx"], step)


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="has the unit 'pixel': expected one of NGFF's units of length"):
        affine_of([axis("y"), axis("x", unit="pixel")], scale(1, 1))


def test_attributes_of_both_versions_are_understood() -> None:
    assert multiscales_of({"multiscales": [{"version": "0.4", "name": "a"}]}) == [{"version": "0.4", "name": "a"}]
    assert multiscales_of({"ome": {"version": "0.5", "multiscales": [{}]}}) == [{"version": "0.5"}]
    assert multiscales_of({"labels": ["liver"]}) == multiscales_of({"ome": {"labels": ["liver"]}}) == []
