# SPDX-License-Identifier: Apache-2.0
"""What was asked of the package before it was measured, and whether it was reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from .cases import CASES
from .contestants import CONTESTANTS
from .report import figure_of, markdown, ratios
from .sampling_contestants import MAPS

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Results:
    """All that was measured: ``runs`` by case and contestant, ``sampling`` as its JSON has it."""

    runs: Mapping[str, Runs]
    sampling: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Reached:
    """A bar and what was reached."""

    case: str
    bar: str
    reached: str
    met: bool


class Bar(Protocol):
    def look_up(self, results: Results) -> Reached | None:
        """What was reached; None if it was not measured."""
        ...


@dataclass(frozen=True)
class TimesOf:
    """At least (with ``most``: at most) so many times a figure of others, of which the best counts."""

    case: str
    ours: str
    others: tuple[str, ...]
    factor: float
    figure: str = "free.patches_per_s"
    most: bool = False
    what: str = ""

    def look_up(self, results: Results) -> Reached | None:
        runs = results.runs.get(self.case, {})
        rivals = [name for name in self.others if name in runs]
        if self.ours not in runs or not rivals:
            return None
        by_rival = {name: median(ratios(runs[self.ours], runs[name], self.figure)) for name in rivals}
        best = max(by_rival, key=by_rival.__getitem__) if self.most else min(by_rival, key=by_rival.__getitem__)
        met = by_rival[best] <= self.factor if self.most else by_rival[best] >= self.factor
        bar = f"{self.what}{'≤' if self.most else '≥'} {self.factor:g} × {CONTESTANTS[best].title}"
        return Reached(_title(self.case, self.ours), bar, f"{by_rival[best]:.2f} ×", met)


@dataclass(frozen=True)
class AtMost:
    """A figure that is to stay below a value; the median of the rounds counts."""

    case: str
    ours: str
    figure: str
    value: float
    what: str
    text: str = "{:.1f}"

    def look_up(self, results: Results) -> Reached | None:
        runs = results.runs.get(self.case, {}).get(self.ours)
        if not runs:
            return None
        found = median(figure_of(run, self.figure) for run in runs)
        bar = f"{self.what} < {self.text.format(self.value)}"
        return Reached(_title(self.case, self.ours), bar, self.text.format(found), found < self.value)


@dataclass(frozen=True)
class Within:
    """The same contestant in two cases: patches per second differ by no more than a share."""

    cases: tuple[str, str]
    ours: str
    share: float

    def look_up(self, results: Results) -> Reached | None:
        one, other = (results.runs.get(case, {}).get(self.ours, ()) for case in self.cases)
        if not one or not other:
            return None
        speeds = [median(figure_of(run, "free.patches_per_s") for run in runs) for runs in (one, other)]
        differ = 1 - min(speeds) / max(speeds)
        title = f"{CONTESTANTS[self.ours].title}: both sizes of volumes"
        return Reached(title, f"patches/s within {self.share:.0%}", f"{differ:.0%}", differ <= self.share)


@dataclass(frozen=True)
class Sampling:
    """Choosing and cutting patches: times of another way, or of the least work, in every scene of a kind.

    Args:
        kind: what centers are drawn by.
        ours: whose time it is.
        other: whose it is compared with.
        factor: at least so many times faster than ``other``; with ``most``, at most so many times its time.
        most: see there.
        less_copy: the copy of the patches is taken off our time.
        what: begins the bar.
    """

    kind: str
    ours: str
    other: str
    factor: float
    most: bool = False
    less_copy: bool = False
    what: str = ""

    def look_up(self, results: Results) -> Reached | None:
        scenes = [r for r in results.sampling if r["scene"]["kind"] == self.kind and self.other in r["ms"]]
        if not scenes:
            return None
        found = [self._ratio(scene["ms"]) for scene in scenes]
        shapes = [f"{'×'.join(map(str, r['scene']['shape']))}, {r['scene']['patch_size']}³" for r in scenes]
        reached = "; ".join(f"{shape}: {ratio:.1f} ×" for shape, ratio in zip(shapes, found, strict=True))
        met = max(found) <= self.factor if self.most else min(found) >= self.factor
        title = scenes[0]["titles"][self.other]
        bar = f"{self.what}{'≤' if self.most else '≥'} {self.factor:g} × {title}"
        return Reached(f"8 patches of a volume in RAM, {self.kind}", bar, reached, met)

    def _ratio(self, ms: Mapping[str, Sequence[float]]) -> float:
        copies = ms["limit-copy"] if self.less_copy else [0.0] * len(ms[self.ours])
        of_rounds = [
            (ours - copy) / other for ours, copy, other in zip(ms[self.ours], copies, ms[self.other], strict=True)
        ]
        return median(of_rounds) if self.most else 1 / median(of_rounds)


def _title(case: str, ours: str) -> str:
    return f"{CONTESTANTS[ours].title}: {CASES[case].title}"


READER, STORE, CACHE = "patchqueue-reader", "patchqueue-store", "patchqueue-cache-index"
IN_MEMORY = ("monai-cache", "monai-cache-index", "monai-cache-thread")
FIRST, INDEXED = "ours-tensors", "ours-index-tensors"
BARS: tuple[Bar, ...] = (
    TimesOf("gz", READER, ("torchio",), 8),
    TimesOf("gz", READER, ("monai",), 6),
    TimesOf("gz", READER, ("limit-decode",), 0.7),
    TimesOf("gz", "patchqueue", ("torchio",), 2),
    TimesOf("gz", "patchqueue", ("monai",), 1.5),
    TimesOf("prepared", READER, ("nnunet",), 3),
    TimesOf("prepared", STORE, ("nnunet",), 3),
    TimesOf("prepared-large", STORE, ("nnunet",), 3),
    Within(("prepared", "prepared-large"), STORE, 0.2),
    TimesOf("ram", CACHE, IN_MEMORY, 5),
    TimesOf("ram", CACHE, ("limit-copy",), 0.35),
    TimesOf("ram-0", CACHE, IN_MEMORY, 3),
    TimesOf("gz-large", READER, ("torchio",), 12),
    TimesOf("gz-large", READER, ("limit-decode",), 0.7),
    AtMost("gz", READER, "paced.stalled", 0.01, "consumer of 80 patches/s: stalled", "{:.1%}"),
    AtMost("gz", READER, "paced.wait_p99_ms", 5.0, "consumer of 80 patches/s: p99 wait", "{:.1f} ms"),
    TimesOf("gz", READER, ("monai",), 1, "first_batch_s", most=True, what="first batch after "),
    *(
        Sampling(kind, FIRST, other, 10, what="speed, first use of the map, ")
        for kind in MAPS
        for other in ("torchio", "monai-tensors")
    ),
    *(
        Sampling(kind, FIRST, "limit-map", factor, most=True, less_copy=True, what="time, first use, less the copy, ")
        for kind, factor in (("label", 2), ("rare-class", 2), ("weighted", 3))
    ),
    *(Sampling(kind, INDEXED, "limit-copy", 1.5, most=True, what="time, index at hand, ") for kind in MAPS),
    TimesOf("gz", READER, ("torchio", "monai"), 1, "peak_pss_mib", most=True, what="peak memory "),
    TimesOf("gz", "patchqueue", ("torchio", "monai"), 1, "peak_pss_mib", most=True, what="peak memory "),
    TimesOf("gz-large", READER, ("torchio", "monai"), 1, "peak_pss_mib", most=True, what="peak memory "),
)


def bars_table(results: Results) -> str:
    """One row for each bar that was measured."""
    found = [reached for bar in BARS if (reached := bar.look_up(results)) is not None]
    rows = [[reached.case, reached.bar, reached.reached, "yes" if reached.met else "**no**"] for reached in found]
    return markdown(["", "bar", "reached", ""], rows)
