# SPDX-License-Identifier: Apache-2.0
"""Small caches that threads may share."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["remember"]

Key = TypeVar("Key")
Value = TypeVar("Value")


def remember(cache: dict[Key, Value], key: Key, value: Value, keep: int) -> Value:
    """Put a value into a cache of at most ``keep`` entries, the oldest leave; gives the value.

    >>> cache = {1: "a", 2: "b"}
    >>> remember(cache, 3, "c", keep=2), cache
    ('c', {2: 'b', 3: 'c'})
    """
    cache[key] = value
    for old in list(cache)[:-keep]:
        cache.pop(old, None)
    return value
