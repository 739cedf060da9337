"""Running the checks: all of them on one learner, or as pytest parameters over several."""

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
    """What one check found."""

    name: str
    passed: bool
    message: str = ""


def check_learner(cls: type[Learner], parameters: dict[str, Any] | None = None) -> Iterator[CheckResult]:
    """Run every check on a learner class, yielding results as they come."""
    case = Case(cls, parameters or {})
    for name, check in CHECKS.items():
        try:
            check(case)
        except Exception as error:  # the learner is the thing under test: whatever it raises is a finding
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            yield CheckResult(name, False, f"{kind}{error}")
        else:
            yield CheckResult(name, True)


def parametrize_learner(learners: Sequence[tuple[Any, ...]]) -> Any:
    """A pytest decorator: the test runs for every learner × check, with arguments ``case`` and ``check``.

    Args:
        learners: (name, ``module:Class``, ``file.py:Class`` or class; hyper-parameters; optionally known failures as
            {check: reason}). A known failure is a strict xfail: it must fail.
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
        case = Case(cls, parameters)  # one for all checks: they share the runs they only look at
        for name, check in CHECKS.items():
            marks = [pytest.mark.xfail(reason=failures[name], strict=True)] if name in failures else []
            items.append(pytest.param(case, check, id=f"{title}-{name}", marks=marks))
    return pytest.mark.parametrize(("case", "check"), items)
