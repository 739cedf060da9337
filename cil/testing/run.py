"""Runs all checks on one learner, or makes them pytest parameters for several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cil.learner import Learner
from cil.learners import registry
from cil.testing.checks import CHECKS
from cil.testing.setting import Case


@dataclass(frozen=True)
class CheckResult:
    """The result of one check; ``message`` describes a failure."""

    name: str
    passed: bool
    message: str = ""


def check_learner(cls: type[Learner], parameters: dict[str, Any] | None = None) -> Iterator[CheckResult]:
    """Run every check on a learner class; yields each result as soon as it is known.

    Args:
        cls: The learner class.
        parameters: Hyper-parameters, as in a configuration.
    """
    case = Case(cls, parameters or {})
    for name, check in CHECKS.items():
        try:
            check(case)
        except Exception as error:  # whatever the learner raises is a result of the check
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            yield CheckResult(name, False, f"{kind}{error}")
        else:
            yield CheckResult(name, True)


def parametrize_learner(learners: Sequence[tuple[Any, ...]]) -> Any:
    """A pytest decorator that runs a test for every learner × check, with arguments ``case`` and ``check``.

    Args:
        learners: Tuples of a learner (name, ``module:Class``, ``file.py:Class`` or class), its hyper-parameters and
            optionally its known failures as {check: reason}. A known failure is a strict xfail, so it must fail.

    Raises:
        ValueError: A known failure names no check.
    """
    import pytest

    items = []
    for entry in learners:
        spec, parameters, failures = entry if len(entry) == 3 else (*entry, {})
        unknown = failures.keys() - CHECKS.keys()
        if unknown:
            raise ValueError(f"known failures name no check: {sorted(unknown)}; checks: {', '.join(CHECKS)}")
        cls = registry.resolve(spec) if isinstance(spec, str) else spec
        title = f"{cls.name or cls.__name__}{''.join(f'-{v}' for v in parameters.values() if isinstance(v, str))}"
        case = Case(cls, parameters)  # one for all checks, which share the runs that they only read
        for name, check in CHECKS.items():
            marks = [pytest.mark.xfail(reason=failures[name], strict=True)] if name in failures else []
            items.append(pytest.param(case, check, id=f"{title}-{name}", marks=marks))
    return pytest.mark.parametrize(("case", "check"), items)
