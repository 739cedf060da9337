"""What a strategy keeps between tasks, taken apart into tensors and JSON, and put together again.

No pickle: the few kinds of values that Avalanche's plugins keep are known here, and others are refused. Images are kept
as their places (task, row), to be read again from the tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from avalanche.benchmarks.utils import AvalancheDataset, make_avalanche_dataset
from avalanche.benchmarks.utils.data_attribute import TensorDataAttribute
from avalanche.benchmarks.utils.flat_data import FlatData
from avalanche.training.storage_policy import ReservoirSamplingBuffer
from avalanche.training.utils import ParamData
from torch import Tensor

from cil.avalanche.data import Place, dataset
from cil.avalanche.memory import Memory
from cil.stream import TaskData


class Codec:
    """To and from a :class:`Memory`.

    Args:
        tasks: The tasks that may be read, by number.
        classes: Classes seen, which stored logits are widened to.
        device: Where tensors that were with the model go.
    """

    def __init__(self, tasks: Mapping[int, TaskData], classes: int, device: torch.device) -> None:
        self.tasks, self.classes, self.device = tasks, classes, device
        self.sources = {task: data.source for task, data in tasks.items()}
        self._tensors: dict[str, Tensor] = {}
        self._images = 0
        self._known: dict[bytes, Place] = {}
        self._looked_at: set[int] = set()

    def save(self, values: Mapping[str, Any], memory: Memory) -> None:
        """Keep ``values`` in ``memory``, and nothing else."""
        self._tensors, self._images = {}, 0
        tree = {key: self._apart(value, key) for key, value in values.items()}
        memory.put(tree, self._tensors, self._images)

    def load(self, memory: Memory) -> dict[str, Any]:
        """The values that :meth:`save` was given; images and their logits as Avalanche data sets again."""
        return {key: self._together(node, memory) for key, node in memory.tree.items()}

    def _apart(self, value: Any, path: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, ParamData):
            return {"param": value.name, "data": self._tensor(value.data, path)}
        if isinstance(value, ReservoirSamplingBuffer):
            weights = self._tensor(value._buffer_weights, f"{path}/weights")
            return {"reservoir": value.max_size, "weights": weights, "buffer": self._apart(value.buffer, path)}
        if isinstance(value, AvalancheDataset):
            if not len(value):  # which may have lost its attributes
                return {"images": self._places([], path), "logits": None}
            logits = getattr(value, "logits", None)
            rows = None if logits is None else self._tensor(torch.stack(list(logits)), f"{path}/logits")
            return {"images": self._places(list(value.places), path), "logits": rows}
        if isinstance(value, Tensor) and value.ndim == 4:
            return {"pixels": self._places([self._place(pixels) for pixels in value], path)}
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, dict):
            return {"dict": [[key, self._apart(inner, f"{path}/{key}")] for key, inner in value.items()]}
        if isinstance(value, list | tuple | set):
            kind = next(k.__name__ for k in (list, tuple, set) if isinstance(value, k))
            return {kind: [self._apart(inner, f"{path}/{i}") for i, inner in enumerate(value)]}
        raise TypeError(f"{path}: a strategy keeps a {type(value).__name__}, which is not known how to save")

    def _tensor(self, value: Tensor, path: str) -> Any:
        key = path.replace(".", "/")  # buffers may have no dot in their names
        self._tensors[key] = value.detach().clone()
        # some plugins work on the CPU whatever the model does
        return {"tensor": key, "cpu": value.device.type == "cpu"}

    def _places(self, places: list[Place], path: str) -> Any:
        self._images += len(places)
        return self._tensor(torch.tensor(places, dtype=torch.int64).view(-1, 2), f"{path}/places")

    def _place(self, pixels: Tensor) -> Place:
        """Where an image under the test transform comes from: out of the memory, or the newest task."""
        newest = max(self.tasks)
        if newest not in self._looked_at:
            self._looked_at.add(newest)
            rows = 0
            for images, _ in self.tasks[newest].batches(64):
                for row, image in enumerate(images, rows):
                    self._known.setdefault(_bytes(image), (newest, row))
                rows += len(images)
        return self._known[_bytes(pixels)]

    def _together(self, node: Any, memory: Memory) -> Any:
        if not isinstance(node, dict):
            return node
        if "tensor" in node:
            value = memory[node["tensor"]].clone()
            return value.cpu() if node["cpu"] else value.to(self.device)
        if "param" in node:
            value = self._together(node["data"], memory)
            return ParamData(node["param"], init_tensor=value, device=value.device)
        if "reservoir" in node:
            buffer = ReservoirSamplingBuffer(node["reservoir"])
            buffer.buffer = self._together(node["buffer"], memory)
            buffer._buffer_weights = self._together(node["weights"], memory)
            return buffer
        if "images" in node:
            found = self._images_at(self._together(node["images"], memory))
            return found if node["logits"] is None else self._with_logits(found, self._together(node["logits"], memory))
        if "pixels" in node:
            places = self._together(node["pixels"], memory)
            found = self._images_at(places).eval()
            pixels = torch.stack([found[i][0] for i in range(len(found))])
            self._known |= {
                _bytes(image): (task, row) for image, (task, row) in zip(pixels, places.tolist(), strict=True)
            }
            return pixels.to(self.device)
        if "dict" in node:
            return {key: self._together(inner, memory) for key, inner in node["dict"]}
        ((kind, items),) = node.items()
        return {"list": list, "tuple": tuple, "set": set}[kind](self._together(inner, memory) for inner in items)

    def _images_at(self, places: Tensor) -> Any:
        found = [(task, row) for task, row in places.tolist()]
        return dataset(self.sources, found, [int(self.tasks[task].labels[row]) for task, row in found])

    def _with_logits(self, images: Any, logits: Tensor) -> Any:
        """Logits [N, C'] stored with images of a time of C' classes, ∞ for classes that came later."""
        wide = torch.full((len(logits), self.classes), torch.inf)
        wide[:, : logits.shape[1]] = logits
        rows = FlatData([list(wide)], discard_elements_not_in_indices=True)
        return make_avalanche_dataset(
            images, data_attributes=[TensorDataAttribute(rows, name="logits", use_in_getitem=True)]
        )


def _bytes(image: Tensor) -> bytes:
    return image.cpu().contiguous().numpy().tobytes()
