"""Commands that list and empty the feature store. They need no torch."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from cil.cli.output import expanded, say
from cil.errors import printable

app = typer.Typer(help="Features on disk that all runs share: inspect or delete them.", no_args_is_help=True)
Folder = Annotated[
    Path | None,
    typer.Option(
        "--folder", help="The store's folder; default: that of hardware.feature_store's default.", callback=expanded
    ),
]
UNITS = ("B", "kB", "MB", "GB", "TB")


@app.command()
def info(
    folder: Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: sizes in bytes, times in ISO 8601.")] = False,
) -> None:
    """Show the feature store's folder, its size, and its contents by backbone and data."""
    import json

    store = _store(folder)
    entries = [
        {
            "backbone": entry.about.get("backbone_name", "damaged key.json"),
            "backbone_sha256": entry.about.get("weights", ""),
            "data": entry.about.get("data_name", ""),
            "tuner": entry.about.get("tuner_name", ""),
            "precision": entry.about.get("precision", ""),
            "device": entry.about.get("device", ""),
            "images": entry.images,
            "bytes": entry.size,
            "last_used": datetime.fromtimestamp(entry.used).astimezone().isoformat(timespec="seconds"),
        }
        for entry in store.entries()
        if entry.files
    ]
    size = sum(int(entry["bytes"]) for entry in entries)
    if as_json:
        content = {"folder": str(store.place), "bytes": size, "cap_bytes": int(store.cap), "entries": entries}
        say(json.dumps(content, indent=1))
        return
    say(f"{store.place}: {len(entries)} entries, {amount(size)} of at most {amount(store.cap)}")
    if entries:
        _print(entries)


@app.command()
def clear(
    folder: Folder = None,
    older_than: Annotated[
        float | None,
        typer.Option(min=0, help="Delete only what was last used more than this many days ago.", metavar="DAYS"),
    ] = None,
) -> None:
    """Delete the contents of the feature store; runs recompute what they need."""
    from cil.errors import RunError

    store = _store(folder)
    try:
        files, freed = store.clear((older_than or 0) * 24 * 3600)
    except OSError as error:
        raise RunError(f"{store.place}: cannot be cleared ({error.strerror}: {error.filename})") from None
    say(f"{store.place}: {files} files removed, {amount(freed)} freed")


def amount(size: float) -> str:
    """A number of bytes in a readable unit.

    >>> amount(12_345_678)
    '12.3 MB'
    """
    for unit in UNITS:
        if size < 1000 or unit == UNITS[-1]:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def _store(folder: Path | None) -> Any:
    from cil.store import FeatureStore, default_place

    return FeatureStore(folder if folder else default_place())


def _print(entries: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    for name in ("backbone", "data", "tuner", "precision", "images", "size", "last used"):
        table.add_column(name, justify="right" if name in ("images", "size") else "left", overflow="fold")
    for entry in entries:
        precision = "fp32" if entry["precision"] == "no" else entry["precision"]
        used = entry["last_used"][:16].replace("T", " ")
        cells = (entry["backbone"], entry["data"], entry["tuner"], f"{precision} {entry['device']}")
        every = (*cells, str(entry["images"]), amount(entry["bytes"]), used)
        table.add_row(*(Text(printable(cell)) for cell in every))
    Console().print(table)
