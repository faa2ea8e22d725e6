# SPDX-License-Identifier: Apache-2.0
"""What holds for all tests of bundles."""

from __future__ import annotations

from collections.abc import Iterator

import monai
import pytest
import torch


@pytest.fixture(autouse=True)
def global_state_is_restored() -> Iterator[None]:
    """Configs' ``initialize`` makes the process deterministic and sets its number of threads."""
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    yield
    monai.utils.set_determinism(None)
    torch.set_num_threads(threads)
    torch.set_rng_state(random_state)
