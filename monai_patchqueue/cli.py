# SPDX-License-Identifier: Apache-2.0
"""The command line: what keeps a bundle's training waiting, and what its transforms sample."""

from __future__ import annotations

import argparse
import ast
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch.utils.data import DataLoader

from .report.bundle_loader import build_dataloader, find_dataloader, overrides_for, read_bundle
from .report.inspection import sample_volume
from .report.inspection_plot import plot_sampling
from .report.profile_text import advice_of, profile_as_text
from .report.profiler import profile_pipeline

__all__ = ["main"]

logger = logging.getLogger(__name__)

_PROFILE = """\
Runs the data side of an existing bundle for a few seconds, in short runs of a PatchQueueLoader, whatever loader the
bundle has. Neither its network nor anything else that the loader does not refer to is built, and no file is changed.
Values of the config can be overridden as for `python -m monai.bundle run`."""

_PROFILE_EXAMPLES = """\
examples:
  python -m monai_patchqueue profile --config_file configs/train.json
  python -m monai_patchqueue profile --config_file configs/train.json --step_ms 50 --output configs/faster.json
  python -m monai.bundle run --config_file "['configs/train.json','configs/faster.json']"
  python -m monai_patchqueue profile --config_file "['a.json','b.json']" --dataset_dir /data --num_workers 4
"""


_INSPECT = """\
Shows what the transform that cuts patches takes of one volume: how often each class is at a center and in patches, and
as a picture where centers lie and what patches look like when they come out of the pipeline."""

_INSPECT_EXAMPLES = """\
examples:
  python -m monai_patchqueue inspect --config_file configs/train.json
  python -m monai_patchqueue inspect --config_file configs/train.json --case 3 --output case_3.png
  python -m monai_patchqueue inspect --config_file configs/train.json --patches 1000 --num_samples 50
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: instead of the process's own.

    Returns:
        The exit status: 0, or 2 after an error, which is told in one line.
    """
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of MONAI's and torch's about themselves
            known.run(known, _overrides(rest))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        logger.debug("failed", exc_info=True)
        print(f"{parser.prog}: error: {_in_one_line(error)}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """Tells errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="monai-patchqueue",
        description="What keeps a bundle's training waiting, and what its transforms sample.",
        epilog=f"{_PROFILE_EXAMPLES}{_INSPECT_EXAMPLES.removeprefix('examples:')[1:]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    profile = commands.add_parser(
        "profile",
        help="time a bundle's transforms, predict patches per second, and say what to set",
        description=_PROFILE,
        epilog=_PROFILE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_config(profile)
    profile.add_argument("--step_ms", type=float, default=0.0, help="what training takes for a batch, in milliseconds")
    profile.add_argument("--seconds", type=float, default=3.0, help="length of each of the three or four runs")
    profile.add_argument("--output", help="write what to set as a JSON file that `monai.bundle run` takes after yours")
    profile.set_defaults(run=_profile)
    look = commands.add_parser(
        "inspect",
        help="show what a bundle's transforms sample of one volume, as a table and a picture",
        description=_INSPECT,
        epilog=_INSPECT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_config(look)
    look.add_argument("--case", type=int, default=0, help="which volume of the dataset, from 0")
    look.add_argument("--patches", type=int, default=200, help="how many patches to take at least")
    look.add_argument("--seed", type=int, default=0, help="of the randomness")
    look.add_argument("--image_key", help="default: the first key of the crop that is not the label's")
    look.add_argument("--label_key", help="default: the crop's own, or 'label'")
    look.add_argument("--output", help="write a picture, as .png, .pdf, .svg, .jpg or .webp")
    look.set_defaults(run=_inspect)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config_file", required=True, help="a bundle's training config, or a list: \"['a.json','b.json']\""
    )
    parser.add_argument("--dataloader_id", help="where the loader is in it (default: train#dataloader, or found)")
    parser.add_argument("--no_progress", action="store_true", help="show no progress bars")


def _load(known: argparse.Namespace, overrides: dict[str, Any]) -> tuple[Any, str, DataLoader[Any]]:
    files = _literal(known.config_file)
    config = read_bundle([files] if isinstance(files, str) else [str(file) for file in files], overrides)
    place = find_dataloader(config, known.dataloader_id)
    return config, place, build_dataloader(config, place)


def _profile(known: argparse.Namespace, overrides: dict[str, Any]) -> None:
    for name in ("step_ms", "seconds"):
        if not getattr(known, name) >= 0:
            raise ValueError(f"--{name} {getattr(known, name)}: expected 0 or more.")
    _check_output(known.output, [".json"])
    config, place, loader = _load(known, overrides)
    profile = profile_pipeline(loader, known.seconds, known.step_ms / 1000, not known.no_progress)
    advice, promise = advice_of(profile)
    print(f"{place} of {known.config_file}: {type(loader).__name__}, {len(loader.dataset)} volumes\n")  # type: ignore[arg-type]
    print(profile_as_text(profile, advice, promise))
    setting = next((each for each in advice if each.changes), None)
    if known.output:
        values = overrides_for(config, place, loader, setting.changes if setting else {})
        Path(known.output).write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")
        print(f"\nWritten to {known.output}: {json.dumps(values)}")


def _inspect(known: argparse.Namespace, overrides: dict[str, Any]) -> None:
    if known.patches < 1:
        raise ValueError(f"--patches {known.patches}: expected 1 or more.")
    _check_output(known.output, [".png", ".pdf", ".svg", ".jpg", ".webp"])
    _, _, loader = _load(known, overrides)
    sampled = sample_volume(
        loader.dataset,
        known.case,
        patches=known.patches,
        seed=known.seed,
        image_key=known.image_key,
        label_key=known.label_key,
        progress=not known.no_progress,
    )
    print(sampled.as_text())
    if known.output:
        plot_sampling(sampled).savefig(known.output, dpi=110)
        print(f"Written to {known.output}")


def _check_output(output: str | None, endings: Sequence[str]) -> None:
    """Tell before the work, and not after it, that its result could not be written."""
    if output and (Path(output).suffix not in endings or not Path(output).absolute().parent.is_dir()):
        expected = " or ".join(endings)
        raise ValueError(f"--output {output}: expected a name that ends in {expected}, in a folder that is there.")


def _overrides(rest: Sequence[str]) -> dict[str, Any]:
    """Values by id from ``--id value`` and ``--id=value``."""
    values: dict[str, Any] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        name, given, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise ValueError(f"{word!r} is neither an option nor a value of one; expected --id value.")
        if not given:
            if not words:
                raise ValueError(f"{word} has no value; expected {word} value.")
            value = words.pop(0)
        values[name] = _literal(value)
    return values


def _literal(text: str) -> Any:
    """A Python value, as Fire reads it, or else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "null": None}.get(text, text)


def _in_one_line(error: BaseException) -> str:
    """An error's message and, for those that only say where, its cause's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    cause = error.__cause__
    return lines[0] if cause is None else f"{lines[0]} {type(cause).__name__}: {_in_one_line(cause)}"
