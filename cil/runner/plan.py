"""The runs that a configuration describes, all validated before the first one starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cil.config import Config, LearnerEntry
from cil.learner import Learner, LearnerConfig
from cil.learners import registry
from cil.stream.protocol import Order


@dataclass(frozen=True)
class Plan:
    """One run of a benchmark: a learner, a class order, a seed, and the configuration narrowed to them."""

    config: Config
    cls: type[Learner]
    parameters: LearnerConfig

    @property
    def entry(self) -> LearnerEntry:
        return self.config.learners[0]

    @property
    def order(self) -> Order:
        return self.config.orders[0]

    @property
    def seed(self) -> int:
        return self.config.seeds[0]

    @property
    def place(self) -> Path:
        """Folder below the results folder: ``<name>/<learner>/order<k>-seed<s>``."""
        order = self.order
        if not isinstance(order, (int, str)):
            order = "list" + hashlib.sha256(json.dumps(list(order)).encode()).hexdigest()[:8]
        return Path(self.config.name) / self.entry.title / f"order{order}-seed{self.seed}"


def plans(config: Config) -> Iterator[Plan]:
    """All runs of a configuration; hyper-parameters are validated before the first one starts.

    Raises:
        PluginError: A learner cannot be found.
        ConfigError: A hyper-parameter is wrong.
    """
    configured = [(entry, *registry.configure(entry)) for entry in config.learners]
    for entry, cls, parameters in configured:
        identity = {"class": entry.cls} if entry.cls else {"name": entry.name}
        resolved = LearnerEntry.model_validate({**identity, "label": entry.label, **parameters.model_dump(mode="json")})
        chosen_by = config.chosen_by if entry.chosen_by is None else entry.chosen_by
        for order in entry.orders or config.orders:
            for seed in entry.seeds or config.seeds:
                only = {"learners": [resolved], "orders": [order], "seeds": [seed], "chosen_by": chosen_by}
                only["noise_filter"] = config.noise_filter if entry.noise_filter is None else entry.noise_filter
                only["pseudo"] = config.pseudo if entry.pseudo is None else entry.pseudo
                yield Plan(config.model_copy(update=only), cls, parameters)


def dump(config: Config) -> dict[str, Any]:
    """A configuration as plain values that validate to the same configuration again."""
    plain = config.model_dump(mode="json", by_alias=True)
    fields = {f.alias or name for name, f in LearnerEntry.model_fields.items()}
    plain["learners"] = [
        {k: v for k, v in entry.items() if v is not None or k not in fields} for entry in plain["learners"]
    ]
    return plain
