"""Numbers in prose, each read from a file below results/: ``<!-- = EXPRESSION -->`` before the number.

The mark is a comment, so a reader sees only the number; ``scripts.publish.tables`` writes it, ``--check`` compares it.

    <!-- from reference/split_tiny_imagenet100_50 -->        folder in which marks below it look first
    <!-- = ease within_task_accuracy -->67.9 %               a key of the summary
    <!-- = ease R.-1.0 -->22.4 %                             R[-1, 0]; R.-1.1: are the other tasks
    <!-- = ewc accuracy_last - lwf accuracy_last -->2.7      points; run by run if both have several, then the mean
    <!-- = min l2p,lae_* task_id_accuracy -->28.8 %          the smallest of several runs
    <!-- = lowest *_lda accuracy_last - ncm accuracy_last -->0.5   of several labels' means
    <!-- = ewc kept_bytes / 1e6 .0f -->230 MB                from left to right, no brackets
    <!-- = bench/merge.json weights / 1e6 .1f -->85.8        any other JSON file, by a dotted path
    <!-- from bench/merge.json -->                           a file: the marks below it need only KEY

An expression is ``[REDUCER] TERM [+|-|*|/ TERM …] [FORMAT]``; a TERM is a number, FILE and KEY, or KEY alone.

- FILE is a JSON file, a run's folder or a label's folder with its runs, below the folder of the last ``from`` or below
  results/; ``*`` and commas name several.
- KEY is a name of the summary, ``R``, ``R_task``, or a path of names, list indices and slices joined by dots.
- REDUCER turns several numbers (runs, files, a list) into one: mean (the default), min, max, median or sum; lowest and
  highest reduce the means of labels.
- Terms with several runs are combined run by run: both terms have the same runs, or the second term has the runs of one
  label, which each label of the first also has.
- FORMAT is Python's, ``.1%`` by default: times 100, one decimal; the sign % is outside the mark.

Quote words that contain spaces. A mark may not begin a line or a list item: the rest would be taken for HTML.
"""

from __future__ import annotations

import json
import operator
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cil import results
from cil.errors import CilError, nearest

NUMBER = r"[−-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+−-]?\d+)?"
MARK = re.compile(rf"<!--\s*(?:from\s+(?P<origin>\S+)\s*-->|=\s*(?P<expression>.*?)\s*-->(?P<number>{NUMBER})?)", re.S)
BEGINS = re.compile(r"\s*(?:[-*+>]\s+|\d+\.\s+)*")
"""Markdown that may precede the first word of a line."""
FORMAT = re.compile(r",?\.\d+[f%e]")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
OF_LABELS = {"lowest": np.min, "highest": np.max}
REDUCERS = {"mean": np.mean, "min": np.min, "max": np.max, "median": np.median, "sum": np.sum, **OF_LABELS}
ALIASES = {"R": "accuracy_matrix", "R_task": "accuracy_matrix_within_task"}


class Mark(NamedTuple):
    """A number's mark in a page: its place, its expression, and the argument of the last ``from`` before it."""

    match: re.Match[str]
    line: int
    expression: str
    origin: str


def marks(text: str) -> Iterator[Mark]:
    """The marks of a page, in order.

    Raises:
        CilError: A mark begins a line.
    """
    origin = ""
    for match in MARK.finditer(text):
        if match["origin"]:
            origin = match["origin"]
            continue
        line = text.count("\n", 0, match.start()) + 1
        before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        if BEGINS.fullmatch(before):
            raise CilError(f"line {line}: the mark '{match['expression']}' begins its line; put a word before it")
        yield Mark(match, line, match["expression"], origin)


def render(text: str, root: Path) -> str:
    """The page with every marked number read again; ``root`` holds results/.

    Raises:
        CilError: A mark cannot be read, or its file or key does not exist; with the line.
    """
    parts, end = [], 0
    for mark in marks(text):
        try:
            number = value(mark.expression, mark.origin, root)
        except CilError as error:
            raise CilError(f"line {mark.line}: '{mark.expression}': {error}") from None
        comment = mark.match.start("number") if mark.match["number"] else mark.match.end()
        parts += [text[end:comment], number]
        end = mark.match.end()
    return "".join(parts) + text[end:]


def files(mark: Mark, root: Path) -> list[Path]:
    """The files that an expression reads."""
    _, terms, _ = parse(mark.expression)
    return [file for term in terms[::2] if not constant(term) for file in find_files(term[:-1], mark.origin, root)]


def value(expression: str, origin: str, root: Path) -> str:
    """An expression's number as it is printed: with a minus sign, and without one on zero."""
    reducer, terms, spec = parse(expression)
    result, runs = numbers(terms[0], origin, root)
    for [sign], term in zip(terms[1::2], terms[2::2], strict=True):
        other, their = numbers(term, origin, root)
        if len(result) > 1 and len(other) > 1:
            other = other[pair_runs(runs, their, len(result), len(other), " ".join(term))]
        with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite is refused below
            result, runs = OPERATORS[sign](result, other), runs if len(result) > 1 else their
    if reducer in OF_LABELS:
        if len(result) != len(runs):
            raise CilError(f"{reducer} is of runs, got {len(result)} numbers from {len(runs)} runs")
        labels = [run.parent for run in runs]
        result = np.array([result[[own == label for own in labels]].mean() for label in dict.fromkeys(labels)])
    one = float(REDUCERS[reducer](result))
    if not np.isfinite(one):
        raise CilError(f"comes to {one}")
    text = format(one, spec).rstrip("%")
    if not text.strip("-0.,"):
        return text.lstrip("-")
    return text.replace("-", "−") if text.startswith("-") else text


