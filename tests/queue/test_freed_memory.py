# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import platform

import numpy as np
import pytest

from monai_patchqueue.queue.freed_memory import keep_freed_memory
from tests.processes import in_child, resident

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="it is glibc's malloc that is told what to keep"
)
MIB = 2**20


def rounds_of_patches(rounds: int) -> int:
    """Page faults of making and freeing 16 MiB of patches again and again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        patches = [np.ones(MIB // 4, np.float32) for _ in range(16)]
        del patches
    faults: int = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults


def test_patches_are_made_of_memory_that_was_freed_before() -> None:
    def faults() -> tuple[int, int]:
        by_default = rounds_of_patches(20)
        keep_freed_memory()
        rounds_of_patches(1)
        return by_default, rounds_of_patches(20)

    by_default, kept = in_child(faults)
    assert kept < 500 < by_default


def test_large_arrays_are_given_back() -> None:
    def left() -> int:
        keep_freed_memory()
        before = resident()
        for size in (40, 80, 160):
            del_me = np.ones(size * MIB, np.uint8)
            del del_me
        return resident() - before

    assert in_child(left) < 20 * MIB
