"""Reads and writes safetensors checkpoints one tensor at a time.

The package ``safetensors`` writes a dictionary that is completely in memory; :class:`TensorWriter` writes the same
format from shapes that are known in advance and tensors that arrive one by one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cil.errors import BackboneError

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read from disk at every access.

    Args:
        path: A safetensors file, an index ``model.safetensors.index.json`` of several, or a folder with either, as
            timm and Transformers write them.

    Attributes:
        path: The path as passed.
        files: Every file of the checkpoint, with the names of its tensors in file order.

    Raises:
        BackboneError: The checkpoint does not exist, is damaged or incomplete, is a pickle or a LoRA adapter, or has a
            dtype that cannot be merged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files: dict[Path, list[str]] = {}
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._where: dict[str, tuple[Path, str]] = {}  # file, and the tensor's name in it
        for file, expected in _files(self.path).items():
            try:
                with safe_open(file, framework="pt") as opened:
                    names = list(opened.keys())
                    for name in names:
                        part = opened.get_slice(name)
                        self._shapes[name] = (tuple(part.get_shape()), _dtype(file, name, part.get_dtype()))
                        self._where[name] = file, name
                    self.files[file] = names
                    self.metadata: dict[str, str] = dict(opened.metadata() or {})
            except FileNotFoundError:
                raise BackboneError(f"{file}: does not exist, though {INDEX} names it") from None
            except (SafetensorError, OSError) as error:
                raise BackboneError(f"{file}: not a safetensors file, or a damaged one ({error})") from None
            missing = [name for name in expected if name not in self._shapes]
            if missing:
                raise BackboneError(f"{file}: {missing[0]} is missing, though {INDEX} says it is there")

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return a tensor's shape and dtype without reading it."""
        return self._shapes[name]

    def __getitem__(self, name: str) -> Tensor:
        # reopened for every tensor: pages of a file that stays mapped count as memory of this process
        file, stored = self._where[name]
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(stored).clone()

    def __contains__(self, name: object) -> bool:
        return name in self._shapes  # the inherited one reads the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names, stored name → new name; :attr:`files` keeps the stored ones."""
        self._shapes = {names.get(name, name): shape for name, shape in self._shapes.items()}
        self._where = {names.get(name, name): where for name, where in self._where.items()}

    def below(self, prefix: str) -> Mapping[str, Tensor]:
        """Return the tensors whose names start with ``prefix``, by their names without it."""
        return _Below(self, prefix)


class _Below(Mapping[str, Tensor]):
    def __init__(self, whole: Checkpoint, prefix: str) -> None:
        self.whole, self.prefix = whole, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.whole[self.prefix + name]

    def __contains__(self, name: object) -> bool:
        return f"{self.prefix}{name}" in self.whole

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.whole if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class TensorWriter:
    """Writes a safetensors file one tensor at a time, in any order. The file is complete after an exit without error.

    Args:
        path: The file; an existing one is overwritten, not atomically, so write under a temporary name and rename.
        shapes: Shape and dtype of every tensor that will be written, by name.
        metadata: Strings for the header.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._offsets: dict[str, tuple[int, int]] = {}
        offset = 0
        # widest items first keeps every tensor aligned, as safetensors itself does
        for name, (shape, dtype) in sorted(shapes.items(), key=lambda item: -item[1][1].itemsize):
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            self._offsets[name] = (offset, size)
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._missing = set(shapes)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the announced shape and dtype, from any device.

        Raises:
            ValueError: The tensor has another size.
        """
        offset, size = self._offsets[name]
        data = as_bytes(tensor)
        if data.nbytes != size:
            raise ValueError(f"{name}: {data.nbytes} bytes, but {size} were announced")
        self._file.seek(self._start + offset)
        self._file.write(memoryview(data))
        self._missing.discard(name)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._missing:
                    raise ValueError(f"{self._file.name}: {sorted(self._missing)[0]} was announced but not written")
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self.close()

    def close(self) -> None:
        """Close a file that will not be completed."""
        self._file.close()


def as_bytes(tensor: Tensor) -> np.ndarray:
    """Return a tensor's bytes, uint8 [n]."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _files(path: Path) -> dict[Path, list[str]]:
    """The files of a checkpoint, each with the names an index expects in it."""
    if path.is_dir():
        if (path / "adapter_model.safetensors").is_file() or (path / "adapter_config.json").is_file():
            raise BackboneError(
                f"{path}: holds a LoRA adapter (adapter_model.safetensors), not a full model; merge it into its model "
                "first (merge_and_unload() in PEFT) and save that"
            )
        if (path / INDEX).is_file():
            path = path / INDEX
        elif (path / "model.safetensors").is_file():
            path = path / "model.safetensors"
        else:
            raise BackboneError(f"{path}: neither model.safetensors nor {INDEX} in this folder; give the file itself")
    if not path.is_file():
        raise BackboneError(f"{path}: no such file or folder")
    if path.suffix == ".json":
        try:
            weights = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            files: dict[Path, list[str]] = {}
            for name, file in sorted(weights.items(), key=lambda item: (item[1], item[0])):
                files.setdefault(path.parent / file, []).append(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise BackboneError(f"{path}: not an index of safetensors files ({what})") from None
        return files
    if path.suffix != ".safetensors":
        raise BackboneError(
            f"{path}: not a .safetensors file; pickles are never loaded: if you trust it, convert it to safetensors"
        )
    return {path: []}


def _dtype(file: Path, name: str, code: str) -> torch.dtype:
    if code not in _DTYPES:
        raise BackboneError(f"{file}: {name} is {code}; only {', '.join(_DTYPES)} can be merged: dequantise it first")
    return _DTYPES[code]
