# SPDX-License-Identifier: Apache-2.0
"""The named splits of a data module, and what is known of their samples without loading any."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch

from .volumes import record_name

__all__ = ["STAGES", "SplitPart", "parse_splits", "splits_of_stage"]

MONITOR = "monitor-"
STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("test",)}


@dataclass(frozen=True)
class SplitPart:
    """What one database gives to a split.

    Args:
        split: the split's name.
        database: number of the database among the split's.
        samples: records of volumes, as they are before loading.
        loader: makes a volume of a record: a transform, a sequence of them, or an object with ``sample(record)``, and
            maybe ``target(record)``.
    """

    split: str
    database: int
    samples: Sequence[Any]
    loader: Any

    def __str__(self) -> str:
        return f"splits[{self.split!r}][{self.database}]"

    def target(self, index: int, class_key: str | None) -> Hashable:
        """A sample's class, without loading its volume.

        Args:
            index: the sample's number.
            class_key: where the class stands in the sample's record; without it, the loader's ``target`` is asked.

        Raises:
            ValueError: a sample without a class, or with several.
        """
        record = self.samples[index]
        name = f"{self}, {record_name(record, index)}"
        if class_key is not None and isinstance(record, Mapping):
            if class_key not in record:
                raise ValueError(
                    f"{name} has no class_key={class_key!r}: its record has {list(record)}. Add its class to the "
                    "record, or turn balance_sampler_by_class off."
                )
            value, source = record[class_key], f"[{class_key!r}]"
        elif callable(getattr(self.loader, "target", None)):
            value, source = self.loader.target(record), "'s target()"
        else:
            raise ValueError(
                f"balance_sampler_by_class needs the class of {name}: pass class_key, the key of the class in records "
                "that are dictionaries, or a loader with a method target(record) that returns it."
            )
        return _single_class(value, f"{name}{source}")


def _single_class(value: Any, where: str) -> Hashable:
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and int(np.prod(value.shape)) == 1:
        value = value.item()
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if not isinstance(value, (str, int, float)) or value != value:
        raise ValueError(
            f"{where} is {value!r}: expected one class, as a number or a text. Where samples have several, choose the "
            "one to balance by, and put it under a key of its own for class_key."
        )
    return value


def splits_of_stage(stage: str | None, names: Sequence[str]) -> list[str]:
    """The splits that a stage uses: all for ``None``; splits that are watched go with the validation.

    Raises:
        ValueError: a stage that is not known.

    Example:
        >>> splits_of_stage("fit", ["train", "test", "monitor-train"])
        ['train', 'monitor-train']
    """
    if stage is None:
        return list(names)
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r}: expected one of {', '.join(map(repr, STAGES))}, or None for all.")
    used = STAGES[stage]
    return [name for name in names if name in used or (name.startswith(MONITOR) and "validation" in used)]


def parse_splits(splits: Mapping[str, Sequence[tuple[Sequence[Any], Any]]]) -> dict[str, tuple[SplitPart, ...]]:
    """Check splits, and name their parts.

    Raises:
        TypeError, ValueError: with what was found where, and what to do.
    """
    if not isinstance(splits, Mapping):
        raise TypeError(
            f"splits is a {type(splits).__name__}; expected a mapping from names of splits to sequences of "
            "(samples, loader) pairs."
        )
    for name in splits:
        _check_name(name)
    if "train" not in splits:
        raise ValueError(f"splits has {list(splits)}, but no 'train': add the split to train on.")
    return {name: _parse_split(name, splits[name]) for name in splits}


def _check_name(name: Any) -> None:
    known = ["train", "validation", "test"]
    if name in known or (isinstance(name, str) and name.startswith(MONITOR) and name != MONITOR):
        return
    similar = get_close_matches(str(name), known, n=1, cutoff=0.3)
    advice = f" Did you mean {similar[0]!r}?" if similar else ""
    raise ValueError(
        f"splits has a split {name!r}; expected 'train', 'validation', 'test', or a name that begins with 'monitor-' "
        f"for one that is only watched.{advice}"
    )


def _parse_split(name: str, pairs: Any) -> tuple[SplitPart, ...]:
    where = f"splits[{name!r}]"
    if isinstance(pairs, (str, Mapping)) or not isinstance(pairs, Sequence):
        raise TypeError(f"{where} is a {type(pairs).__name__}; expected a sequence of (samples, loader) pairs.")
    if len(pairs) == 0:
        raise ValueError(f"{where} is empty: give it a (samples, loader) pair, or leave the split out.")
    if len(pairs) == 2 and not _is_pair(pairs[0]) and _is_loader(pairs[1]):
        raise TypeError(f"{where} is a pair itself: put it in a list, [(samples, loader)].")
    parts = []
    for database, pair in enumerate(pairs):
        if not _is_pair(pair):
            raise TypeError(f"{where}[{database}] is a {type(pair).__name__}; expected a pair (samples, loader).")
        samples, loader = pair
        part = SplitPart(name, database, samples, loader)
        if isinstance(samples, (str, Mapping)) or not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
            raise TypeError(f"{part} has samples of type {type(samples).__name__}; expected a sequence of records.")
        if len(samples) == 0:
            raise ValueError(f"{part} has no samples: leave it out, or see why its list is empty.")
        if not _is_loader(loader):
            raise TypeError(
                f"{part} has a loader of type {type(loader).__name__}; expected a transform, a sequence of transforms, "
                "or an object with a method sample(record)."
            )
        parts.append(part)
    return tuple(parts)


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def _is_loader(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(map(callable, value))
    return callable(value) or callable(getattr(value, "sample", None))
