"""The runs of a sweep on Ray, on this machine or a cluster.

Ray gives processes that live on between runs, places them on CPUs, GPUs and nodes, and tells when one dies. What to
retry is decided here, so that it can be reported. Ray Tune is not needed: a trial is an ordinary run, which reports to
its folder and goes on from there, whoever was killed; so there is no checkpoint of a trial and no state of a driver.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cil.errors import CilError, ConfigError
from cil.plan import dump
from cil.sweep.grid import Trial
from cil.sweep.worker import Outcome, attempt

LOG = "failed.log"
"""In a run's folder after a failure: the reason and the traceback; gone once the run has ended well."""


@dataclass(frozen=True)
class Resources:
    """What a sweep may use.

    Attributes:
        jobs: Runs at a time; None: as many as there are CPUs (or GPUs) for.
        cpus: CPUs and torch threads of a run; None: on this machine an equal share, on a cluster 1.
        gpus: GPUs of a run, may be a fraction; None: 1 where there are any and ``hardware.device`` may be one.
        address: Of a Ray cluster; None: this machine.
        retries: Further attempts of a run whose process died or which ended in an error that is not the user's.
    """

    jobs: int | None = None
    cpus: int | None = None
    gpus: float | None = None
    address: str | None = None
    retries: int = 1


@dataclass(frozen=True)
class Result:
    """A run of the sweep, what became of it, and in how many attempts."""

    trial: Trial
    outcome: Outcome
    attempts: int


def sweep(
    trials: Sequence[Trial],
    results: Path,
    resources: Resources,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Run all trials; a failed one does not stop the others.

    A process that has initialised Ray itself keeps its cluster, workers included.

    Args:
        trials: What to run.
        results: The results folder; on a cluster on a file system that all nodes see.
        resources: Processes, CPUs, GPUs, retries.
        say: Receives a line for each run that ends or is tried again.

    Returns:
        One result a trial, in their order.

    Raises:
        CilError: Ray is not installed, cannot be reached, or has not the resources of one run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("cil sweep starts its own processes; give the command without accelerate launch")
    ray = _ray()
    with _cluster(ray, resources, trials) as (window, options, threads):
        remote = ray.remote(max_retries=0, **options)(attempt)
        waiting = deque((i, 1) for i in range(len(trials)))
        flying: dict[Any, tuple[int, int]] = {}
        ended: dict[int, Result] = {}
        while waiting or flying:
            while waiting and len(flying) < window:
                i, tries = waiting.popleft()
                config = dump(trials[i].plan.config)
                flying[remote.remote(config, str(results), str(Path.cwd()), threads)] = i, tries
            [done], _ = ray.wait(list(flying), num_returns=1)
            i, tries = flying.pop(done)
            outcome = _outcome(ray, done)
            if outcome.again and tries <= resources.retries:
                say(f"{trials[i].title}  attempt {tries}: {outcome.reason}; trying again")
                waiting.appendleft((i, tries + 1))
                continue
            ended[i] = Result(trials[i], _logged(outcome, results / trials[i].plan.place), tries)
            say(f"[{len(ended)}/{len(trials)}] {trials[i].title}  {outcome.state} {outcome.reason}".rstrip())
    return [ended[i] for i in range(len(trials))]


def _outcome(ray: Any, done: Any) -> Outcome:
    try:
        return ray.get(done)
    except ray.exceptions.RayError as error:  # the process or its node died, or ran out of memory
        first = str(error).strip().splitlines()[0]
        return Outcome("failed", f"{type(error).__name__}: {first}", str(error), again=True)


def _logged(outcome: Outcome, folder: Path) -> Outcome:
    """The outcome, a failure's log in the run's folder and an earlier failure's gone."""
    file = folder / LOG
    if outcome.state != "failed":
        file.unlink(missing_ok=True)
        return outcome
    from cil.report.files import write

    try:
        write(file, f"{outcome.reason}\n\n{outcome.log}")
    except CilError as error:  # a full disk may be what the run failed of
        return replace(outcome, reason=f"{outcome.reason} (no log: {error})")
    return replace(outcome, log=str(file))


def _ray() -> Any:
    """Ray, told to phone nobody before it is imported.

    Raises:
        ConfigError: It is not installed.
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
def _cluster(ray: Any, wanted: Resources, trials: Sequence[Trial]) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Ray running: (runs at a time, what Ray reserves for one, torch threads of one)."""
    ours = not ray.is_initialized()
    devices = {trial.plan.config.hardware.device for trial in trials}
    jobs, cpus = _share(wanted, len(trials), devices)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        if ours and wanted.address:
            host, _, port = wanted.address.removeprefix("ray://").rpartition(":")
            if host and port.isdigit():  # where nobody listens Ray would try for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=wanted.address, **quiet)
        elif ours:
            # little goes through Ray's memory: a configuration there, an outcome back
            ray.init(address="local", num_cpus=jobs * cpus, include_dashboard=False, object_store_memory=10**8, **quiet)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError, gRPC's own …
        where = wanted.address or "on this machine"
        raise ConfigError(f"Ray {where}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    try:
        there = ray.cluster_resources()
        default = 1.0 if there.get("GPU") and devices != {"cpu"} else 0.0
        gpus = default if wanted.gpus is None else wanted.gpus
        _check(devices, ("CPU", cpus, there), ("GPU", gpus, there))
        yield jobs, {"num_cpus": cpus, "num_gpus": gpus}, int(os.environ.get("OMP_NUM_THREADS") or cpus)
    finally:
        if ours:
            ray.shutdown()


def _share(wanted: Resources, trials: int, devices: set[str]) -> tuple[int, int]:
    """(runs at a time, CPUs of one). On a cluster Ray decides what runs when, unless ``jobs`` says it."""
    if wanted.address:
        return wanted.jobs or trials, wanted.cpus or 1
    import torch

    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    places = here // (wanted.cpus or 1)
    if devices != {"cpu"} and torch.cuda.is_available() and wanted.gpus != 0:
        places = int(torch.cuda.device_count() / (wanted.gpus or 1))
    jobs = min(wanted.jobs or max(1, places), trials)
    return jobs, wanted.cpus or max(1, here // jobs)


def _check(devices: set[str], *resources: tuple[str, float, dict[str, float]]) -> None:
    """Refuse what would wait for ever, and devices that Ray does not hand out by their names.

    Raises:
        ConfigError: Naming the option or the key.
    """
    for what, asked, there in resources:
        if asked > there.get(what, 0):
            raise ConfigError(
                f"--{what.lower()}s-per-run: a run needs {asked:g}, and Ray has {there.get(what, 0):g} in all"
            )
    for device in sorted(devices):
        if device.startswith("cuda:"):
            raise ConfigError(f"hardware.device: {device} names one device, but Ray gives each run its own; give cuda")
