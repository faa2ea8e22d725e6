# SPDX-License-Identifier: Apache-2.0
"""Command line of the benchmarks: one subcommand per module with ``HELP``, ``add_arguments`` and ``main``."""

from __future__ import annotations

import argparse
import sys

from . import chunks, dice, handlers, loaders, performance, predictions, random_queue, sampling

COMMANDS = {
    "chunks": chunks,
    "dice": dice,
    "handlers": handlers,
    "loaders": loaders,
    "performance": performance,
    "predictions": predictions,
    "random_queue": random_queue,
    "sampling": sampling,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(subparsers.add_parser(name, help=module.HELP, description=module.__doc__))
    arguments = parser.parse_args()
    return COMMANDS[arguments.command].main(arguments)


if __name__ == "__main__":
    sys.exit(main())
