# SPDX-License-Identifier: Apache-2.0
"""Programs that run as by ``python -c`` and ``python -m``, without the seconds that importing torch and MONAI takes.

One interpreter imports them and forks itself for each program. What is forked goes on as the main program, in a session
of its own, and ends as interpreters do: exit handlers, threads, exit code and all.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMPORTED = ("monai.bundle", "torch.utils.tensorboard", "ignite.handlers.tqdm_logger", "fire", "monai_patchqueue")


class Program:
    """A program under way, with one thread for sums."""

    def __init__(self, interpreter: Interpreter, pid: int, written: tuple[Path, Path]) -> None:
        self.interpreter = interpreter
        self.pid = pid
        self.returncode: int | None = None
        self._output, self._errors = written

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    @property
    def errors(self) -> str:
        """What it has written to stderr so far."""
        return self._errors.read_text(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        """Its exit code, minus the signal's number where one has killed it; ``None`` while it runs."""
        if self.returncode is None:
            self.returncode = self.interpreter.ask({"pid": self.pid})
        return self.returncode

    def wait(self, seconds: float) -> int:
        """Wait for its end and give its exit code."""
        from tests.processes import wait_for

        wait_for(lambda: self.poll() is not None, f"the end of a program that wrote {self.errors[-2000:]!r}", seconds)
        return self.returncode  # type: ignore[return-value]

    def kill(self) -> None:
        """Kill it, and whatever it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


class Interpreter:
    """Runs programs that find torch, MONAI and this package imported already.

    Args:
        folder: where what they write is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs: list[Program] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.programs"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        self._process.wait()

    def start(self, *arguments: str, cwd: Path | str = ROOT, fresh: bool = False) -> Program:
        """Start a program with the arguments that ``python`` would get, ``-m`` or ``-c`` first.

        A fresh one has nothing imported yet.
        """
        written = tuple(self.folder / f"{len(self.programs)}.{name}" for name in ("output", "errors"))
        request = {"arguments": arguments, "cwd": str(cwd), "fresh": fresh, "written": list(map(str, written))}
        for file in written:
            file.touch()
        program = Program(self, self.ask(request), written)  # type: ignore[arg-type]
        self.programs.append(program)
        return program

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request; the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the interpreter that starts programs has ended"
        return json.loads(answer)

    def kill_programs(self) -> None:
        """Kill all that still runs."""
        for program in self.programs:
            if program.poll() is None:
                program.kill()

    def close(self) -> None:
        """End the interpreter."""
        self.kill_programs()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def serve() -> None:
    """Start programs, and say how they ended, until nobody asks any more."""
    if os.fork():
        os._exit(0)  # so that this is nobody's child: tests count the children of theirs
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # collecting would write to, and so copy, what programs share with this process
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "pid" in request:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                become(**request)
                return
        print(json.dumps(answer), flush=True)


def become(arguments: list[str], cwd: str, fresh: bool, written: list[str]) -> None:
    """Be the program that was asked for."""
    os.setsid()
    os.chdir(cwd)
    sys.path[0] = cwd
    for number, file in enumerate((os.devnull, *written)):
        descriptor = os.open(file, os.O_RDWR)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if fresh:
        os.execv(sys.executable, [sys.executable, *arguments])
    kind, content, *rest = arguments
    sys.argv = [content if kind == "-m" else kind, *rest]
    if kind == "-m":
        runpy.run_module(content, run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(content, "<string>", "exec"), vars(main))


if __name__ == "__main__":
    serve()
