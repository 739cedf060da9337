"""Processes of their own that have the library imported when they start.

A new interpreter needs five seconds for the imports alone. These processes are forked by a server that has imported the
library and done nothing else, so what they do does not depend on the tests before. They end as any process does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path

import pytest
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["cil.cli", "cil.runner", "cil.learners.registry", "cil.cli.output"])


class Started:
    """A process that executes ``code`` in the folder ``cwd``; what it prints goes to files there.

    Args:
        code: Python code.
        cwd: Its working folder.
        environment: Its environment variables; by default those of this process.
        name: Beginning of the names of the files that it prints to.
    """

    def __init__(self, code: str, cwd: Path, environment: dict[str, str] | None = None, name: str = "printed") -> None:
        self.files = [cwd / f"{name}.{stream}" for stream in ("out", "err")]
        arguments = (code, str(cwd), dict(os.environ if environment is None else environment), self.files)
        self.process = CONTEXT.Process(target=_execute, args=arguments)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)  # from where the server imports these tests' copy of the library, not an installed one
            forkserver.ensure_running()
        self.process.start()

    def poll(self) -> int | None:
        """The exit code, as that of a subprocess; None while it runs."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def finish(self, timeout: float = 240) -> tuple[int, str, str]:
        """Exit code, output and error output, once it has ended; fails after ``timeout`` seconds."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            pytest.fail(f"after {timeout:g} s the process still ran: {self.printed()}")
        return (self.process.exitcode, *self.printed())

    def printed(self) -> list[str]:
        """Output and error output so far."""
        return [file.read_text() if file.exists() else "" for file in self.files]


def _execute(code: str, cwd: str, environment: dict[str, str], files: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for stream, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # CI's shell hands its children SIGINT ignored
    sys.path.insert(0, "")
    exec(compile(code, "started", "exec"), {"__name__": "__main__"})  # noqa: S102


def command(*arguments: str) -> str:
    """Code that runs ``cil`` with these arguments."""
    return f"import sys\nfrom cil.cli import main\nsys.argv = {['cil', *arguments]!r}\nmain()\n"


def together(code: str, count: int, place: Path) -> list[tuple[int, str, str]]:
    """Execute ``code`` in processes that find one another as launched ones do; exit code, output and error output of
    each. The store is this process's, as that of a launcher is."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    shared |= {"OMP_NUM_THREADS": 1, "TORCHELASTIC_USE_AGENT_STORE": True, "CIL_CACHE": place / "cache"}
    started = [
        Started(
            code,
            place,
            {**os.environ, **{key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}},
            f"process{rank}",
        )
        for rank in range(count)
    ]
    return [process.finish(300) for process in started]
