"""Encodes the state that a strategy keeps between tasks as tensors and JSON, and decodes it.

There is no pickle: the few types of values that Avalanche's plugins keep are supported, and others are refused. Images
are stored as their places (task, row) and read again from the tasks.
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
    """Writes a strategy's state to a :class:`Memory` and reads it back.

    Args:
        tasks: Tasks whose images may be read, by number.
        classes: Number of classes seen, to which stored logits are extended.
        device: Device of the tensors that were on the model's device.
    """

    def __init__(self, tasks: Mapping[int, TaskData], classes: int, device: torch.device) -> None:
        self.tasks, self.classes, self.device = tasks, classes, device
        self.sources = {task: data.source for task, data in tasks.items()}
        self._tensors: dict[str, Tensor] = {}
        self._images = 0
        self._known: dict[bytes, Place] = {}
        self._indexed: set[int] = set()

    def save(self, values: Mapping[str, Any], memory: Memory) -> None:
        """Replace the content of ``memory`` by ``values``.

        Raises:
            TypeError: A value is of a type that cannot be saved.
        """
        self._tensors, self._images = {}, 0
        tree = {key: self._encode(value, key) for key, value in values.items()}
        memory.put(tree, self._tensors, self._images)

    def load(self, memory: Memory) -> dict[str, Any]:
        """Return the values that :meth:`save` received, with images and their logits as Avalanche data sets."""
        return {key: self._decode(node, memory) for key, node in memory.tree.items()}

    def _encode(self, value: Any, path: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, ParamData):
            return {"param": value.name, "data": self._tensor(value.data, path)}
        if isinstance(value, ReservoirSamplingBuffer):
            weights = self._tensor(value._buffer_weights, f"{path}/weights")
            return {"reservoir": value.max_size, "weights": weights, "buffer": self._encode(value.buffer, path)}
        if isinstance(value, AvalancheDataset):
            if not len(value):  # an empty data set may have lost its attributes
                return {"images": self._places([], path), "logits": None}
            logits = getattr(value, "logits", None)
            rows = None if logits is None else self._tensor(torch.stack(list(logits)), f"{path}/logits")
            return {"images": self._places(list(value.places), path), "logits": rows}
        if isinstance(value, Tensor) and value.ndim == 4:
            return {"pixels": self._places([self._place(pixels) for pixels in value], path)}
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, dict):
            return {"dict": [[key, self._encode(inner, f"{path}/{key}")] for key, inner in value.items()]}
        if isinstance(value, list | tuple | set):
            kind = next(k.__name__ for k in (list, tuple, set) if isinstance(value, k))
            return {kind: [self._encode(inner, f"{path}/{i}") for i, inner in enumerate(value)]}
        raise TypeError(f"{path}: a strategy keeps a {type(value).__name__}, which cannot be saved")

    def _tensor(self, value: Tensor, path: str) -> Any:
        key = path.replace(".", "/")  # names of buffers must not contain dots
        self._tensors[key] = value.detach().clone()
        # some plugins keep tensors on the CPU, whatever the model's device
        return {"tensor": key, "cpu": value.device.type == "cpu"}

    def _places(self, places: list[Place], path: str) -> Any:
        self._images += len(places)
        return self._tensor(torch.tensor(places, dtype=torch.int64).view(-1, 2), f"{path}/places")

    def _place(self, pixels: Tensor) -> Place:
        """Find an image's place by its pixels under the test transform, among stored images and the newest task."""
        newest = max(self.tasks)
        if newest not in self._indexed:
            self._indexed.add(newest)
            rows = 0
            for images, _ in self.tasks[newest].batches(64):
                for row, image in enumerate(images, rows):
                    self._known.setdefault(_bytes(image), (newest, row))
                rows += len(images)
        return self._known[_bytes(pixels)]

    def _decode(self, node: Any, memory: Memory) -> Any:
        if not isinstance(node, dict):
            return node
        if "tensor" in node:
            value = memory[node["tensor"]].clone()
            return value.cpu() if node["cpu"] else value.to(self.device)
        if "param" in node:
            value = self._decode(node["data"], memory)
            return ParamData(node["param"], init_tensor=value, device=value.device)
        if "reservoir" in node:
            buffer = ReservoirSamplingBuffer(node["reservoir"])
            buffer.buffer = self._decode(node["buffer"], memory)
            buffer._buffer_weights = self._decode(node["weights"], memory)
            return buffer
        if "images" in node:
            images = self._images_at(self._decode(node["images"], memory))
            return images if node["logits"] is None else self._with_logits(images, self._decode(node["logits"], memory))
        if "pixels" in node:
            places = self._decode(node["pixels"], memory)
            images = self._images_at(places).eval()
            pixels = torch.stack([images[i][0] for i in range(len(images))])
            self._known |= {
                _bytes(image): (task, row) for image, (task, row) in zip(pixels, places.tolist(), strict=True)
            }
            return pixels.to(self.device)
        if "dict" in node:
            return {key: self._decode(inner, memory) for key, inner in node["dict"]}
        ((kind, items),) = node.items()
        return {"list": list, "tuple": tuple, "set": set}[kind](self._decode(inner, memory) for inner in items)

    def _images_at(self, places: Tensor) -> Any:
        pairs = [(task, row) for task, row in places.tolist()]
        return dataset(self.sources, pairs, [int(self.tasks[task].labels[row]) for task, row in pairs])

    def _with_logits(self, images: Any, logits: Tensor) -> Any:
        """Add stored logits [N, C'] to images, extended to all classes: ∞ for those that appeared later."""
        wide = torch.full((len(logits), self.classes), torch.inf)
        wide[:, : logits.shape[1]] = logits
        rows = FlatData([list(wide)], discard_elements_not_in_indices=True)
        return make_avalanche_dataset(
            images, data_attributes=[TensorDataAttribute(rows, name="logits", use_in_getitem=True)]
        )


def _bytes(image: Tensor) -> bytes:
    return image.cpu().contiguous().numpy().tobytes()
