# SPDX-License-Identifier: Apache-2.0
"""Checks of constructor arguments, so that a wrong one fails where it is written, not hours later in a worker."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..sampling import BORDERS, LabelRule

Count = int | str | Callable[[Any], int]
LabelProbabilities = Any  # a mapping, a sequence, "balanced" or None; configs give what they like, so it is checked


def is_real(value: Any) -> bool:
    """A number, of Python's or numpy's types; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_int(value: Any) -> bool:
    """A number of an integer type."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def as_int(value: Any) -> int | None:
    """A whole number of any type (numpy's, a tensor with one element), else None; True and False are none."""
    if hasattr(value, "item") and getattr(value, "shape", None) in ((), (1,)):
        value = value.item()
    if not is_real(value) or not math.isfinite(value):
        return None
    return int(value) if int(value) == value else None


def check_size(spatial_size: Any) -> int | tuple[int, ...]:
    """Patch size: a positive int or -1, or one per axis."""
    scalar = is_int(spatial_size)
    if not scalar and (isinstance(spatial_size, str) or not isinstance(spatial_size, Sequence | np.ndarray)):
        raise TypeError(f"spatial_size must be an int or one int per axis, got {spatial_size!r}")
    sizes = [spatial_size] if scalar else list(spatial_size)
    if not sizes or not all(map(is_int, sizes)):
        raise TypeError(f"spatial_size must be an int or one int per axis, got {spatial_size!r}")
    if any(s < 1 and s != -1 for s in sizes):
        raise ValueError(f"each spatial_size must be at least 1, or -1 for the whole axis, got {spatial_size!r}")
    return int(sizes[0]) if scalar else tuple(int(s) for s in sizes)


def check_count(num_samples: Any, key_allowed: bool) -> Count:
    """``num_samples``: a positive int, a callable, or where there are items the name of a key."""
    if callable(num_samples):
        return num_samples  # type: ignore[no-any-return]
    if isinstance(num_samples, str):
        if not key_allowed:
            raise TypeError(f"num_samples={num_samples!r} names an item key; only dictionary transforms have items")
        return num_samples
    count = as_int(num_samples)
    if count is None:
        raise TypeError(f"num_samples must be an int, a key's name or a callable, got {num_samples!r}")
    if count < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples!r}")
    return count


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """One of a few words."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return str(value)


def check_border(border: Any) -> str:
    """``border``: one of :data:`BORDERS`."""
    return check_choice("border", border, BORDERS)


def check_overlap(overlap: Any) -> float | tuple[float, ...]:
    """Grid overlap: ints are voxels, floats a fraction below 1; one for all axes or one per axis."""
    scalar = is_real(overlap)
    overlaps: list[Any] = [overlap] if scalar else [None]
    if not scalar and isinstance(overlap, Sequence | np.ndarray):
        overlaps = list(overlap)
    checked: list[float] = []
    for o in overlaps:
        if not is_real(o):
            raise TypeError(f"overlap must be an int (voxels) or a float (fraction), or one per axis, got {overlap!r}")
        if o < 0 or not o < math.inf or (not is_int(o) and o >= 1):
            raise ValueError(f"overlap must be voxels >= 0 (int) or a fraction of 0.0 to below 1.0, got {overlap!r}")
        checked.append(int(o) if is_int(o) else float(o))
    return checked[0] if scalar else tuple(checked)


def check_fraction(fraction: Any) -> float | None:
    """``foreground_fraction``: None or 0 to 1."""
    if fraction is None:
        return None
    if not is_real(fraction):
        raise TypeError(f"foreground_fraction must be a number from 0 to 1 or None, got {fraction!r}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"foreground_fraction must be from 0 to 1, got {fraction!r}")
    return float(fraction)


def check_rule(label_probabilities: LabelProbabilities, ignore_label: Any) -> LabelRule:
    """``label_probabilities`` and ``ignore_label`` as a rule; JSON's string keys become ints."""
    ignore = None if ignore_label is None else as_int(ignore_label)
    if ignore is None and ignore_label is not None:
        raise TypeError(f"ignore_label must be an int or None, got {ignore_label!r}")
    if label_probabilities is None:
        return LabelRule("positive", ignore)
    if isinstance(label_probabilities, str):
        check_choice("label_probabilities as a word", label_probabilities, ("balanced",))
        return LabelRule("balanced", ignore)
    if isinstance(label_probabilities, Mapping):
        pairs = [(_class(key), p) for key, p in label_probabilities.items()]
    elif isinstance(label_probabilities, Sequence | np.ndarray):
        pairs = list(enumerate(label_probabilities))
    else:
        raise TypeError(
            "label_probabilities must be a mapping from class to probability, a sequence indexed by class, "
            f'"balanced" or None, got {label_probabilities!r}'
        )
    classes: dict[int, float] = {}
    for label, p in pairs:
        if label in classes:
            raise ValueError(f"label_probabilities names class {label} twice: {label_probabilities!r}")
        if not is_real(p):
            raise TypeError(f"the probability of class {label} must be a number, got {p!r}")
        if not 0 <= p < math.inf:
            raise ValueError(f"the probability of class {label} must be finite and not negative, got {p!r}")
        classes[label] = float(p)
    if not any(p > 0 and label != ignore for label, p in classes.items()):
        raise ValueError(f"label_probabilities leaves no class to draw from: {label_probabilities!r}, {ignore_label=}")
    return LabelRule(classes, ignore)


def _class(key: Any) -> int:
    label = as_int(key)
    if label is None and isinstance(key, str):
        try:
            label = int(key)
        except ValueError:
            label = None
    if label is None:
        raise ValueError(f"a class in label_probabilities must be an int, or a string of one, got {key!r}")
    return label
