"""TensorBoard output. It depends only on a run's rows, so a resumed run draws exactly what an uninterrupted one draws.

The step of everything under ``accuracy``, ``forgetting`` and ``cost`` is the stage (from 1), never the iteration, so
learners that train differently share an x-axis. What learners log while training is under ``train/``, with its own
steps.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from cil import metrics, results
from cil.report import figures
from cil.results import Header, StageRow

LAYOUT = {
    "cil": {
        "accuracy over all classes seen": ["Multiline", ["accuracy/seen$"]],
        "forgetting": ["Multiline", ["forgetting/mean"]],
        "newest task and older tasks": ["Multiline", ["accuracy/new", "accuracy/old"]],
        "forgetting of every task": ["Multiline", [r"forgetting/task_\d+"]],
        "task identification": ["Multiline", ["task_id_accuracy"]],
    }
}
OF_STREAM = {
    # key of the stream: the chart that it adds
    "shots": {"base and novel classes": ["Multiline", ["accuracy/(base|novel|harmonic)$"]]},
    "shots_files": {"base and novel classes": ["Multiline", ["accuracy/(base|novel|harmonic)$"]]},
    "imbalance": {"classes by number of training images": ["Multiline", ["accuracy/(many|medium|few)$"]]},
    "online": {"accuracy between batches": ["Multiline", ["train/anytime$"]]},
}
COSTS = (
    "trainable_parameters",
    "parameter_bytes",
    "statistics_bytes",
    "exemplar_bytes",
    "train_passes",
    "test_passes",
    "seconds_learn",
    "seconds_test",
    "peak_memory_bytes",
)


QUEUE = 1000
"""Records that wait for TensorBoard's writing thread before the run does; a stage ends with a flush."""


class Tracker:
    """Writes a run's event file. Opening it replaces what an interrupted process left.

    Args:
        folder: The run's folder.
        header: The run's header; its configuration becomes a text panel.
    """

    def __init__(self, folder: Path, header: Header) -> None:
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(str(folder), max_queue=QUEUE)
        stream = header["config"].get("stream", {})
        further = {name: chart for key, one in OF_STREAM.items() if stream.get(key) for name, chart in one.items()}
        self._writer.add_custom_scalars({"cil": LAYOUT["cil"] | further})
        text = yaml.safe_dump(header["config"], sort_keys=False, allow_unicode=True)
        self._writer.add_text("config", "```yaml\n" + text + "```")
        self._header = header
        self._steps: Counter[str] = Counter()
        self._drawn, self._pause = time.monotonic(), 100.0

    def scalar(self, name: str, value: float) -> None:
        """The next value of something logged while training."""
        self._writer.add_scalar(f"train/{name}", value, self._steps[name])
        self._steps[name] += 1

    def stage(self, rows: Sequence[StageRow]) -> None:
        """The newest stage of ``rows``."""
        r, r_task, total = results.matrices(rows)
        self._stage(r, r_task, total, rows[-1])
        self._matrix(r, len(rows))
        self._writer.flush()

    def _stage(self, r: np.ndarray, r_task: np.ndarray, total: np.ndarray, row: StageRow) -> None:
        """The numbers of the last stage of these matrices, which include two per task, as one record."""
        stage = len(r)
        values = results.stage_values(r, r_task, total, row, stage - 1)
        for task, value in enumerate(metrics.forgetting_by_task(r)):
            values[f"forgetting/task_{task + 1:02d}"] = float(value)
        for task, value in enumerate(r[-1]):
            values[f"accuracy/task_{task + 1:02d}"] = float(value)
        for name in COSTS:
            values[f"cost/{name}"] = row["costs"][name]  # type: ignore[literal-required]
        known = [Summary.Value(tag=name, simple_value=x) for name, x in values.items() if not math.isnan(x)]
        # one by one with add_scalar, 300 tasks would take a third of a second per stage
        self._writer._get_file_writer().add_summary(Summary(value=known), stage)
        for name, counts in row.get("histograms", {}).items():  # rows of older versions have none
            self._histogram(name, np.array(counts), stage)

    def _matrix(self, r: np.ndarray, stage: int) -> None:
        """The matrix as an image: after the last stage, and between while drawing takes at most 1 % of the time."""
        stages, started = len(self._header["tasks"]), time.monotonic()
        if stage < stages and started - self._drawn < self._pause:
            return
        padded = np.full((stages, stages), np.nan)
        padded[:stage, :stage] = r
        self._writer.add_figure(
            "accuracy_matrix", figures.matrix(padded, f"{self._header['learner']}, stage {stage}"), stage
        )
        self._drawn = time.monotonic()
        self._pause = 100 * (self._drawn - started)

    def _histogram(self, name: str, counts: np.ndarray, stage: int) -> None:
        """A bar around each of 0, 1, … as high as its count."""
        numbers = np.arange(len(counts))
        self._writer.add_histogram_raw(
            name,
            min=-0.5,
            max=len(counts) - 0.5,
            num=counts.sum(),
            sum=counts @ numbers,
            sum_squares=counts @ numbers**2,
            bucket_limits=(numbers + 0.5).tolist(),
            bucket_counts=counts.tolist(),
            global_step=stage,
        )

    def replay(self, rows: Sequence[StageRow]) -> None:
        """Everything the finished stages of an interrupted run wrote, in time that grows with what they wrote."""
        if not rows:
            return
        r, r_task, total = results.matrices(rows)
        for i, row in enumerate(rows):
            for name, value in row["log"]:
                self.scalar(name, value)
            end = i + 1
            self._stage(r[:end, :end], r_task[:end, :end], total[:end, :end], row)
        self._matrix(r, len(rows))
        self._writer.flush()

    def finish(self, summary: dict[str, Any]) -> None:
        """Hyper-parameters beside final metrics, in the same run directory."""
        config = self._header["config"]
        flat = {"learner": self._header["learner"], "order": str(config["orders"][0]), "seed": config["seeds"][0]}
        nested = {k: v if isinstance(v, dict) else {"": v} for k, v in config["learners"][0].items()}
        parameters = {
            f"{outer}.{inner}".rstrip("."): value
            for outer, section in nested.items()
            for inner, value in section.items()
            if isinstance(value, (str, int, float, bool))
        }
        final = {f"final/{k}": float(v) for k, v in summary.items() if v is not None}
        # SummaryWriter.add_hparams would open a second event file, and readers take files in the order of their names,
        # which for two of one second is not the order they were written in: the same summaries, into the one file
        for part in hparams({**parameters, **flat}, final):
            self._writer._get_file_writer().add_summary(part)
        for name, value in final.items():
            self._writer.add_scalar(name, value)

    def close(self) -> None:
        self._writer.close()
