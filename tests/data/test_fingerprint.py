# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    CropForegroundd,
    Lambdad,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandFlipd,
    ScaleIntensityRanged,
    Spacingd,
)

from monai_patchqueue.data.fingerprint import file_state, fingerprint


def pipeline(low: float = -57.0, offset: int = 1, mode: str = "bilinear") -> list[Any]:
    return [
        LoadImaged(["image", "label"], ensure_channel_first=True),
        Orientationd(["image", "label"], "RAS", labels=None),
        Spacingd(["image"], (1.5, 1.5, 2.0), mode=mode),
        ScaleIntensityRanged("image", low, 164, 0, 1, clip=True),
        CropForegroundd(["image"], "image", select_fn=lambda x: x > offset),
        Lambdad("image", partial(np.multiply, offset)),
        NormalizeIntensityd("image", np.array([0.5]), {"a": torch.ones(2)}),
    ]


def test_equal_pipelines_have_one_fingerprint_and_others_another() -> None:
    first = fingerprint(pipeline())
    assert first == fingerprint(pipeline())
    others = [pipeline(low=-58.0), pipeline(offset=2), pipeline(mode="nearest"), pipeline()[1:], pipeline()[::-1]]
    assert len({first, *map(fingerprint, others)}) == 6


class Parameters:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class Slots:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def shift(x: float) -> float:
    return x + 1


def other_shift(x: float) -> float:
    return x + 2


def adder(n: int) -> Callable[[int], int]:
    return lambda x: x + n


DIFFERENT = [
    (1, 1.0),
    (1, True),
    ("1", b"1"),
    ([1, 2], (1, 2)),
    ([1, [2]], [[1], 2]),
    ({"a": 1}, {"a": 2}),
    (np.float32(1), np.float64(1)),
    (np.zeros(3), np.zeros((3, 1))),
    (np.array([0.0]), np.array([-0.0])),
    (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
    (MetaTensor(torch.zeros(2), meta={"a": 1}), MetaTensor(torch.zeros(2), meta={"a": 2})),
    (shift, other_shift),
    (adder(1), adder(2)),
    (partial(shift, x=1), partial(shift, x=2)),
    (Parameters(a=1).__init__, Parameters(a=2).__init__),
    (Slots(1), Slots(2)),
    (Parameters(a=1), Parameters(b=1)),
    (re.compile("a"), re.compile("b")),
    (int, float),
    (Path("a"), "a"),
    (torch.float32, torch.float16),
    ({1, 2}, {1, 3}),
    (Compose([]), Compose([], lazy=True)),
]


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different_values_differ(a: Any, b: Any) -> None:
    assert fingerprint(a) == fingerprint(a)
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint([a], 0) != fingerprint([b], 0)


def test_the_code_of_a_project_counts_line_by_line() -> None:
    def version(factor: int) -> Any:
        names: dict[str, Any] = {"__name__": "a_users_script"}
        code = f"class Scale:\n    def __call__(self, x):\n        return helper(x) * {factor}\n"
        exec(code, names)
        return names["Scale"]()

    assert fingerprint(version(2)) == fingerprint(version(2))
    assert fingerprint(version(2)) != fingerprint(version(3))


def test_random_state_does_not_count_and_objects_may_hold_themselves() -> None:
    assert fingerprint(RandFlipd("a").set_random_state(1)) == fingerprint(RandFlipd("a").set_random_state(2))
    loops = [Parameters(a=1), Parameters(a=1), Parameters(a=2)]
    for loop in loops:
        loop.me = [loop]
    assert fingerprint(loops[0]) == fingerprint(loops[1]) != fingerprint(loops[2])


def test_an_object_that_hides_what_it_holds_is_refused_with_its_place() -> None:
    with pytest.raises(TypeError, match=r"\.parts\['lock'\] is a _thread\.lock, which does not show what it holds"):
        fingerprint([Parameters(parts={"lock": threading.Lock()})])


def test_what_tells_files_apart(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.nii", tmp_path / "series"
    file.write_bytes(b"1234")
    folder.mkdir()
    (folder / "slice").write_bytes(b"1")
    record = {"image": str(file), "label": [file, "no file", "x" * 5000, "", "\0"], "age": 3, "series": folder}
    states = {check: file_state(record, check) for check in ("mtime", "content")}  # type: ignore[arg-type]
    assert [state[0] for state in states["mtime"]] == [str(file), str(file), str(folder / "slice")]
    os.utime(file, (1, 1))
    assert file_state(record, "mtime") != states["mtime"]
    assert file_state(record, "content") == states["content"]
    (folder / "slice").write_bytes(b"2")
    assert file_state(record, "content") != states["content"]


def test_both_halves_of_a_pair_count(tmp_path: Path) -> None:
    for suffix in (".hdr", ".img"):
        (tmp_path / f"a{suffix}").write_bytes(b"1")
    before = file_state(str(tmp_path / "a.img"), "content")
    (tmp_path / "a.hdr").write_bytes(b"2")
    assert file_state(str(tmp_path / "a.img"), "content") != before
