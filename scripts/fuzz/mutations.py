"""Mutations of configurations and overrides: of their values, of their keys, and of the bytes of their text."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cil.config.parsing import parse, to_yaml
from cil.config.reading import shipped

HAND_MADE = (
    b"learners: [ncm, {name: finetune, label: slow, lr: 1e-3, epochs: 1}]\nstream: {increment: 2}\norders: [1993]\n",
    b"learner: {name: ranpac, tuner: {name: adapter, bottleneck: 4}, strength: 10}\nseeds: [0, 1]\n",
    b"learners: [{name: merge, rule: {name: opcm, finalisers: [{name: lines, alpha: 0.5}]}, tuner: {name: lora}}]\n",
    b"name: a\nlearner: ncm\ntransform: {normalize: {mean: [0, 0, 0], std: [1, 1, 1]}, augment: {scale: [0.5, 1]}}\n",
    b"learner: ncm\nhardware: {workers: 0, memory_gib: 1, feature_store: off}\norders: [natural, [2, 0, 1]]\n",
    b"learner: ncm\ndata: {dataset: folder, root: x, domains: [a, b]}\nstream: {type: domain_incremental}\n",
    b"learner: {name: slca, milestones: [1], schedule: multistep}\nbackbone: {options: {img_size: 64}}\n",
    b"base: &b {metric: cosine}\nlearners: [{name: ncm, <<: *b}]\n",
)
"""Configurations with what the shipped ones lack."""
ODD = (
    *("null", "true", "[]", "{}", "''", "' '", "-1", "0", "1", "1e-5", "1e30", "1e999", ".nan", "-.inf", "2147483648"),
    *("4294967295", "4294967296", "9" * 25, "9" * 5000, "0x" + "f" * 5000, "1" + ":59" * 900, "1_000", "017", "1e3"),
    *("!!int ''", "!!float x", "!!bool 2", "!!binary 'x'", "!!set {a}", "!!python/object:os.system x", "!x y", "="),
    *("2024-13-45", "2024-01-31", "12:30:45", "yes", "off", "natural", "random", "none", "auto", "cuda:9", "digits"),
    *(
        "..",
        ".",
        "../../x",
        "/tmp/x",
        "a/b",
        "a\\b",
        "'a\\'",
        "compare.html",
        "TUNED.json",
        "NCM",
        "ncm",
        "a:b",
        "x.py:Y",
    ),
    *("~", "~/x", "~nobody_here/x", "$NOT_SET_ANYWHERE/x", "${HOME}/x", "'$'", "'a\x00b'", '"a\\nb"', '"\\e[31mred"'),
    *('"\\u202Egnp"', '"\\ud800"', "'" + "x" * 300 + "'", "'" + "é" * 101 + "'", "🐜", "'[bold]x[/]'", "'%s{0}'"),
    *("[" * 500 + "]" * 500, "[" * 30 + "]" * 30, "&a [*a]", "&a {b: *a}", "*missing", "{a: {b: {c: {d: 1}}}}"),
    *(
        "{a: 1, a: 2}",
        "{<<: 3}",
        "? [1]\n: 2",
        "'",
        '"',
        "{",
        "]",
        "|",
        "\t",
        "# x",
        "@",
        "`",
        "- 1\n- 2",
        "%",
        "--- 1",
    ),
    *("[1, [2, x], null]", "[true, false]", "[1.5, .nan]", "{name: ncm}", "{class: 'x.py:Y'}", "{name: [1]}", "{1: 2}"),
    "[" + "0, " * 3000 + "0]",
)
"""Values as they stand in a text: each once made, or might make, some reader stumble."""
KEYS = (
    "",
    "name",
    "label",
    "class",
    "learner",
    "learners",
    "1",
    "true",
    "a b",
    "a.b",
    "x" * 400,
    "incremnt",
    "é",
    "\n",
)
MARK = "@odd{}@"


@dataclass(frozen=True)
class Case:
    """A configuration's file, which goes to ``folder`` among the shipped ones, and overrides of it."""

    folder: Path
    text: bytes
    overrides: tuple[str, ...]


def seeds(root: Path, names: int | None = None) -> list[tuple[Path, bytes]]:
    """The hand-made configurations and the first ``names`` of the shipped ones; ``root`` is the folder of these."""
    files = [path.relative_to(root) for path in shipped().values()][:names]
    return [(Path(), text) for text in HAND_MADE] + [(file.parent, (root / file).read_bytes()) for file in files]


