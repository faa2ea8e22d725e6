# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import NormalizeIntensity
from torch.utils.data import default_collate

from monai_patchqueue import LazyMetaTensor
from monai_patchqueue.io.lazy import LazyVolume
from monai_patchqueue.io.lazy_tensor import LazyTensor
from monai_patchqueue.io.operators import VOXELWISE
from monai_patchqueue.io.scaling import Scaling

SHAPE = (6, 5, 4)
SCALING = Scaling(0.5, 20, np.dtype(np.float32))


class Counted:
    """A stored array that counts the voxels that are read of it."""

    order = "F"

    def __init__(self, array: np.ndarray) -> None:
        self.array = np.asfortranarray(array)
        self.shape, self.dtype = array.shape, array.dtype
        self.read = 0

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        part = self.array[index]
        self.read += part.size
        return part


def pair(scaling: Scaling = SCALING, shape: tuple[int, ...] = SHAPE) -> tuple[LazyMetaTensor, MetaTensor, Counted]:
    """A volume, lazily read and loaded, and what counts how much is read of the first."""
    stored = Counted(np.random.default_rng(0).integers(-50, 90, shape).astype(np.int16))
    lazy = LazyMetaTensor.of(LazyVolume(stored, scaling, {"affine": torch.eye(4).double() * 2, "name": "a"}))  # type: ignore[arg-type]
    eager = MetaTensor(torch.from_numpy(scaling(stored.array)[None]), meta=dict(lazy.meta))
    return lazy, eager, stored


def numbers(values: Any) -> np.ndarray:
    """Values as array; numpy has no bfloat16."""
    return np.asarray(values.float() if values.dtype == torch.bfloat16 else values)


def assert_same(ours: Any, expected: Any) -> None:
    """Same values, dtype, shape and metadata; reads the whole of it."""
    assert isinstance(ours, MetaTensor) == isinstance(expected, MetaTensor)
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(numbers(ours), numbers(expected))
    if isinstance(expected, MetaTensor):
        assert ours.meta.keys() == expected.meta.keys()
        assert torch.equal(ours.affine, expected.affine)


DEFERRED: dict[str, Callable[[Any], Any]] = {
    "index": lambda x: x[:, 1:-1, ::2, -1],
    "None and ellipsis": lambda x: x[None, ..., 1:3],
    "permute": lambda x: x.permute(0, 3, 1, 2),
    "transpose": lambda x: x.transpose(1, -1),
    "movedim": lambda x: torch.movedim(x, -1, 1),
    "flip": lambda x: torch.flip(x, (1, -1)),
    "rot90": lambda x: torch.rot90(x, 1, (1, 3)),
    "rot180": lambda x: torch.rot90(x, 2, (2, 3)),
    "rot270": lambda x: torch.rot90(x, -1, (1, 2)),
    "expand": lambda x: x.expand(3, -1, -1, -1),
    "expand, more axes": lambda x: x.expand(2, 1, -1, -1, -1),
    "squeeze": lambda x: x.squeeze(0),
    "squeeze all": lambda x: x[:, :1].squeeze(),
    "select of unbind": lambda x: x.unbind(2)[1],
    "split": lambda x: x.split(4, 1)[1],
    "split in sizes": lambda x: torch.split(x, [1, 3, 2], 1)[1],
    "chunk": lambda x: x.chunk(2, -1)[0],
    "iterating": lambda x: next(iter(x)),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "detach": lambda x: x.detach(),
    "cast": lambda x: x.to(torch.uint8),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.to(torch.bfloat16),
    "to memory format": lambda x: x.to(dtype=torch.float64, memory_format=torch.contiguous_format),
    "arithmetic": lambda x: (2 - (x - 3.5) * 0.3) / 7 + 1,
    "with a tensor of no axes": lambda x: x * torch.tensor(0.3),
    "integers": lambda x: x.int() * 3 - 1,
    "integers divided": lambda x: x.short() / 3,
    "clamp": lambda x: x.clamp(0, 30),
    "clamp below": lambda x: torch.clamp(x, min=0),
    "compared": lambda x: x > 10,
    "where": lambda x: torch.where(x > 10, x, torch.tensor(3.0)),
    "two conditions": lambda x: (x > 10) & (x <= 40),
    "rounded": lambda x: x.round().abs().neg(),
    "with itself, turned": lambda x: x[:, ::2] + x.flip(1)[:, ::2],
    "chained": lambda x: ((x.flip(1).permute(0, 3, 2, 1)[:, 1:] - 3) / 5).clamp(0, 1)[..., ::2].double(),
}


