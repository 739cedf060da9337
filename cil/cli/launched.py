"""The end of a command that several processes run: the first one that meets a fault says so, and all of them end.

Processes that wait for one another in a collective operation neither see an exception of another one nor end by
themselves. Under ``accelerate launch`` and ``torchrun`` all of them can reach a store of the launcher: a fault is
announced there, and a thread of each process watches for it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

CODE = 2
"""Exit code after a fault, of all processes."""
INTERVAL = 0.2
"""Seconds between two looks for a fault of another process."""
PATIENCE = 5.0
"""Seconds to wait for all processes to end, so that the launcher does not have to end them."""
LOST = ("closed by peer", "reset by peer", "Broken pipe")
"""Parts of torch's messages about another process that is gone."""


def processes() -> int:
    """Number of processes that run this command, from the environment and without torch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def lost_another(error: Exception) -> bool:
    """Whether an exception only says that another process of the command is gone."""
    return processes() > 1 and isinstance(error, RuntimeError) and any(part in str(error) for part in LOST)


@contextmanager
def watched() -> Iterator[None]:
    """End this process, too, if another one announces a fault during the block."""
    if processes() == 1 or not _has_store():
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(over,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(PATIENCE)  # a thread inside the store's code while Python ends aborts the process


def announce() -> bool:
    """Announce a fault. Returns whether this process is the first one and so has to print it.

    Without a store nobody knows who is the first, so every process prints.
    """
    if processes() == 1 or not _has_store():
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, once the others have ended
    rank = os.environ["RANK"]
    try:
        return _store().compare_set(_key("fault"), "", rank) == rank.encode()
    except RuntimeError:  # the launcher has ended, and its store with it
        return True


def leave() -> None:
    """Wait for the other processes to see an announced fault; all of them then end at the same time."""
    if processes() == 1 or not _has_store():
        return
    deadline = time.monotonic() + PATIENCE
    try:
        store = _store()
        ready = store.add(_key("ready"), 1)
        while ready < processes() and time.monotonic() < deadline:
            time.sleep(INTERVAL / 10)
            ready = store.add(_key("ready"), 0)
    except RuntimeError:  # the launcher has ended
        return


def _watch(over: threading.Event) -> None:
    try:
        store = _store()
        while not over.wait(INTERVAL):
            if store.check([_key("fault")]) and not over.is_set():
                leave()
                if sys.stdout.isatty():
                    sys.stdout.write("\x1b[?25h")  # a progress bar hides the cursor
                sys.stdout.flush()
                os._exit(CODE)  # the main thread may be in a collective operation, which nothing can interrupt
    except RuntimeError:  # the launcher has ended, and ends this process
        return


def _has_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store() -> TCPStore:
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE))


def _key(name: str) -> str:
    return f"cil/{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
