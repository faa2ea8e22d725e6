# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from monai.transforms import Randomizable


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transforms that were given no seed share one random state; it is the same for every test."""
    monkeypatch.setattr(Randomizable, "R", np.random.RandomState(0))
