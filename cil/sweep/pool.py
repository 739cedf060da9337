"""Runs a sweep on Ray, on this machine or a cluster.

Ray provides processes that are reused between runs, places them on CPUs, GPUs and nodes, and reports when one dies.
This module decides what to retry, so that it can report it. Ray Tune is not needed: a trial is an ordinary run, which
reports to its folder and resumes from there after any process was killed, so neither trials nor the driver keep
checkpoints.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from cil.errors import CilError, ConfigError
from cil.runner.plan import dump
from cil.sweep.grid import Trial
from cil.sweep.guard import guarded
from cil.sweep.worker import Outcome, attempt

DAEMONS = ("raylet", "gcs_server")
"""Names of the processes without which a local Ray does no work."""
LOOK = 2.0
"""Seconds between two looks at the daemons."""
LOG = "failed.log"
"""File in a run's folder with the reason and traceback of a failure; deleted when the run has succeeded."""


@dataclass(frozen=True)
class Resources:
    """The resources that a sweep may use.

    Attributes:
        jobs: Number of simultaneous runs; None: as many as the CPUs (or GPUs) allow.
        cpus: CPUs and torch threads per run; None: an equal share on this machine, 1 on a cluster.
        gpus: GPUs per run, may be a fraction; None: 1 if there are any and ``hardware.device`` may be one, else 0.
        address: Address of a Ray cluster; None: this machine.
        retries: Further attempts of a run whose process died or that ended in an error not caused by the user.
    """

    jobs: int | None = None
    cpus: int | None = None
    gpus: float | None = None
    address: str | None = None
    retries: int = 1


@dataclass(frozen=True)
class Result:
    """A run of the sweep, its outcome, and the number of attempts."""

    trial: Trial
    outcome: Outcome
    attempts: int


