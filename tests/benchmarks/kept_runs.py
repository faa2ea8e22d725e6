# SPDX-License-Identifier: Apache-2.0
"""The figures of a case in a JSON file, so that an interrupted benchmark goes on where it ended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .report import environment

PACKAGE = Path(__file__).resolve().parents[2] / "monai_patchqueue"
Run = dict[str, Any]


def package_state() -> str:
    """A hash of the package's sources: figures of other sources are not of this package."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    return digest.hexdigest()


class KeptRuns:
    """One case's checks and runs; each run is written as soon as it is done.

    Args:
        file: where they are kept.
        setting: what they are of, as plain JSON values: runs of another one are dropped by :meth:`require_current`.
    """

    def __init__(self, file: Path, setting: Mapping[str, Any]) -> None:
        self.file = file
        self.setting = json.loads(json.dumps(setting))
        self.content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def require_current(self) -> bool:
        """Start anew if what is kept is of another setting or of other sources; says whether it did so."""
        current = {"setting": self.setting, "package": package_state()}
        if {key: self.content.get(key) for key in current} == current:
            return False
        was_there = bool(self.content)
        self.content = {**current, "environment": environment(), "checks": {}, "runs": {}}
        return was_there

    @property
    def checks(self) -> dict[str, Any]:
        """What the comparison with the stock pipeline found, by contestant."""
        found: dict[str, Any] = self.content.get("checks", {})
        return found

    def keep_checks(self, checks: Mapping[str, Any]) -> None:
        self.checks.update(checks)
        self._write()

    def has(self, name: str, round_: int) -> bool:
        return str(round_) in self.content["runs"].get(name, {})

    def keep(self, name: str, round_: int, run: Run) -> None:
        self.content["runs"].setdefault(name, {})[str(round_)] = run
        self._write()

    def runs(self) -> dict[str, list[Run]]:
        """Runs by contestant, of rounds in which everyone who has any ran: ratios are taken within a round."""
        kept: dict[str, dict[str, Run]] = {name: runs for name, runs in self.content.get("runs", {}).items() if runs}
        whole = sorted(set.intersection(*(set(runs) for runs in kept.values())), key=int) if kept else []
        return {name: [runs[round_] for round_ in whole] for name, runs in kept.items()} if whole else {}

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.content, indent=1))
        unfinished.replace(self.file)
