# SPDX-License-Identifier: Apache-2.0
"""Workers that are killed again and again, at any moment: nothing is lost, doubled or out of order."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
from monai.data import Dataset
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, MapTransform, Randomizable

from monai_patchqueue import PatchQueueLoader, RandUniformPatchd
from tests.pipelines import digest, make_loader
from tests.processes import die, idle, wait_for, wait_for_death, workers
from tests.volumes import blobs

KEYS = ("image", "label")
# How long each stage takes about.
SECONDS = {"loading": 0.01, "sampling": 0.0004, "writing": 0.0002, "reporting": 0.02}
STAGES = tuple(SECONDS)
PATCHES = 5


class Doom:
    """How and when a worker dies: in which stage, and how many seconds after its beginning."""

    def __init__(self, stage: str, delay: float, access: int, file: Path) -> None:
        self.stage = stage
        self.delay = delay
        self.access = access
        self.accesses = 0
        self.file = file
        file.write_text(stage)

    def arm(self) -> None:
        sending = frame_of("_send", sys._getframe())
        threading.Thread(target=self._strike, args=(threading.get_ident(), sending), daemon=True).start()

    def _strike(self, thread: int, sending: FrameType | None) -> None:
        time.sleep(self.delay)
        if self.stage == "reporting" and frame_of("_send", sys._current_frames()[thread]) is not sending:
            self.file.write_text("missed")  # it is sent: another volume's life, perhaps its last, is at stake now
        else:
            die()

    def written(self) -> None:
        """An array of the volume is about to be copied into its slot."""
        if self.accesses == self.access:
            self.arm()
        self.accesses += 1
        if self.accesses == PATCHES * len(KEYS):
            wait_for_death()


def frame_of(function: str, frame: FrameType | None) -> FrameType | None:
    """The call of a function that a frame is part of."""
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame


class Doomed(MapTransform, Randomizable):
    """Decides at what a worker is to be killed, once for each time that a volume is due.

    The decision is made of the volume's own random state, which is the same when it is prepared again; a file says
    whether it is.
    """

    def __init__(self, folder: Path | None) -> None:
        super().__init__(KEYS)
        self.folder = folder

    def __call__(self, data: Any) -> Any:
        number, part, access = int(self.R.randint(2**31 - 1)), self.R.rand(), int(self.R.randint(PATCHES * len(KEYS)))
        stage = STAGES[number % len(STAGES)]
        doom = None
        if self.folder is not None and not (self.folder / f"{number}").exists():
            doom = Doom(stage, part * SECONDS[stage], access, self.folder / f"{number}")
            if stage == "loading":
                doom.arm()
        return {**data, "note": Note("a text", doom)}


class Survived(MapTransform):
    """Nobody who is to die while loading comes this far."""

    def __call__(self, data: Any) -> Any:
        if data["note"].dies("loading"):
            wait_for_death()
        return data


class Note(str):
    """A text that kills while it is being sent, together with much else so that this takes a while."""

    doom: Doom | None

    def __new__(cls, text: str, doom: Doom | None) -> Note:
        note = super().__new__(cls, text)
        note.doom = doom
        return note

    def dies(self, stage: str) -> bool:
        return self.doom is not None and self.doom.stage == stage

    def __reduce__(self) -> Any:
        if self.doom is not None and self.dies("reporting"):
            self.doom.arm()
            return first, (str(self), bytes(40_000_000))
        return str, (str(self),)


def first(text: str, _: bytes) -> str:
    return text


class Sampler(RandUniformPatchd):
    """Is killed while it samples."""

    def __call__(self, data: Any, *arguments: Any, **options: Any) -> Any:
        note = data["note"]
        if note.dies("sampling"):
            note.doom.arm()
        patches = super().__call__(data, *arguments, **options)
        if note.dies("sampling"):
            wait_for_death()
        return patches


class Patch(dict[str, Any]):
    """Is killed while its arrays are written into the slab."""

    def __getitem__(self, key: str) -> Any:
        if self["note"].dies("writing") if key != "note" else False:
            self["note"].doom.written()
        return super().__getitem__(key)


def doomed_loader(records: list[dict[str, str]], folder: Path | None, num_workers: int) -> PatchQueueLoader:
    transforms = [
        Doomed(folder),
        LoadImaged(KEYS),
        EnsureChannelFirstd(KEYS),
        Survived(KEYS),
        Sampler(KEYS, spatial_size=24, num_samples=PATCHES),
    ]
    arguments: dict[str, Any] = {"shuffle": True, "batch_size": 3, "queue_length": 15, "patch_transform": Patch}
    return make_loader(Dataset(records, Compose(transforms)), num_workers, **arguments)


def kill_while_idle(loader: PatchQueueLoader) -> int:
    """Wait until the queue is full, and kill one worker or both."""
    pids: list[int] = []

    def both_are_idle() -> bool:
        pids[:] = workers()  # a dead one may just be replaced
        return loader.stats().fill >= 1 and len(pids) == loader.num_workers and idle(pids)

    wait_for(both_are_idle, "idle workers")
    victims = pids[: 1 + loader.stats().batches % 2]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    return len(victims)


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_a_hundred_kills_at_every_stage_change_no_batch(tmp_path: Path) -> None:
    volumes, epochs = 14, 8
    records, folder = [], tmp_path / "kills"
    folder.mkdir()
    for case in range(volumes):
        record = {key: str(tmp_path / f"{key}_{case}.nii.gz") for key in KEYS}
        image = np.random.default_rng(case).integers(0, 1000, (40, 44, 48)).astype(np.int16)
        nib.save(nib.Nifti1Image(image, np.diag([1.0, 1.5, 2.0, 1.0])), record["image"])
        nib.save(nib.Nifti1Image(blobs(40, 44, 48, seed=case)[0], np.eye(4)), record["label"])
        records.append(record)
    undisturbed = doomed_loader(records, None, 0)
    expected = [[digest([batch]) for batch in undisturbed] for _ in range(epochs)]

    descriptors = psutil.Process().num_fds()
    kills: Counter[str] = Counter()
    with doomed_loader(records, folder, 2) as loader:
        for epoch in range(epochs):
            digests = []
            for number, batch in enumerate(loader):
                digests.append(digest([batch]))
                if number in (2, 11, 17):
                    kills["idling"] += kill_while_idle(loader)
            assert digests == expected[epoch], epoch
    kills.update(file.read_text() for file in folder.iterdir())
    kills.pop("missed", None)
    assert kills.total() >= 100
    assert all(kills[stage] >= 15 for stage in (*STAGES, "idling")), kills
    assert not workers()
    assert psutil.Process().num_fds() <= descriptors
    print(f"kills: {dict(kills)}")  # seen with pytest -s