def sweep(
    trials: Sequence[Trial],
    results: Path,
    resources: Resources,
    *,
    redo: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Run all trials; a failed one does not stop the others. If a daemon of a local Ray dies, Ray is restarted once.

    If Ray is already initialised in this process, its cluster and workers are used and kept.

    Args:
        trials: The runs.
        results: The results folder; on a cluster it must be on a file system that all nodes share.
        resources: Processes, CPUs, GPUs, retries.
        redo: As for :func:`cil.runner.run`.
        say: Receives one line for each run that ends or is retried.

    Returns:
        One result per trial, in the order of the trials.

    Raises:
        ConfigError: Ray is not installed, cannot be reached, or lacks the resources of a single run; or a launcher
            such as ``accelerate launch`` started this process; or runs have ``precision: auto``, which simultaneous
            runs would time while they disturb one another.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("cil sweep starts its own processes; run it without accelerate launch")
    if any(trial.plan.config.precision == "auto" for trial in trials):
        raise ConfigError("precision: auto is for `cil run`, which times both; in a sweep, give precision=fp32 or bf16")
    ray = _ray()
    waiting = deque((i, 1) for i in range(len(trials)))
    ended: dict[int, Result] = {}
    restarted = False
    while waiting:
        with _cluster(ray, resources, trials) as (window, options, threads, daemons):
            remote = ray.remote(max_retries=0, **options)(attempt)
            running: dict[Any, tuple[int, int]] = {}
            while waiting or running:
                dead = [] if restarted else _dead(daemons)
                if dead and (not running or "gcs_server" in dead):  # without a raylet, running ones get to their end
                    say(f"Ray's {dead[0]} on this machine has died; Ray is started again, and the runs continue")
                    restarted = True
                    waiting.extendleft(sorted(running.values(), reverse=True))
                    break
                while waiting and len(running) < window and not dead:
                    i, tries = waiting.popleft()
                    config = dump(trials[i].plan.config)
                    running[remote.remote(config, str(results), str(Path.cwd()), threads, redo)] = i, tries
                finished, _ = ray.wait(list(running), num_returns=1, timeout=LOOK)
                for done in finished:
                    i, tries = running.pop(done)
                    outcome = _outcome(ray, done)
                    if outcome.retry and not restarted and _dead(daemons):  # not the run's fault
                        waiting.appendleft((i, tries))
                        continue
                    if outcome.retry and tries <= resources.retries:
                        say(f"{trials[i].title}  attempt {tries}: {outcome.reason}; trying again")
                        waiting.appendleft((i, tries + 1))
                        continue
                    ended[i] = Result(trials[i], _with_log(outcome, results / trials[i].plan.place), tries)
                    say(f"[{len(ended)}/{len(trials)}] {trials[i].title}  {outcome.state} {outcome.reason}".rstrip())
    return [ended[i] for i in range(len(trials))]


def _dead(daemons: Mapping[str, psutil.Process]) -> list[str]:
    """Names of the daemons that have ended."""
    return [name for name, daemon in daemons.items() if not daemon.is_running() or daemon.status() == "zombie"]


def _outcome(ray: Any, done: Any) -> Outcome:
    try:
        return ray.get(done)
    except ray.exceptions.RayError as error:  # the process or its node died, or ran out of memory
        first = str(error).strip().splitlines()[0]
        return Outcome("failed", f"{type(error).__name__}: {first}", str(error), retry=True)


def _with_log(outcome: Outcome, folder: Path) -> Outcome:
    """Write the log of a failure into the run's folder, or delete an earlier one; returns the outcome with its file."""
    file = folder / LOG
    if outcome.state != "failed":
        file.unlink(missing_ok=True)
        return outcome
    from cil.utils.files import write

    try:
        write(file, f"{outcome.reason}\n\n{outcome.log}")
    except CilError as error:  # the run may have failed because the disk is full
        return replace(outcome, reason=f"{outcome.reason} (no log: {error})")
    return replace(outcome, log=str(file))


def _ray() -> Any:
    """Ray, with usage statistics disabled before it is imported.

    Raises:
        ConfigError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "cil sweep needs Ray: pip install 'cil[ray]', or --print the commands to run them without"
        ) from None
    return ray


@contextmanager
def _cluster(
    ray: Any, wanted: Resources, trials: Sequence[Trial]
) -> Iterator[tuple[int, dict[str, Any], int, dict[str, psutil.Process]]]:
    """Ray, initialised; yields (simultaneous runs, resources that Ray reserves per run, torch threads per run, and the
    daemons that were started here, by name)."""
    ours = not ray.is_initialized()
    devices = {trial.plan.config.hardware.device for trial in trials}
    jobs, cpus = _share(wanted, len(trials), devices)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        if ours and wanted.address:
            host, _, port = wanted.address.removeprefix("ray://").rpartition(":")
            if host and port.isdigit():  # without a listener Ray would retry for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=wanted.address, **quiet)
        elif ours:
            # little passes through Ray's object store: a configuration and an outcome per run
            ray.init(address="local", num_cpus=jobs * cpus, include_dashboard=False, object_store_memory=10**8, **quiet)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError, errors of gRPC …
        where = wanted.address or "on this machine"
        raise ConfigError(f"Ray {where}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    try:
        available = ray.cluster_resources()
        default = 1.0 if available.get("GPU") and devices != {"cpu"} else 0.0
        gpus = default if wanted.gpus is None else wanted.gpus
        _check(devices, ("CPU", cpus, available), ("GPU", gpus, available))
        children = psutil.Process().children() if ours and not wanted.address else []
        daemons = {child.name(): child for child in children if child.name() in DAEMONS}
        with guarded() if daemons else nullcontext():
            yield jobs, {"num_cpus": cpus, "num_gpus": gpus}, int(os.environ.get("OMP_NUM_THREADS") or cpus), daemons
    finally:
        if ours:
            ray.shutdown()


def _share(wanted: Resources, trials: int, devices: set[str]) -> tuple[int, int]:
    """(simultaneous runs, CPUs per run). On a cluster Ray limits the number of runs, unless ``jobs`` does."""
    if wanted.address:
        return wanted.jobs or trials, wanted.cpus or 1
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    places = cores // (wanted.cpus or 1)
    if devices != {"cpu"} and torch.cuda.is_available() and wanted.gpus != 0:
        places = int(torch.cuda.device_count() / (wanted.gpus or 1))
    jobs = min(wanted.jobs or max(1, places), trials)
    return jobs, wanted.cpus or max(1, cores // jobs)


def _check(devices: set[str], *resources: tuple[str, float, dict[str, float]]) -> None:
    """Refuse runs that would wait forever, and single devices, because Ray chooses the devices.

    Raises:
        ConfigError: The message names the option or the key.
    """
    for kind, needed, available in resources:
        if needed > available.get(kind, 0):
            raise ConfigError(
                f"--{kind.lower()}s-per-run: a run needs {needed:g}, but Ray has only {available.get(kind, 0):g} in all"
            )
    for device in sorted(devices):
        if device.startswith("cuda:"):
            raise ConfigError(
                f"hardware.device: {device} names one device, but Ray chooses each run's device; set it to cuda"
            )
