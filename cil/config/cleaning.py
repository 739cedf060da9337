"""The section ``noise_filter``: which training images a learner does not see because their labels look wrong."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from cil.config.section import Section


class NoiseFilter(Section):
    """Removal, or correction, of labels that the other images of the task contradict."""

    by: Literal["ridge", "knn"] = Field(
        "ridge",
        description="votes on frozen features; ridge: predictions of ridge regression on all other images of the task; "
        "knn: the nearest ones by cosine",
    )
    keep: Literal["agree"] | Annotated[float, Field(gt=0, le=1)] = Field(
        0.6,
        description="fraction of each class's images that are kept, those with the most votes for their label; agree: "
        "those whose label has the most votes of all",
    )
    correct: bool = Field(
        False, description="whether an image that is not kept gets the label that has at least 0.8 of the votes"
    )
    neighbours: PositiveInt = Field(20, description="number of neighbours of knn")