def case(number: int, seed: int, known: list[tuple[Path, bytes]]) -> Case:
    """The configuration of this number; the same for the same seed."""
    rng = random.Random(f"{seed} {number}")
    folder, text = rng.choice(known)
    raw = _parsed(text)
    overrides = [_override(rng, raw) for _ in range(rng.choice((0, 0, 1, 2)))]
    if rng.random() < 0.6:
        text = _values(rng, raw)
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        text = rng.choice(BYTES)(rng, text or b" ")
    return Case(folder, text, tuple(overrides))


@cache
def _parsed(text: bytes) -> Any:
    return parse(text.decode(), "seed")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything inside a plain value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, one in inner for found in ((*path, key), *places(one, (*path, key)))]


def _values(rng: random.Random, raw: Any) -> bytes:
    """The text of a configuration in which up to three values or keys are others."""
    raw, odd = copy.deepcopy(raw), []
    for _ in range(rng.choice((1, 1, 2, 3))):
        every = places(raw)
        if not every:
            break
        *path, last = rng.choice(every)
        here = raw
        for key in path:
            here = here[key]
        what = rng.random()
        if what < 0.7:
            odd.append(rng.choice(ODD))
            here[last] = MARK.format(len(odd) - 1)
        elif what < 0.8:
            del here[last]
        elif isinstance(here, dict):
            here[rng.choice(KEYS)] = here.pop(last) if what < 0.9 else copy.deepcopy(here[last])
        else:
            here.append(copy.deepcopy(here[last]))
    text = to_yaml(raw, default_flow_style=rng.random() < 0.5)
    for i, one in enumerate(odd):
        text = text.replace(f"'{MARK.format(i)}'", one)
    return text.encode(errors="surrogatepass")


def _override(rng: random.Random, raw: Any) -> str:
    """An override of something in the configuration, of something near it, or of nothing."""
    place = list(rng.choice(places(raw)))
    if place[:1] == ["learners"] and len(place) > 1 and rng.random() < 0.8:
        entry = raw["learners"][place[1]]
        place[1] = entry.get("label", entry.get("name")) if isinstance(entry, dict) else entry
    path = list(map(str, place))
    if rng.random() < 0.4:
        path[rng.randrange(len(path))] = rng.choice((*KEYS, "0", "-1", "*"))
    if rng.random() < 0.2:
        path.append(rng.choice(KEYS))
    return f"{'.'.join(path)}{rng.choice(('=', '=', '=', '==', ''))}{rng.choice(ODD)}"


def _flip(rng: random.Random, text: bytes) -> bytes:
    changed = bytearray(text)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(rng.choice((128, 128, 128, 256)))
    return bytes(changed)


def _cut(rng: random.Random, text: bytes) -> bytes:
    start = rng.randrange(len(text))
    return text[:start] + text[start + rng.randint(1, 40) :]


def _insert(rng: random.Random, text: bytes) -> bytes:
    start = rng.randrange(len(text))
    return text[:start] + rng.choice((rng.choice(ODD).encode(), rng.randbytes(rng.randint(1, 8)))) + text[start:]


def _repeat_a_line(rng: random.Random, text: bytes) -> bytes:
    lines = text.split(b"\n")
    lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    return b"\n".join(lines)


def _tabs(rng: random.Random, text: bytes) -> bytes:
    return text.replace(b"  ", b"\t")


def _as_another_file(rng: random.Random, text: bytes) -> bytes:
    bomb = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    chain = "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 900))
    other = (b"", b"\n", b"- 1\n", b"x", b"\x89PNG\r\n\x1a\n" + rng.randbytes(200), b"\xef\xbb\xbf" + text)
    utf16 = text.decode(errors="replace").encode("utf-16")
    alias = ("a0: &a0 [x]\n" + rng.choice((bomb, chain))).encode()
    nested = rng.choice((b"[", b"{a: ", b"- ", b"? ", b"a: ", b"[" * 60 + b"x, ")) * 3000
    return rng.choice((*other, utf16, alias, alias, nested, text + alias))


BYTES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _flip,
    _cut,
    _insert,
    _repeat_a_line,
    _tabs,
    _as_another_file,
)
