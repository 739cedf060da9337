"""Tells that a benchmark is finished from files alone, before torch is imported.

After ``cil run`` a note in the benchmark's folder holds digests of all that its runs depend on: configuration,
versions, and size and time of change of each file of the package, the data, the settings and the finished runs. If they
are the same when the command is repeated, nothing has to be loaded to know that nothing is left to do. A note never
says more: without one, or with the slightest difference, the runner looks at the data, the backbone and the stages
themselves. There is none where not every file is known: for downloaded weights and datasets, and custom code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from cil.config import BackboneConfig, Config
from cil.config.methods import methods
from cil.errors import CilError
from cil.utils.files import write
from cil.utils.paths import expand
from cil.utils.stored import content_digest, read_json, sealed

NOTE = ".finished.json"
"""File in a benchmark's folder."""
COMPUTING = ("torch", "torchvision", "timm", "peft", "accelerate", "numpy", "avalanche-lib")
"""Packages whose versions the digest holds, beside the files of this one."""
MOST_FILES = 20_000
"""Files of data above which there is no note: to look at them would take longer than to load torch."""


class Finished(NamedTuple):
    """What a note says.

    Attributes:
        runs: The run folders, in order.
        overview: The figures and the page about all runs in the benchmark's folder, where these still fit; else empty.
    """

    runs: list[Path]
    overview: list[Path]


class _NotKnownError(Exception):
    """A benchmark depends on something other than files that are known."""


def inputs(config: Config) -> str | None:
    """Digest of all that the runs of a benchmark depend on; None if not every file of it is known.

    It is taken before the runs, so that a file that changes meanwhile counts as changed.
    """
    try:
        return content_digest(
            {
                "config": config.model_dump(mode="json", by_alias=True),
                "versions": {package: _version(package) for package in COMPUTING},
                "package": _stamps(_below(Path(__file__).parent)),
                "files": _stamps(_named(config)),
            }
        )
    except (OSError, _NotKnownError):
        return None


def note(config: Config, root: Path, digest: str | None, runs: Sequence[Path], overview: Sequence[Path]) -> None:
    """Write the note of a benchmark whose runs are all finished.

    Args:
        config: The benchmark.
        root: The results folder.
        digest: What :func:`inputs` gave before the runs; nothing is written if it is None.
        runs: Its run folders, in order.
        overview: The figures and the page about all runs in its folder.
    """
    if digest is None:
        return
    folder = root / config.name
    content = {
        "inputs": digest,
        "runs": [str(run) for run in runs],
        "runs_digest": _runs_digest(runs),
        "overview": [str(path) for path in overview],
        "overview_digest": _overview_digest(folder, overview),
    }
    write(folder / NOTE, json.dumps(sealed(content)) + "\n")


def unchanged(config: Config, root: Path) -> Finished | None:
    """The runs of a benchmark that is finished and on which nothing has changed; None if that is not certain."""
    folder = root / config.name
    try:
        noted = read_json(folder / NOTE, advice="delete it")
        runs, overview = ([Path(path) for path in noted[key]] for key in ("runs", "overview"))
        if noted["inputs"] != inputs(config) or noted["runs_digest"] != _runs_digest(runs):
            return None
        fits = noted["overview_digest"] == _overview_digest(folder, overview)
    except (OSError, CilError, KeyError, TypeError, _NotKnownError):  # no note, or nothing that it can say
        return None
    return Finished(runs, overview if fits else [])


def _runs_digest(runs: Iterable[Path]) -> str:
    files = (file for run in runs for file in [run / "metrics.json", *sorted(run.glob("stage-*/stage.json"))])
    return content_digest({"files": _stamps(files)})


def _overview_digest(folder: Path, overview: Iterable[Path]) -> str:
    """Digest of the files about a folder's runs, and of those that they are made from."""
    from cil import results  # needs numpy, for which the first line of a run does not wait

    there = [run / "metrics.json" for run in sorted(results.run_folders(folder))]
    return content_digest({"files": _stamps([*overview, *there])})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of change of files, by their absolute paths."""
    found = {}
    for file in files:
        try:
            status = file.stat()
        except OSError:
            raise _NotKnownError from None
        found[str(file.absolute())] = [status.st_size, status.st_mtime_ns]
        if len(found) > MOST_FILES:
            raise _NotKnownError
    return found


def _named(config: Config) -> Iterator[Path]:
    """Every file that a configuration names, also by its folder, and that of the digits.

    Raises:
        _NotKnownError: There may be others.
    """
    data, stream = config.data, config.stream
    local = data.dataset in ("digits", "folder") or (data.dataset.startswith("torch/") and data.root is not None)
    if not local or stream.shots_files is not None:  # index files name further ones
        raise _NotKnownError
    for backbone in config.backbones or [config.backbone]:
        embedded = backbone.name == BackboneConfig().name
        if ":" in backbone.name or "/" in backbone.name or not (embedded or backbone.weights is not None):
            raise _NotKnownError
    for entry in config.learners:
        if entry.spec not in methods()["learners"] or _has_class(entry.parameters):
            raise _NotKnownError
    sklearn = find_spec("sklearn")
    if data.dataset == "digits" and sklearn is not None and sklearn.origin is not None:
        yield Path(sklearn.origin).parent / "datasets" / "data" / "digits.csv.gz"
    plain = config.model_dump(mode="json", by_alias=True)
    for text in _texts([plain.get(key) for key in ("data", "stream", "backbone", "backbones", "learners")]):
        try:
            place = expand(text)
        except CilError:
            raise _NotKnownError from None
        for file in _below(place) if place.is_dir() else [place] if place.exists() else []:
            if file.suffix.lower() == ".csv":  # which names images anywhere
                raise _NotKnownError
            yield file


def _has_class(value: Any) -> bool:
    """Whether custom code is named in hyper-parameters, at any depth."""
    if isinstance(value, Mapping):
        return "class" in value or any(map(_has_class, value.values()))
    return any(map(_has_class, value)) if isinstance(value, list) else isinstance(value, str) and ":" in value


def _texts(value: Any) -> Iterator[str]:
    """All texts in plain values."""
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _below(folder: Path) -> Iterator[Path]:
    """The files in a folder and below it, in order; without compiled Python, which changes by itself."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        if any(Path(place, name).is_symlink() for name in folders):
            raise _NotKnownError
        yield from (Path(place, name) for name in sorted(names))
