"""Running a benchmark: the loop over learners, class orders and seeds, and the loop over stages inside it."""

from cil.runner.benchmark import Inputs, make_stream, run
from cil.runner.stages import Observer, Session, resume, run_stage, run_stages
from cil.runner.supported import require_supported

__all__ = [
    "Inputs",
    "Observer",
    "Session",
    "make_stream",
    "require_supported",
    "resume",
    "run",
    "run_stage",
    "run_stages",
]
