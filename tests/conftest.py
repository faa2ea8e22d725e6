# SPDX-License-Identifier: Apache-2.0
"""What holds for all tests."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="session")
def what_is_imported_stays() -> None:
    """Half a million objects of libraries need not be looked through again whenever garbage is collected."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left_of_other_modules() -> None:
    """Loaders that nobody refers to are gone, with workers and memory, before those of this module are counted."""
    gc.collect()
