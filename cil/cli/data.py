"""Commands about datasets."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from cil.cli.output import say


class SplitWanted(str, Enum):
    auto = "auto"
    official = "official"
    seeded = "seeded"


def prepare_data(
    dataset: Annotated[
        str,
        typer.Argument(
            help="cifar100, imagenet_r, imagenet_a, cub, omnibenchmark, vtab, objectnet.", metavar="DATASET"
        ),
    ],
    source: Annotated[Path, typer.Argument(help="The original download, an archive or its folder.", metavar="SOURCE")],
    out: Annotated[Path, typer.Argument(help="Folder to create, for data.root.", metavar="OUT")],
    split: Annotated[
        SplitWanted,
        typer.Option(help="official: CUB's own; seeded: drawn; auto: the split of the source, drawn if it has none."),
    ] = SplitWanted.auto,
    seed: Annotated[int, typer.Option(help="Seed of a drawn split.")] = 1993,
    train_list: Annotated[
        Path | None, typer.Option(help="File with one training image per line, relative to SOURCE's folder of classes.")
    ] = None,
    test_list: Annotated[
        Path | None, typer.Option(help="The same for test images; default: the other images of the listed classes.")
    ] = None,
    allow_counts: Annotated[
        bool, typer.Option("--allow-counts", help="Accept numbers of images that differ from the published split's.")
    ] = False,
) -> None:
    """Create class folders in train/ and test/ from a published benchmark's original download.

    A split.json beside them says which split it is: the download's own, an archive of the published re-split, lists of
    files, or a drawn one of the published sizes. Run the same command again to resume.
    """
    from cil.data.prepare import prepare

    record = prepare(
        dataset,
        source,
        out,
        split=split.value,
        seed=seed,
        train_list=train_list,
        test_list=test_list,
        allow_counts=allow_counts,
    )
    sizes = f"{record['classes']} classes, {record['train']} training and {record['test']} test images"
    say(f"{out}: {sizes}; {record['what']}")
