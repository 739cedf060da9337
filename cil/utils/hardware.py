"""The device of a run, through Accelerate, and the facts about the machine that results record."""

from __future__ import annotations

import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from cil.errors import ConfigError

FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
"""Instructions, as Linux calls them, on which the speed of float32 and bfloat16 depends."""


def accelerator(device: str = "cpu", precision: str = "fp32") -> Accelerator:
    """Create an Accelerator on a device, with a precision.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        precision: ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        ConfigError: The device does not exist here, or does not support the precision; or that is ``auto``, which
            :func:`cil.run` alone replaces with what it has timed.
    """
    if precision == "auto":
        raise ConfigError("precision: auto is for `cil run`, which times both; here, give precision=fp32 or bf16")
    kind, _, index = device.partition(":")
    available = {"auto": True, "cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in available or (index and not index.isdigit()):
        raise ConfigError(f"hardware.device: {device!r} is unknown; allowed: auto, cpu, cuda, cuda:N, mps")
    if not available[kind]:
        usable = ", ".join(k for k, ok in available.items() if ok)
        raise ConfigError(f"hardware.device: torch finds no {kind} device here; allowed: {usable}")
    if kind == "cuda" and index:
        if int(index) >= torch.cuda.device_count():
            raise ConfigError(
                f"hardware.device: {device} does not exist; torch finds {torch.cuda.device_count()} CUDA devices"
            )
        torch.cuda.set_device(int(index))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and index:
        raise ConfigError(
            f"hardware.device: {device} names one device, but several processes were launched; give {kind} or auto"
        )
    # without this a second run in the same process would keep the precision of the first
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return Accelerator(cpu=kind == "cpu", mixed_precision="no" if precision == "fp32" else precision)
    except ValueError as error:
        raise ConfigError(f"precision: {precision} on {device}: {error}") from None


def total(accelerator: Accelerator, count: int) -> int:
    """Sum a count over all processes."""
    return int(accelerator.reduce(torch.tensor([count], device=accelerator.device), "sum"))


def facts(accelerator: Accelerator) -> dict[str, Any]:
    """Return the facts about the machine that timings depend on: processor, threads, processes and device."""
    device = accelerator.device
    return {
        "platform": platform.platform(),
        **processor(),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


@cache
def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Return the processor's name, and those of the instructions in :data:`FEATURES` that it has.

    Args:
        cpuinfo: Linux's description of the processors. Without it, Python tells the name, and instructions are unknown.

    Returns:
        ``processor`` and, where they are known, ``features``.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {"processor": platform.processor() or platform.machine()}
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    has = {*found.get("flags", found.get("Features", "")).split()}  # Features: on ARM
    name = found.get("model name") or platform.processor() or platform.machine()
    return {"processor": name, "features": [feature for feature in FEATURES if feature in has]}


def memory_bytes(device: torch.device) -> int:
    """Return the whole memory in bytes of the device if it is a GPU, else of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far in bytes: that of the device if it is a GPU, else that of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
