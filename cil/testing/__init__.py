"""The checks that every learner must pass, for the learners of this package and for custom ones.

>>> from cil.testing import parametrize_learner  # doctest: +SKIP
>>> @parametrize_learner([("ncm", {}), ("my_file.py:Mine", {"lr": 0.1})])  # doctest: +SKIP
... def test_learner(case, check):
...     check(case)

On the command line: ``cil check-learner my_file.py:Mine``.
"""

from cil.testing.checks import CHECKS
from cil.testing.run import CheckResult, check_learner, parametrize_learner
from cil.testing.setting import Case

__all__ = ["CHECKS", "Case", "CheckResult", "check_learner", "parametrize_learner"]
