"""Ways to damage one stored file: bits, length, place and, of JSON files, keys, types, ranges and depth."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Damage = Callable[[Path, random.Random], None]


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def garble(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content) + 1)
    content[start : start + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
    file.write_bytes(content)


def truncate(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content) + 1)])


def extend(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 200)))


def empty(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def delete(file: Path, rng: random.Random) -> None:
    file.unlink()


def folder_instead(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


def dangle(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


def swap(file: Path, rng: random.Random) -> None:
    """Exchange it with a file of the same kind elsewhere in the tree, which is the parent called ``tree``."""
    tree = next(parent for parent in file.parents if parent.name == "tree")
    others = [other for other in sorted(tree.rglob(f"*{file.suffix}")) if other != file and other.is_file()]
    same = [other for other in others if other.name == file.name]
    pool = same or others
    if not pool:
        return
    other, between = rng.choice(pool), file.with_name("between")
    file.rename(between)
    other.rename(file)
    between.rename(other)


def overwrite(file: Path, rng: random.Random) -> None:
    """Put another file of the tree in its place."""
    tree = next(parent for parent in file.parents if parent.name == "tree")
    others = [o for o in sorted(tree.rglob(f"*{file.suffix}")) if o.is_file() and o.read_bytes() != file.read_bytes()]
    if others:
        shutil.copy(rng.choice(others), file)


FILES: tuple[Damage, ...] = (
    flip,
    flip,
    flip,
    garble,
    truncate,
    extend,
    empty,
    delete,
    folder_instead,
    dangle,
    swap,
    overwrite,
)
"""Damages of any file; the likeliest one several times."""

HUGE = 10**40
VALUES: tuple[Any, ...] = (None, True, -1, 7.5, HUGE, -0.0, 1e308, "", "x", "../../x", "\x00", [], [[]], {}, {"a": 1})


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of every value inside a JSON value."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def pick(content: Any, rng: random.Random) -> tuple[Any, Any]:
    """A random place in an object, which is added to an empty one."""
    if not content:
        content["added"] = 0
    return rng.choice(list(places(content)))


def mutate(file: Path, rng: random.Random) -> None:
    """Change one value of a JSON file to one of another type or range."""
    content = json.loads(file.read_bytes())
    holder, key = pick(content, rng)
    holder[key] = rng.choice(VALUES)
    file.write_text(json.dumps(content), encoding="utf-8")


def nudge(file: Path, rng: random.Random) -> None:
    """Change one number of a JSON file a little, within its range."""
    content = json.loads(file.read_bytes())
    numbers = [(h, k) for h, k in places(content) if isinstance(h[k], (int, float)) and not isinstance(h[k], bool)]
    holder, key = rng.choice(numbers) if numbers else pick(content, rng)
    holder[key] = holder[key] + 1 if type(holder[key]) is int else 0.5
    file.write_text(json.dumps(content), encoding="utf-8")


def lose_key(file: Path, rng: random.Random) -> None:
    content = json.loads(file.read_bytes())
    holder, key = pick(content, rng)
    del holder[key]
    file.write_text(json.dumps(content), encoding="utf-8")


def deepen(file: Path, rng: random.Random) -> None:
    """Put a value of a random depth, up to 100,000, in the place of one value, or of the whole."""
    depth, content = rng.choice((70, 500, 100_000)), json.loads(file.read_bytes())
    deep = "[" * depth + "]" * depth if rng.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth
    if rng.random() < 0.5:
        file.write_text(deep, encoding="utf-8")
        return
    holder, key = pick(content, rng)
    holder[key] = "DEEP"
    file.write_text(json.dumps(content).replace('"DEEP"', deep), encoding="utf-8")


def spell(file: Path, rng: random.Random) -> None:
    """Put what is no JSON, or no sensible one, in the place of one value."""
    content = json.loads(file.read_bytes())
    holder, key = pick(content, rng)
    holder[key] = "SPELL"
    words = ("NaN", "-Infinity", "1e999", "1" * 5000, "1" * 4000, '"\\ud800"', "'x'", "tru", "")
    file.write_text(json.dumps(content).replace('"SPELL"', rng.choice(words)), encoding="utf-8")


def encode(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes().decode().encode(rng.choice(("utf-16", "utf-8-sig", "utf-32", "cp500"))))


def listed(file: Path, rng: random.Random) -> None:
    file.write_text(rng.choice(("[]", "3", '"x"', "null", f"[{file.read_text()}]")), encoding="utf-8")


JSON: tuple[Damage, ...] = (mutate, mutate, nudge, nudge, lose_key, deepen, spell, encode, listed)
"""Damages of JSON files."""


def unsealed(damage: Damage) -> Damage:
    """A damage of a file as earlier versions wrote it, without a checksum: no reader can tell it from another file."""

    def apply(file: Path, rng: random.Random) -> None:
        content = json.loads(file.read_bytes())
        content.pop("checksum", None)
        file.write_text(json.dumps(content), encoding="utf-8")
        damage(file, rng)

    apply.__name__ = f"unsealed_{damage.__name__}"
    return apply


def choose(file: Path, rng: random.Random) -> tuple[Damage, bool]:
    """A damage for a file, and whether the readers must notice it."""
    if file.suffix != ".json" or rng.random() < 0.3:
        return rng.choice(FILES), True
    damage = rng.choice(JSON)
    return (unsealed(damage), False) if rng.random() < 0.2 else (damage, True)
