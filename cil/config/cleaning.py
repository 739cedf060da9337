"""The sections ``noise_filter`` and ``pseudo``: labels that look wrong are left out, missing ones guessed."""

from __future__ import annotations

import math
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


class Pseudo(Section):
    """Labels for the unlabelled images of a task (``stream.labelled``), from what the learner makes of the others."""

    threshold: Literal["falling"] | Annotated[float, Field(gt=0, lt=1)] = Field(
        0.95,
        description="least calibrated probability, among the classes of the task, of a label that is accepted; "
        "falling: from 0.95 at the first stage to 0.7, as in TACLE (arXiv 2407.08041)",
    )
    rounds: PositiveInt = Field(1, description="number of times that images are labelled and learned again")

    def at(self, stage: int) -> float:
        """The threshold of a stage, from 0: TACLE's h(t) = α / (1 + exp(α t)) + β with α = 0.5 and β = 0.7."""
        return 0.5 / (1 + math.exp(0.5 * stage)) + 0.7 if isinstance(self.threshold, str) else self.threshold
