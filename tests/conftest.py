# SPDX-License-Identifier: Apache-2.0
"""What holds for all tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import monai
import pytest
import torch

from tests.programs import Interpreter


@pytest.fixture(autouse=True, scope="session")
def what_is_imported_stays() -> None:
    """Half a million objects of libraries need not be looked through again whenever garbage is collected."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left_of_other_modules() -> None:
    """Loaders that nobody refers to are gone, with workers and memory, before those of this module are counted."""
    gc.collect()


@pytest.fixture
def global_state_is_restored() -> Iterator[None]:
    """Bundles' ``initialize`` makes the process deterministic and sets its number of threads."""
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    yield
    monai.utils.set_determinism(None)
    torch.set_num_threads(threads)
    torch.set_rng_state(random_state)


@pytest.fixture(scope="session")
def shared_interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    interpreter = Interpreter(tmp_path_factory.mktemp("programs"))
    yield interpreter
    interpreter.close()


@pytest.fixture
def interpreter(shared_interpreter: Interpreter) -> Iterator[Interpreter]:
    """Runs programs as ``python`` does; those that a test leaves running end with it."""
    yield shared_interpreter
    shared_interpreter.kill_programs()
