"""The weights a model started from, to go back to before each of many short trainings.

Weights that stand unchanged in the model's own safetensors files are read from there each time, memory-mapped: they
cost page cache, which all processes of a machine share, and no memory of their own. Everything else is cloned.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from isoray.models.adapters import trainable_parameters


class Snapshot:
    """The trainable parameters and the buffers of ``model`` as they are now.

    With ``folder``, the Transformers folder that ``model`` was loaded from, tensors equal to those in its safetensors
    files (same shape, dtype and bits) stay memory-mapped; the rest, and all without ``folder``, is cloned to where the
    model is. The files must not be overwritten in place while the snapshot lives (:func:`isoray.models.load.save`
    replaces them, which is safe). Sharded (DTensor) parameters are cloned shard by shard.
    """

    def __init__(self, model: nn.Module, folder: Path | None = None) -> None:
        self._saved: dict[str, Tensor] = {}
        self.cloned_bytes = 0
        """Memory of its own that the snapshot takes."""
        self.mapped_bytes = 0
        """Bytes that are read from the files."""
        self._files = _MappedTensors(folder, getattr(model, "base_model_prefix", "")) if folder is not None else None
        for name, tensor in _changing(model):
            mapped = self._files.like(name, tensor) if self._files is not None else None
            self._saved[name] = tensor.clone() if mapped is None else mapped
            if mapped is None:
                self.cloned_bytes += tensor.nbytes
            else:
                self.mapped_bytes += mapped.nbytes
        self._release()

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Copies the saved values into ``model`` in place and drops its gradients.

        ``model`` is the one the snapshot was taken of, or another with the same names and shapes; storage stays where
        it is, so optimizers, compiled graphs and DDP buckets that point to it stay valid.
        """
        now = dict(_changing(model))
        assert now.keys() == self._saved.keys(), "the model is not the one the snapshot was taken of"
        if now:
            torch._foreach_copy_(list(now.values()), list(self._saved.values()))
        for parameter in model.parameters():
            parameter.grad = None
        self._release()

    def _release(self) -> None:
        if self._files is not None:
            self._files.release()


class _MappedTensors:
    """Tensors of a folder's safetensors files, by name, without reading them into memory."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self._prefix = prefix + "."
        self._files = [_MappedFile(path) for path in sorted(folder.glob("*.safetensors"))]

    def like(self, name: str, tensor: Tensor) -> Tensor | None:
        """The stored tensor of that name (with or without the backbone's prefix) if it equals ``tensor``."""
        keys = (name, name.removeprefix(self._prefix), self._prefix + name)
        stored = next((file.tensor(key) for file in self._files for key in keys if key in file), None)
        if stored is None or stored.dtype != tensor.dtype or stored.shape != tensor.shape:
            return None
        return stored if torch.equal(stored, tensor.cpu()) else None

    def release(self) -> None:
        """Let go of the pages that were read; they are mapped anew when they are read again."""
        for file in self._files:
            file.release()


class _MappedFile:
    """A safetensors file: 8 bytes with the header's length, the header as JSON, the tensors' bytes."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # A private copy-on-write map, because PyTorch knows no read-only tensors; nothing writes to it.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        (length,) = struct.unpack_from("<Q", self._map)
        self._entries: dict[str, Any] = json.loads(self._map[8 : 8 + length])
        self._entries.pop("__metadata__", None)
        self._begin = 8 + length

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def tensor(self, key: str) -> Tensor | None:
        """The tensor of that name; None where it has no elements, a type not known here or an address off its grid."""
        entry = self._entries[key]
        dtype = _DTYPES.get(entry["dtype"])
        begin, end = (self._begin + offset for offset in entry["data_offsets"])
        if dtype is None or begin == end or begin % dtype.itemsize:
            return None
        flat = torch.frombuffer(self._map, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=begin)
        return flat.view(entry["shape"])

    def release(self) -> None:
        """Unmap the pages that were read, where the system can."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and local storage of what training may change; tied parameters once."""
    for name, parameter in trainable_parameters(model).items():
        yield name, _local(parameter.detach())
    for name, buffer in model.named_buffers():
        yield name, _local(buffer)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
