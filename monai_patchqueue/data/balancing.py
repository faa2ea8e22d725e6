# SPDX-License-Identifier: Apache-2.0
"""How likely each volume is to be drawn so that patches are balanced over classes, databases, or both."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .splits import SplitPart

__all__ = ["Balancing", "balanced_weights"]


def balanced_weights(groups: Sequence[tuple[Hashable, ...]], counts: Sequence[int]) -> NDArray[np.float64]:
    """Weights for drawing volumes with replacement, with which patches are balanced over groups.

    The first level's groups are equally likely for a patch; within each, so are the second level's that it has, and so
    on; within a last group, each patch is as likely as any other. A volume that gives more patches is not drawn more
    often for it: it brings them along.

    Args:
        groups: of each volume: its group on each level.
        counts: patches that each volume gives.

    Returns:
        float64 array. Weight times count sums to 1, so that for ``n`` patches ``n × sum(weights)`` volumes are to be
        drawn on average.

    Raises:
        ValueError: a group whose volumes give no patch at all.

    Example:
        One volume of class "a" gives four patches, two volumes of class "b" give one each:

        >>> balanced_weights([("a",), ("b",), ("b",)], [4, 1, 1]).tolist()
        [0.125, 0.25, 0.25]
    """
    children: defaultdict[tuple[Hashable, ...], set[Hashable]] = defaultdict(set)
    patches: Counter[tuple[Hashable, ...]] = Counter()
    for group, count in zip(groups, counts, strict=True):
        patches[group] += int(count)
        for level, name in enumerate(group):
            children[group[:level]].add(name)
    for group, total in patches.items():
        if not total:
            raise ValueError(f"the volumes of {' / '.join(map(repr, group))} give no patches: nothing can be drawn.")
    shares = {group: np.prod([1 / len(children[group[:n]]) for n in range(len(group))]) for group in patches}
    return np.asarray([shares[g] / patches[g] if c else 0.0 for g, c in zip(groups, counts, strict=True)])


@dataclass(frozen=True)
class Balancing:
    """What a data module's splits are balanced by.

    Args:
        by_class: classes; within databases, if these are balanced too.
        by_database: databases.
        class_key: where records hold the class.
    """

    by_class: bool
    by_database: bool
    class_key: str | None

    def __bool__(self) -> bool:
        return self.by_class or self.by_database

    def weights(self, parts: Sequence[SplitPart], counts: Sequence[int]) -> list[float] | None:
        """Weights of a split's volumes, as :func:`balanced_weights` gives them; none where nothing is balanced.

        Args:
            parts: the split's databases.
            counts: patches that each volume gives, over all databases.

        Raises:
            ValueError: a sample whose class is not known.
        """
        if not self:
            return None
        groups: list[tuple[Any, ...]] = []
        for part in parts:
            for index in range(len(part.samples)):
                database = (str(part),) if self.by_database else ()
                groups.append((*database, part.target(index, self.class_key)) if self.by_class else database)
        weights: list[float] = balanced_weights(groups, counts).tolist()
        return weights
