"""Reproduce results/reference: run what is missing, then write the figures and tables that depend on it.

    python -m scripts.publish.reproduce --list                      # finished runs, their times, missing runs
    python -m scripts.publish.reproduce --jobs 2                    # everything; finished runs are skipped
    python -m scripts.publish.reproduce --streams cifar10_50 --learners 'ranpac*' ncm --orders 1993 1994
    python -m scripts.publish.reproduce --per-class 20              # fewer images, in separate folders
    python -m scripts.publish.reproduce --render                    # only tables and figures

Each run is an ordinary ``cil run`` in a separate process with one thread, the longest first. After an interruption, run
the same command again to resume after the last finished stages. A failed run does not stop the others; its output is in
``failed.log`` in its folder, and the exit code is 1. Published runs are written in the form of ``slim.py``.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cil import report
from cil.errors import CilError
from cil.sweep.pool import LOG
from cil.utils.files import write
from scripts import ROOT
from scripts.publish import campaigns, curves, slim, tables
from scripts.publish.campaigns import Campaign, Job

TOP = (f"{campaigns.TINY}_orders", f"{campaigns.TINY}_records")
"""Campaigns whose learners the figure at the top of the README shows: same data, stream and backbone."""


@dataclass
class Running:
    """A job's process and its output."""

    job: Job
    process: subprocess.Popen[str]
    output: IO[str]
    started: float


def run(todo: Sequence[Job], root: Path, at_a_time: int, say: Callable[[str], None] = print) -> list[Job]:
    """Run jobs, untimed ones first and then the longest first; returns those that failed.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the processes are ended first, and finished stages are kept.
    """
    waiting = deque(sorted(todo, key=lambda job: -(job.seconds if job.seconds is not None else float("inf"))))
    running: list[Running] = []
    failed: list[Job] = []
    ended = 0
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                running.append(_start(waiting.popleft(), root))
            time.sleep(0.1)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                reason = _end(one, root)
                ended += 1
                took = f"{time.perf_counter() - one.started:.0f} s"
                say(f"[{ended}/{len(todo)}] {one.job.title}  {f'failed: {reason}' if reason else f'ran, {took}'}")
                failed += [one.job] if reason else []
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
            one.output.close()
    return failed


def _start(job: Job, root: Path) -> Running:
    output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (closed when it ends)
    process = subprocess.Popen(
        [sys.executable, "-m", "cil", "run", *job.trial.command, "--results", str(root)],
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Running(job, process, output, time.perf_counter())


def _end(one: Running, root: Path) -> str:
    """Why a job failed, empty if it did not; the output of a failed job is kept in its folder."""
    file = root / one.job.trial.plan.place / LOG
    with one.output as output:
        output.seek(0)
        text = output.read().strip()
    if one.process.returncode == 0:
        file.unlink(missing_ok=True)
        return ""
    write(file, text + "\n")
    return text.splitlines()[-1] if text else f"exit code {one.process.returncode}"


def render(picked: Sequence[Campaign], folders: Sequence[Path], root: Path, say: Callable[[str], None] = print) -> None:
    """Write the pages and figures of the folders and the README's figure; for published results, also slim the runs
    and write the tables in the pages.

    Raises:
        CilError: A result is damaged, or runs for one figure are not comparable.
    """
    for folder in folders:
        if any(folder.glob("*/*/metrics.json")):
            for path in report.write_overview(report.compare_runs([folder]), folder):
                say(f"written: {path}")
    there = [root / name for name in TOP if any((root / name).glob("*/*/metrics.json"))]
    if there and any(campaign.name in TOP for campaign in picked):
        say(f"written: {write(root / 'curves.png', curves.draw(curves.curves(there)))}")
    if root.resolve() == slim.REFERENCE.resolve():
        slim.publish(root)
        page = ROOT / "results" / "README.md"
        text = page.read_text(encoding="utf-8")
        if (new := campaigns.sections(text, root)) != text:
            write(page, new)
        for page, new in tables.stale().items():
            write(page, new)


def listing(found: Sequence[Job]) -> str:
    """One line per label with the state of each of its runs, and the sums."""
    labels: dict[Path, list[Job]] = {}
    for job in found:
        labels.setdefault(job.trial.plan.place.parent, []).append(job)
    width = max(len(label.as_posix()) for label in labels)
    lines = [
        f"{label.as_posix():{width}}  " + ", ".join(f"{job.trial.plan.place.name} {job.state()}" for job in those)
        for label, those in labels.items()
    ]
    done, todo = ([job for job in found if job.complete is wanted] for wanted in (True, False))
    timed = [job.seconds for job in todo if job.seconds is not None]
    lines.append(
        f"{len(done)} runs done in {sum(job.seconds or 0 for job in done) / 3600:.1f} hours of single runs, "
        f"{len(todo)} to do; {len(timed)} of these, like others already done, about {sum(timed) / 3600:.1f} hours"
    )
    return "\n".join(lines)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    names = ", ".join(campaign.name for campaign in campaigns.CAMPAIGNS)
    parser = argparse.ArgumentParser("reproduce", description="Reproduce the published results.")
    parser.add_argument("--streams", nargs="+", default=[], metavar="NAME", help=f"names or patterns: {names}")
    parser.add_argument("--learners", nargs="+", default=[], metavar="LABEL", help="only these labels, or patterns")
    parser.add_argument("--orders", nargs="+", default=[], help="class orders in place of the configurations'")
    parser.add_argument("--per-class", type=_positive, help="training images per class; written to separate folders")
    parser.add_argument("--data-root", type=Path, help="the folder with the image tars; default: ../shared/data")
    parser.add_argument("--results", type=Path, default=Path("results/reference"), help="default: %(default)s")
    parser.add_argument("--jobs", type=_positive, default=1, help="runs at a time, one thread each; default: 1")
    parser.add_argument("--list", action="store_true", help="list finished and missing runs, and run nothing")
    parser.add_argument("--render", action="store_true", help="write only figures and tables")
    return parser.parse_args(given)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def main(given: Sequence[str] | None = None) -> int:
    asked = arguments(given)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    try:
        picked = campaigns.pick(asked.streams)
        if asked.render:
            render(picked, [asked.results / campaign.name for campaign in picked], asked.results)
            return 0
        wanted = campaigns.runs(picked, asked.learners, asked.orders, asked.per_class, asked.data_root)
        found = campaigns.jobs(wanted, asked.results)
        if asked.list:
            print(listing(found))
            return 0
        todo = [job for job in found if not job.complete]
        print(f"{len(found) - len(todo)} of {len(found)} runs are done, {len(todo)} to do", flush=True)
        failed = run(todo, asked.results, asked.jobs, lambda text: print(text, flush=True))
        folders = list(dict.fromkeys(asked.results / trial.plan.config.name for trial in wanted))
        render(picked, folders, asked.results)
        for job in failed:
            print(f"failed: {job.title}  ({asked.results / job.trial.plan.place / LOG})", file=sys.stderr)
        return 1 if failed else 0
    except CilError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped. Finished stages are kept; run the same command to resume.", file=sys.stderr)
        return 130


if __name__ == "__main__" and (code := main()):
    sys.exit(code)