@pytest.mark.parametrize("change", DEFERRED.values(), ids=DEFERRED)
def test_what_commutes_with_cutting_reads_nothing_and_then_only_the_part(change: Callable[[Any], Any]) -> None:
    lazy, eager, stored = pair()
    ours, expected = change(lazy), change(eager)
    assert isinstance(ours, LazyMetaTensor)
    assert ours.stride()[1:] == expected.stride()[1:] or 1 in expected.shape
    assert "LazyMetaTensor(shape=" in f"{ours!r}{ours}{ours:}"
    assert stored.read == 0
    corner = (slice(0, 1),) * ours.ndim
    np.testing.assert_array_equal(numbers(ours[corner].load()), numbers(expected[corner]))
    assert stored.read <= 2
    assert_same(ours, expected)


AT_ONCE: dict[str, Callable[[Any], Any]] = {
    "mean": lambda x: x.mean(),
    "max along an axis": lambda x: x.max(dim=1).values,
    "exp": lambda x: torch.exp(x / 50),
    "half arithmetic": lambda x: x.half() * 0.3,
    "add alpha": lambda x: torch.add(x, torch.tensor(0.3), alpha=0.7),
    "with a tensor": lambda x: x * torch.arange(4.0),
    "with a tensor before": lambda x: torch.arange(4.0) - x,
    "reshape": lambda x: x.reshape(5, -1),
    "unfold": lambda x: x.unfold(1, 3, 2),
    "cat": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack([x, x.flip(1)]),
    "item": lambda x: torch.tensor(x[0, 1, 2, 3].item()),
    "mask": lambda x: x[x > 10],
    "index": lambda x: x[:, [0, 2]],
    "pad": lambda x: torch.nn.functional.pad(x, (1, 2)),
    "numpy": lambda x: x.numpy(),
    "numpy's function": lambda x: np.sqrt(np.abs(x)),
    "array": lambda x: x.array,
    "tolist": lambda x: torch.tensor(x.tolist()),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "dlpack": lambda x: torch.from_dlpack(x),
    "zeros_like": lambda x: torch.zeros_like(x),
    "new_zeros": lambda x: x.new_zeros(3),
    "collate": lambda x: default_collate([x, x]),
    "new_empty": lambda x: x.new_empty((2, 3), dtype=torch.int16).fill_(3),
    "in shared memory": lambda x: x.clone().share_memory_(),
    "data": lambda x: x.data * 2,
    "as strided": lambda x: x.as_strided((2, 3), (1, 2)) if x.storage_offset() == 0 else x,
    "with a gradient": lambda x: torch.autograd.grad(((y := x.clone().requires_grad_()) ** 2).sum(), y)[0],
    "copied into another": lambda x: torch.zeros(x.shape).copy_(x),
    "set_array": lambda x: x.set_array(np.ones((1, *SHAPE))),
}


@pytest.mark.parametrize("function", AT_ONCE.values(), ids=AT_ONCE)
def test_all_else_gives_what_it_gives_of_the_loaded_volume(function: Callable[[Any], Any]) -> None:
    lazy, eager, _ = pair()
    assert_same(function(lazy), function(eager))
    lazy, eager, _ = pair()
    ours, expected = lazy[:, 1:4].flip(1), eager[:, 1:4].flip(1)
    if function is not AT_ONCE["reshape"] and function is not AT_ONCE["set_array"]:
        assert_same(function(ours), function(expected))


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.add_(3),
        lambda x: x.__setitem__((slice(None), slice(1, 3)), 7.0),
        lambda x: x.__setitem__((0, 1), torch.zeros(5, 4)),
        lambda x: x[0, 1].mul_(0),
        lambda x: x.permute(0, 3, 2, 1)[:, 1].fill_(-1),
        lambda x: torch.neg(x, out=x),
        lambda x: x[:, 1:3].numpy().fill(2),
        lambda x: x.as_tensor()[0, 2:].zero_(),
        lambda x: copy.copy(x).add_(1),
        lambda x: x.data.mul_(2),
    ],
)
def test_views_share_memory_and_copies_do_not(write: Callable[[Any], Any]) -> None:
    lazy, eager, stored = pair()
    before = stored.array.copy()
    results = []
    for volume in (lazy, eager):
        view, copied, flipped = volume[0, 1:].transpose(0, 1), volume.clone(), volume.flip(1) * 2
        seen = view.sum().item()
        write(volume)
        results.append((volume, view, copied, flipped, torch.tensor(seen)))
    for ours, expected in zip(*results, strict=True):
        assert_same(ours, expected)
    np.testing.assert_array_equal(stored.array, before)


