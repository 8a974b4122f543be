"""The weights a model started from, to go back to before each of many short trainings.

Weights that stand unchanged in the model's own safetensors files are read from there, memory-mapped: they cost page
cache, which all processes of a machine share, and no memory of their own. Everything else is cloned.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
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
        files = _MappedTensors(folder, getattr(model, "base_model_prefix", "")) if folder is not None else None
        for name, tensor in _changing(model):
            mapped = files.like(name, tensor) if files is not None else None
            self._saved[name] = tensor.clone() if mapped is None else mapped
            if mapped is None:
                self.cloned_bytes += tensor.nbytes
            else:
                self.mapped_bytes += mapped.nbytes

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


class _MappedTensors:
    """Tensors of a folder's safetensors files, by name, without reading them into memory."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self._prefix = prefix + "."
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file: Any = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                self._files[key] = file

    def like(self, name: str, tensor: Tensor) -> Tensor | None:
        """The stored tensor of that name (with or without the backbone's prefix) if it equals ``tensor``."""
        for key in (name, name.removeprefix(self._prefix), self._prefix + name):
            if key in self._files:
                stored: Tensor = self._files[key].get_tensor(key)
                same = stored.dtype == tensor.dtype and stored.shape == tensor.shape
                return stored if same and torch.equal(stored, tensor.cpu()) else None
        return None


def _changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and local storage of what training may change; tied parameters once."""
    for name, parameter in trainable_parameters(model).items():
        yield name, _local(parameter.detach())
    for name, buffer in model.named_buffers():
        yield name, _local(buffer)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
