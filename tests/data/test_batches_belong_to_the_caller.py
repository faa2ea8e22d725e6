# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from monai.data import Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, RandSpatialCropSamplesd

from monai_patchqueue import PatchQueueLoader
from monai_patchqueue.queue.assemble import BufferPool
from tests.pipelines import drawn, make_loader
from tests.volumes import meta, numbered

WORKERS = [
    pytest.param({"num_workers": 0}, id="inline"),
    pytest.param({"num_workers": 1, "worker_type": "thread"}, id="thread"),
    pytest.param({"num_workers": 1}, id="process"),
]


def tensors(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from tensors(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from tensors(value)


def lies_in_slab(loader: PatchQueueLoader, tensor: torch.Tensor) -> bool:
    runner = loader._session._runner
    assert runner is not None
    assert runner.queue.info is not None
    storage = tensor.untyped_storage()
    for slab in runner.queue.info.slab.tensors.values():
        begin = slab.untyped_storage().data_ptr()
        if (
            begin < storage.data_ptr() + storage.nbytes()
            and storage.data_ptr() < begin + slab.untyped_storage().nbytes()
        ):
            return True
    return False


@pytest.mark.parametrize("workers", WORKERS)
def test_batches_that_are_kept_are_never_overwritten(workers: dict[str, Any]) -> None:
    with make_loader([4] * 10, **workers, batch_size=2, queue_length=4, shuffle=True) as loader:
        kept = [batch for _ in range(2) for batch in loader]
        assert len(drawn(kept)) == 80


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(
    "keep",
    [
        pytest.param(lambda image: image[1, 0, 3:9], id="view"),
        pytest.param(lambda image: image.detach(), id="detached"),
        pytest.param(lambda image: image[0].numpy(), id="numpy"),
        pytest.param(lambda image: image.untyped_storage(), id="storage"),
        pytest.param(lambda image: torch.utils.dlpack.to_dlpack(image), id="dlpack"),
        pytest.param(lambda image: list(image.unbind()), id="unbound"),
        pytest.param(lambda image: memoryview(image.numpy()), id="memoryview"),
        pytest.param(lambda image: (image * torch.ones(1, requires_grad=True)).sum(), id="graph"),
        pytest.param(lambda image: decollate_batch({"image": image}), id="decollated"),
    ],
)
def test_whatever_is_kept_of_a_batch_keeps_all_of_it(workers: dict[str, Any], keep: Any) -> None:
    with make_loader([4] * 10, **workers, batch_size=2, queue_length=4, shuffle=True) as loader:
        kept, addresses, values = [], [], []
        for batch in islice(loader, 12):
            image = batch["image"]
            addresses.append(image.data_ptr())
            values.append(image.clone())
            kept.append(keep(image))
            del batch, image
        assert len(set(addresses)) == 12, "a buffer was used again although a part of it is still referred to"
        assert len(kept) == 12


@pytest.mark.parametrize("workers", WORKERS)
def test_graphs_over_batches_give_the_right_gradients_later(workers: dict[str, Any]) -> None:
    weight = torch.ones(1, requires_grad=True)
    with make_loader([4] * 10, **workers, batch_size=2, queue_length=4) as loader:
        losses, expected = [], 0.0
        for batch in loader:
            expected += batch["image"].double().sum().item()
            losses.append((batch["image"] * weight).double().sum())
            del batch
    torch.stack(losses).sum().backward()
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("workers", WORKERS)
def test_batches_may_be_changed_in_place(workers: dict[str, Any]) -> None:
    with make_loader([4] * 10, **workers, batch_size=2, queue_length=1000, repeats=2, shuffle=True) as loader:
        for _ in range(2):
            draws = []
            for batch in loader:
                draws += drawn([batch])
                for tensor in tensors(batch):
                    tensor.fill_(-7)
            assert len(draws) == 80


def test_a_buffer_is_used_again_when_nothing_of_a_batch_is_kept() -> None:
    loader = make_loader([4] * 10, batch_size=2)
    addresses = set()
    for batch in loader:
        addresses.add(batch["image"].data_ptr())
    assert len(addresses) <= 3


def test_a_pool_gives_what_nobody_refers_to_and_holds_so_many_buffers_at_most() -> None:
    pool = BufferPool(most=2)
    first = pool.take(100)
    address = first.data_ptr()
    view = first[10:20]
    del first
    second, third = pool.take(100), pool.take(100)
    assert len({address, second.data_ptr(), third.data_ptr()}) == 3
    del view
    assert pool.take(100).data_ptr() == address
    assert pool.take(50).numel() == 50


def identity(content: Any) -> Any:
    return content


def as_list(patches: list[Any]) -> list[Any]:
    return patches


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"collate_fn": as_list},
        {"item_transform": identity},
        {"batch_transform": identity},
        {"item_transform": identity, "collate_fn": as_list, "patch_transform": identity},
    ],
    ids=lambda arguments: "+".join(arguments) or "plain",
)
def test_slab_memory_is_never_handed_out(workers: dict[str, Any], arguments: dict[str, Any]) -> None:
    seen = []

    def watch(content: Any) -> Any:
        seen.extend(tensors(content))
        return content

    if "collate_fn" in arguments:
        arguments = {**arguments, "collate_fn": watch}
    if "item_transform" in arguments:
        arguments = {**arguments, "item_transform": watch}
    with make_loader([4] * 6, **workers, batch_size=3, queue_length=5, **arguments) as loader:
        for batch in loader:
            seen.extend(tensors(batch))
            assert not any(lies_in_slab(loader, tensor) for tensor in seen)
            for tensor in seen:
                tensor.fill_(-1)
            seen.clear()
        assert len(list(loader)) == 8


@pytest.mark.parametrize("workers", WORKERS)
def test_metadata_of_a_batch_is_the_callers_too(workers: dict[str, Any]) -> None:
    volumes = [{"image": meta(numbered(16, 16, 16), file=f"case_{i}.nii.gz")} for i in range(3)]
    dataset = Dataset(volumes, Compose([RandSpatialCropSamplesd("image", 12, 4, random_size=False)]))
    with make_loader(dataset, **workers, batch_size=4, repeats=2, queue_length=1000) as loader:
        names = set()
        for batch in loader:
            image = batch["image"]
            assert isinstance(image, MetaTensor)
            names |= set(image.meta["filename_or_obj"])
            image.meta.clear()
            image.applied_operations.clear()
        assert names == {f"case_{i}.nii.gz" for i in range(3)}
