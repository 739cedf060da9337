"""Ends the processes of a local Ray that outlive a killed sweep: some of them wait a minute for a daemon that is gone.

It is run as a script, in a process of its own. It reads its input, which ends when the sweep does, however that ends.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

GRACE = 5.0
"""Seconds that the processes have to end by themselves."""
DONE = b"done"


@contextmanager
def guarded() -> Iterator[None]:
    """Within the block a guard watches this process, for the processes of Ray that it has started."""
    started = [child for child in psutil.Process().children(recursive=True) if _is_of_ray(child)]
    names = [f"{child.pid}:{child.create_time()}" for child in started]
    guard = subprocess.Popen(
        [sys.executable, __file__, *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the sweep
    )
    try:
        yield
    finally:
        guard.communicate(DONE)


def _is_of_ray(process: psutil.Process) -> bool:
    try:
        return any(part.startswith("ray::") or "/ray/" in part for part in process.cmdline())
    except psutil.Error:  # it has ended, or is another user's
        return False


def main() -> None:
    """Wait for the end of the input; unless the sweep has ended in good order, kill the given processes later."""
    if sys.stdin.buffer.read() == DONE:
        return
    time.sleep(GRACE)
    for argument in sys.argv[1:]:
        pid, created = argument.split(":")
        try:
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):  # not another process with its number
                process.kill()
        except psutil.Error:
            continue  # it has ended


if __name__ == "__main__":
    main()