def test_a_shape_is_not_changed_in_place() -> None:
    lazy, _, _ = pair()
    with pytest.raises(RuntimeError, match="take a copy by load"):
        lazy.transpose_(1, 2)
    with pytest.raises(RuntimeError, match="cannot be given other data"):
        lazy.data = torch.zeros(3)


def test_the_volume_is_read_once_and_kept_where_something_needs_it() -> None:
    lazy, _, stored = pair()
    views = [lazy.permute(0, 2, 1, 3), lazy[:, 1:], lazy]
    lazy.mean()
    for view in views:
        view.sum()
        np.asarray(view)
    assert stored.read == np.prod(SHAPE)


def test_of_a_part_no_more_is_read_than_itself() -> None:
    lazy, eager, stored = pair()
    part = lazy[:, :2, :2, :2]
    assert torch.exp(part).sum() == torch.exp(eager[:, :2, :2, :2]).sum()
    default_collate([part, part])
    pickle.dumps(part)
    assert stored.read == 8


@pytest.mark.parametrize("step", [lambda x: x + 1, lambda x: x / 2 + x / 2, lambda x: (x + 1).float().double()])
def test_chains_without_end_are_computed_in_between(step: Callable[[Any], Any]) -> None:
    lazy, eager, stored = pair()
    for _ in range(1500):
        lazy, eager = step(lazy), step(eager)
    assert_same(lazy, eager)
    assert stored.read <= 2 * np.prod(SHAPE)


def test_a_deep_copy_reads_nothing_and_shares_nothing() -> None:
    lazy, eager, stored = pair()
    copied, view = copy.deepcopy([lazy, lazy])[0], copy.deepcopy(lazy[:, 1:3])
    assert isinstance(copied, LazyMetaTensor)
    assert stored.read == 0
    copied += 1
    copied.meta["name"] = "b"
    assert lazy.meta["name"] == "a"
    assert_same(lazy, eager)
    assert_same(copied, eager + 1)
    assert_same(view, eager[:, 1:3])
    assert_same(copy.deepcopy(copied), eager + 1)


def test_without_metadata_it_stays_lazy() -> None:
    lazy, eager, stored = pair()
    plain = lazy.as_tensor()
    assert type(plain) is LazyTensor
    again = MetaTensor(plain.flip(1))
    assert isinstance(again, LazyMetaTensor)
    assert stored.read == 0
    assert_same(again.as_tensor(), eager.as_tensor().flip(1))
    mixed = eager - plain
    assert type(mixed) is MetaTensor
    assert not mixed.any()


def test_numbers_are_the_files_where_it_has_them() -> None:
    label = LazyVolume(np.asfortranarray(np.arange(24, dtype=np.uint8).reshape(2, 3, 4)), Scaling(dtype=np.dtype("f4")))
    lazy = LazyMetaTensor.of(label)
    for change in (lambda x: x.flip(1).permute(0, 3, 1, 2), lambda x: x.to(torch.int64)[:, :, 1:], lambda x: x.float()):
        numbers, expected = change(lazy).numbers(), change(lazy.load())
        assert numbers.dtype == np.uint8
        np.testing.assert_array_equal(numbers, expected)
        strides = [
            [s for s, n in zip(of, expected.shape, strict=True) if n > 1] for of in (numbers.strides, expected.stride())
        ]
        assert np.argsort(strides[0]).tolist() == np.argsort(strides[1]).tolist()
    for change in (lambda x: x * 2, lambda x: x.to(torch.bfloat16), lambda x: x.half().to(torch.uint8) + 0):
        np.testing.assert_array_equal(change(lazy).numbers(), change(lazy.load()).float())


