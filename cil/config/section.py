"""The base of every section of a configuration."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

from cil.config.numbers import check_range, is_number, mark_truth


def as_section(raw: Any) -> Any:
    """Expand a bare name to a section: ``adapter`` to ``{name: adapter}``, ``mine.py:Mine`` to
    ``{class: mine.py:Mine}``."""
    return {"class" if ":" in raw else "name": raw} if isinstance(raw, str) else raw


class Section(BaseModel):
    """A section of a configuration: immutable, unknown keys are errors, and numbers are finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        numbers = {info.alias or key for key, info in cls.model_fields.items() if is_number(info.annotation)}
        return {key: mark_truth(value) if key in numbers else value for key, value in raw.items()}

    @field_validator("*", mode="after")
    @classmethod
    def _in_range(cls, value: Any, info: ValidationInfo) -> Any:
        return check_range(value) if is_number(cls.model_fields[info.field_name or ""].annotation) else value