def pair_runs(runs: Sequence[Path], their: Sequence[Path], count: int, other: int, term: str) -> list[int]:
    """For each number of the first term, the index of the second term's number of the same run.

    Raises:
        CilError: The terms are of different runs.
    """
    names, own = [run.name for run in their], [run.name for run in runs]
    if count == other and own == names:
        return list(range(count))
    one_label = len({run.parent for run in their}) == 1 and other == len(their) and count == len(runs)
    labels = {run.parent for run in runs}
    if one_label and all(sorted(names) == sorted(run.name for run in runs if run.parent == label) for label in labels):
        return [names.index(name) for name in own]
    raise CilError(f"{term}: other runs than before ({other} numbers against {count})")


def parse(expression: str) -> tuple[str, list[list[str]], str]:
    """(reducer, terms and operators alternately as lists of words, format).

    Raises:
        CilError: The words do not make an expression.
    """
    try:
        words = shlex.split(expression)
    except ValueError as error:
        raise CilError(f"{error}") from None
    reducer = words.pop(0) if words and words[0] in REDUCERS else "mean"
    spec = words.pop() if words and FORMAT.fullmatch(words[-1]) else ".1%"
    terms: list[list[str]] = [[]]
    for word in words:
        if word in OPERATORS:
            terms += [[word], []]
        else:
            terms[-1].append(word)
    for term in terms[::2]:
        if len(term) not in (1, 2):
            raise CilError(f"a term is a number, FILE KEY, or KEY alone, got '{' '.join(term)}'")
    return reducer, terms, spec


def constant(term: Sequence[str]) -> bool:
    return len(term) == 1 and bool(re.fullmatch(NUMBER, term[0]))


def numbers(term: Sequence[str], origin: str, root: Path) -> tuple[np.ndarray, list[Path]]:
    """A term's numbers [N] and the folders of the runs that they come from."""
    if constant(term):
        return np.array([float(term[0])]), []
    inputs = find_files(term[:-1], origin, root)
    row: list[Any] = []
    for file in inputs:
        at = look_up(read_content(file, file.stat().st_mtime_ns), term[-1], str(file.relative_to(root)))
        row += at if isinstance(at, list) else [at]
    if not row or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in row):
        raise CilError(f"{inputs[0].relative_to(root)}: {term[-1]!r} is no number and no list of numbers")
    return np.array(row, dtype=float), [file.parent for file in inputs]


def find_files(names: Sequence[str], origin: str, root: Path) -> list[Path]:
    """The JSON files that FILE, or ``origin`` without one, names: themselves, or the metrics.json of their runs.

    Raises:
        CilError: There is no such file.
    """
    results, every = root / "results", []
    for name in names[0].split(",") if names else [origin]:
        below = [str(Path(origin, name)), name] if names else [origin] if origin else []
        matches: list[Path] = next(filter(None, (sorted(results.glob(pattern)) for pattern in below)), [])
        here = [match for match in matches if match.suffix == ".json"]
        for label in filter(Path.is_dir, matches):
            here += sorted([*label.glob("metrics.json"), *label.glob("*/metrics.json")])
        if not here:
            raise CilError(f"no JSON file and no run is results/{' or results/'.join(below) or ': name a FILE'}")
        every += here
    return every


@lru_cache(maxsize=256)  # the marks of a page name the same few files again and again
def read_content(file: Path, changed: int) -> dict[str, Any]:
    """A JSON file; a run's with the names of its summary and the short names of its matrices at the top.

    Its modification time is part of the cache's key.
    """
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CilError(f"{file}: damaged ({error})") from None
    if file.name != "metrics.json":
        return read
    if not read.get("complete"):
        raise CilError(f"{file}: the run is not finished")
    run = results.completed(read)
    return {**run, **run["summary"], **{short: run[name] for short, name in ALIASES.items()}}


def look_up(at: Any, key: str, file: str) -> Any:
    """The value at a dotted path.

    Raises:
        CilError: There is no such name or index; suggests the nearest name.
    """
    for part in key.split("."):
        if isinstance(at, dict):
            if part not in at:
                raise CilError(f"{file}: no key {part!r} in {key!r}{nearest(part, at)}")
            at = at[part]
        elif isinstance(at, list) and re.fullmatch(r"-?\d+|-?\d*:-?\d*", part):
            ends = [int(end) if end else None for end in part.split(":")]
            try:
                at = at[slice(*ends)] if ":" in part else at[int(part)]
            except IndexError:
                raise CilError(f"{file}: no index {part} in {key!r}, the list has {len(at)}") from None
        else:
            raise CilError(f"{file}: {key!r} has nothing to look {part!r} up in")
    return at
