# SPDX-License-Identifier: Apache-2.0
"""A small training that resumes from its last checkpoint and, if told to, kills itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.handlers import CheckpointLoader

from tests.pipelines import make_loader


class Losses(list[str]):
    """Losses so far, as part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self[:] = state["losses"]


def main(folder: Path, epoch_length: int, kill_at: int) -> None:
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loader = make_loader([5, 1, 3, 7, 0, 2], 2, worker_type="thread", batch_size=2, queue_length=6, shuffle=True)
    network = torch.nn.Conv2d(1, 1, 3)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-8, momentum=0.9)
    losses = Losses()

    def step(_: Engine, batch: dict[str, Any]) -> None:
        optimizer.zero_grad()
        loss = (network(batch["image"]) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item().hex())

    trainer = Engine(step)
    kept: dict[str, Any] = {
        "network": network,
        "optimizer": optimizer,
        "loader": loader,
        "trainer": trainer,
        "losses": losses,
    }
    last = folder / "last.pt"
    if last.exists():
        CheckpointLoader(str(last), kept).attach(trainer)

    @trainer.on(Events.ITERATION_COMPLETED)
    def save_and_die(engine: Engine) -> None:
        torch.save({name: part.state_dict() for name, part in kept.items()}, folder / "new.pt")
        (folder / "new.pt").replace(last)
        if engine.state.iteration == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.run(loader, max_epochs=-(-24 // (epoch_length or len(loader))), epoch_length=epoch_length or None)
    loader.close()
    (folder / "losses").write_text("\n".join(losses))
