# SPDX-License-Identifier: Apache-2.0
"""The cases that `performance` runs: what is loaded, by whom, and for how long."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .setup import Setup
from .volumes import write_volumes

SMALL = (192, 192, 160)
LARGE = (512, 512, 300)
FROM_FILES = ("patchqueue-reader", "monai", "torchio")
PREPARED = ("patchqueue-reader", "patchqueue-store", "nnunet")
IN_MEMORY = ("patchqueue-cache", "patchqueue-cache-index", "monai-cache", "monai-cache-index", "monai-cache-thread")


@dataclass(frozen=True)
class Case:
    """One setting in which contestants run in turn.

    Args:
        name: as on the command line and on the page.
        title: as in headings of tables and plots.
        contestants: who takes part.
        shape: of the volumes.
        suffix: of their files.
        volumes: how many there are.
        patch_size: edge of the patches.
        workers: of each contestant.
        rounds: fresh processes of each contestant.
        seconds: measured at least, after an epoch that is not.
        paced_seconds: of a consumer that sleeps; 0 for none.
    """

    name: str
    title: str
    contestants: tuple[str, ...]
    shape: tuple[int, int, int] = SMALL
    suffix: str = ".nii.gz"
    volumes: int = 12
    patch_size: int = 64
    workers: int = 2
    rounds: int = 2
    seconds: float = 3.0
    paced_seconds: float = 0.0

    @property
    def setting(self) -> dict[str, Any]:
        """What a run's figures depend on."""
        others = ("name", "title", "contestants", "rounds")
        return {key: value for key, value in asdict(self).items() if key not in others}

    def setup(self, folder: Path) -> Setup:
        """Write the volumes, unless they are in `folder` already, and say how they are to be loaded."""
        home = folder / ("x".join(str(size) for size in self.shape) + self.suffix.replace(".", "_"))
        home.mkdir(parents=True, exist_ok=True)
        return Setup(
            items=write_volumes(home, self.volumes, self.shape, self.suffix),
            patch_size=self.patch_size,
            num_workers=self.workers,
            epochs=1,
            seconds=self.seconds,
            paced=self.paced_seconds > 0,
            paced_seconds=self.paced_seconds,
            checked_volumes=4,
        )


CASES = {
    case.name: case
    for case in (
        Case(
            "gz",
            ".nii.gz, 192×192×160, 64³, 2 workers",
            (*FROM_FILES, "patchqueue-whole", "patchqueue", "patchqueue-monai-crop", "monai-thread", "limit-decode"),
            rounds=3,
            paced_seconds=10.0,
        ),
        Case("gz-1", ".nii.gz, 192×192×160, 64³, 1 worker", FROM_FILES, workers=1, rounds=1),
        Case("gz-0", ".nii.gz, 192×192×160, 64³, no workers", FROM_FILES, workers=0, rounds=1),
        Case("gz-96", ".nii.gz, 192×192×160, 96³, 2 workers", (*FROM_FILES, "limit-decode"), patch_size=96, rounds=1),
        Case("gz-large", ".nii.gz, 512×512×300, 64³, 2 workers", (*FROM_FILES, "limit-decode"), LARGE, volumes=4),
        Case(
            "prepared",
            "uncompressed or stored, 192×192×160, 64³, 2 workers",
            (*PREPARED, "patchqueue-store-normalized", "nnunet-normalized", "monai-persistent", "limit-memmap"),
            suffix=".nii",
            rounds=3,
        ),
        Case(
            "prepared-96",
            "uncompressed or stored, 192×192×160, 96³, 2 workers",
            (*PREPARED, "limit-memmap"),
            suffix=".nii",
            patch_size=96,
            rounds=1,
        ),
        Case(
            "prepared-large",
            "uncompressed or stored, 512×512×300, 64³, 2 workers",
            (*PREPARED, "limit-memmap"),
            LARGE,
            ".nii",
            volumes=4,
        ),
        Case("ram", "in RAM, 192×192×160, 64³, 2 workers", (*IN_MEMORY, "limit-copy", "limit-ram")),
        Case("ram-1", "in RAM, 192×192×160, 64³, 1 worker", IN_MEMORY, workers=1, rounds=1),
        Case("ram-0", "in RAM, 192×192×160, 64³, no workers", (*IN_MEMORY, "limit-copy", "limit-ram"), workers=0),
    )
}
