# SPDX-License-Identifier: Apache-2.0
"""The config on the page about data modules."""

from __future__ import annotations

from pathlib import Path

from monai_patchqueue.data.synthetic import make_synthetic_dataset
from tests.programs import Interpreter

CONFIG = Path(__file__).parents[2] / "docs/data_module.json"


def test_the_config_trains_in_as_many_chunks_as_wanted(interpreter: Interpreter, tmp_path: Path) -> None:
    make_synthetic_dataset(tmp_path / "data", num_volumes=4, shape=(40, 36, 38), progress=False)
    command = ["-m", "monai.bundle", "run", "--config_file", str(CONFIG), "--dataset_dir", str(tmp_path / "data")]
    # 3 volumes give 24 patches: 2 whole batches, and 4 patches that are dropped
    flags = ["--max_epochs", "1", "--batch_size", "10", "--batch_chunk_count", "5"]
    program = interpreter.start(*command, *flags, cwd=tmp_path)
    assert program.wait(200) == 0, program.errors[-5000:]
    output = program.output + program.errors
    assert "Iter: 10/10 --" in output
    assert "val_mean_dice" in output
    assert "queue_starved" in output
