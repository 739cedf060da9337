"""Configuration keys and defaults that have changed: an error names a new key, and stored configurations are converted.

A stored configuration states all its keys. One that lacks a key is older than the key; where the default is not what
runs did before there was a key, it is given here.
"""

from __future__ import annotations

from typing import Any

HEAD = {"head_lr": "head_lr_factor"}
MERGED_HEAD = {**HEAD, "sigma": "head_scale"}

TOP = {"batch_size": "inference_batch_size", "base": "extends"}
STREAM = {"base": "initial_classes"}
LEARNERS = {
    "tuna": HEAD,
    "mos": HEAD,
    "merge": MERGED_HEAD,
    "merge_lca": MERGED_HEAD,
    "merge_oracle": MERGED_HEAD,
    "slca": {"backbone_lr": "backbone_lr_factor"},
    "ssiat": {"sigma": "drift_bandwidth"},
    "rsiat": {"sigma": "drift_bandwidth", "projector_lr": "projector_lr_factor"},
}


EARLIER_RULES = {"iso_c": {"of": "mean"}}
"""Values of keys that stored merging rules lack, by rule."""


def new_name(key: str, known: list[str]) -> str | None:
    """The key that replaced ``key`` among the keys ``known`` where it was written; None if it was not renamed."""
    candidates = [table[key] for table in (TOP, STREAM, *LEARNERS.values()) if key in table]
    return next((name for name in candidates if name in known), None)


def current_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a stored run with today's keys; values stay as they are."""
    config = _rename(config, TOP)
    config["stream"] = _rename(config["stream"], STREAM)
    config["learners"] = [current_learner_keys(entry) for entry in config["learners"]]
    return config


def current_learner_keys(entry: dict[str, Any]) -> dict[str, Any]:
    """A stored learner entry (name and hyper-parameters) with today's keys."""
    entry = _rename(entry, LEARNERS.get(entry.get("name", ""), {}))
    rule = entry.get("rule")
    if isinstance(rule, dict) and rule.get("name") in EARLIER_RULES:
        entry["rule"] = EARLIER_RULES[rule["name"]] | rule
    return entry


def _rename(section: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in section.items()}