@pytest.mark.parametrize("together", [2**20, 50])
def test_a_normalized_volume_is_what_normalize_intensity_gives(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_patchqueue.io.lazy_meta_tensor._TOGETHER", together)
    lazy, eager, stored = pair()
    normalized = lazy.normalized()
    assert isinstance(normalized, LazyMetaTensor)
    assert stored.read == np.prod(SHAPE)
    np.testing.assert_allclose(normalized.numpy(), NormalizeIntensity()(eager).numpy(), rtol=1e-5, atol=1e-6)
    assert normalized.dtype == torch.float32
    constant = LazyMetaTensor.of(LazyVolume(np.full((3, 4, 5), 7, np.int16), Scaling()))
    assert not constant.normalized().any()
    with pytest.raises(ValueError, match="a volume of 2 channels: expected one"):
        LazyMetaTensor.of(LazyVolume(np.zeros((2, 4, 4, 4)), Scaling(), channel_axis=0)).normalized()


def _drawn_change(data: st.DataObject, ndim: int) -> Callable[[Any], Any]:
    dims, dim = data.draw(st.permutations(range(ndim))), data.draw(st.integers(0, ndim - 1))
    step, turns = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    changes: list[Callable[[Any], Any]] = [
        lambda x: x.permute(dims),
        lambda x: x.flip(dim),
        lambda x: x.narrow(dim, x.shape[dim] // 3, (x.shape[dim] + 1) // 2),
        lambda x: x[..., ::step],
        lambda x: x.rot90(turns, (-1, -2)),
        lambda x: x.unsqueeze(1) if x.ndim < 6 else x.squeeze(),
        lambda x: x.squeeze(1).expand(2, *x.squeeze(1).shape) if x.ndim < 6 else x,
        lambda x: x[1:] if len(x) > 1 else x,
        lambda x: (x - 3) * 0.7,
        lambda x: torch.where(x > 3, x, torch.tensor(1.0, dtype=x.dtype)),
        lambda x: x.to(torch.int16),
    ]
    return data.draw(st.sampled_from(changes))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_chain_of_changes_gives_any_part_of_the_whole(data: st.DataObject) -> None:
    lazy, eager, _ = pair(shape=(4, 5, 6))
    for _ in range(data.draw(st.integers(1, 5))):
        ndim = eager.ndim
        change = _drawn_change(data, ndim)
        if ndim < 2:
            break
        lazy, eager = change(lazy), change(eager)
    assert isinstance(lazy, LazyMetaTensor)
    part = tuple(slice(data.draw(st.integers(0, n)), data.draw(st.integers(0, n))) for n in eager.shape)
    np.testing.assert_array_equal(lazy[part].load(), eager[part], strict=True)
    np.testing.assert_array_equal(lazy.numbers().astype(np.float64), eager.double())
    assert_same(lazy, eager)


INDICES = (slice(1, None), slice(5, 12), slice(3, 900, 7), slice(17, 80))


def bits(values: torch.Tensor) -> bytes:
    """All bits, but those by which one NaN differs from another."""
    values = values.clone()
    if values.dtype.is_floating_point:
        values[values.isnan()] = torch.nan
    return values.view(torch.uint8).numpy().tobytes() if values.dtype != torch.bool else values.numpy().tobytes()


def awkward(dtype: torch.dtype) -> torch.Tensor:
    """1003 numbers (no multiple of what is done at once) of all sizes, zeros of both signs, infinities and NaN."""
    rng = np.random.default_rng(0)
    if not dtype.is_floating_point:
        return torch.from_numpy(rng.integers(0, 120, 1003)).to(dtype)
    numbers = torch.from_numpy(rng.standard_normal(1003) * 10.0 ** rng.integers(-40, 20, 1003))
    for i, special in enumerate((torch.nan, torch.inf, -torch.inf, 0.0, -0.0)):
        numbers[i::23] = special
    return numbers.to(dtype)


def arguments_for(function: Any, dtype: torch.dtype) -> list[Any]:
    """What an operator may be given after its first tensor."""
    number = 0.37 if dtype.is_floating_point else 3
    needed = [a for a in function._schema.arguments[1:] if not a.has_default_value()]
    if "clamp.default" in str(function):
        return [number]
    return [torch.tensor(number).to(dtype) if "Tensor" in str(a.type) else number for a in needed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16, torch.uint8, torch.bool], ids=str)
def test_voxelwise_operators_give_the_same_bits_wherever_a_voxel_lies(dtype: torch.dtype) -> None:
    values = awkward(dtype)
    tried = 0
    for function in sorted(VOXELWISE - {torch.ops.aten.where.self, torch.ops.aten.where.ScalarSelf}, key=str):
        first = [values > 0] if "where" in str(function) else []
        try:
            whole = function(*first, values, *arguments_for(function, dtype)[len(first) :])
        except (RuntimeError, TypeError):
            continue  # not for this dtype
        tried += 1
        for index in INDICES:
            part = function(
                *[v[index].clone() for v in (*first, values)], *arguments_for(function, dtype)[len(first) :]
            )
            assert bits(part) == bits(whole[index]), function
    assert tried > 25


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int16, torch.bool])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16])
def test_casts_give_the_same_bits_wherever_a_voxel_lies(dtype: torch.dtype, target: torch.dtype) -> None:
    values = awkward(dtype)
    if not target.is_floating_point:
        values = values.nan_to_num().clamp(-30_000, 30_000)  # what a dtype cannot hold is anything in torch
    for index in INDICES:
        assert bits(values[index].clone().to(target)) == bits(values.to(target)[index])
