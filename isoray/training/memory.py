"""Memory of this process and its device: how much it was at most, and how the C library hands it out."""

from __future__ import annotations

import ctypes
import functools
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from isoray.models.config import LoadOptions
from isoray.models.folders import parameter_count
from isoray.models.load import base_of, read_config


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB since the process started: allocated on the GPU, or resident for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


BYTES_PER_PARAMETER = 20
"""fp32 weights, gradients, two moments of Adam and a copy to go back to."""
LIBRARIES_BYTES = 2**30
"""What a worker's process holds before it has a model."""


def worker_bytes(folder: Path, options: LoadOptions, tokens: int) -> int:
    """About what a CPU worker holds that trains the model in ``folder`` on ``tokens`` tokens a pass, in bytes.

    To plan with, not a bound. The activations are those of a transformer in fp32 that keeps all it computes: some ten
    vectors of the hidden size and four of the feed-forward size per token and layer, and the logits twice.
    """
    folder = base_of(folder)
    config: Any = read_config(folder, options).get_text_config()
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    activations = tokens * (4 * layers * (10 * hidden + 4 * inner) + 8 * int(config.vocab_size))
    return LIBRARIES_BYTES + BYTES_PER_PARAMETER * parameter_count(folder) + activations


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
"""Options of glibc's ``mallopt``, from ``malloc.h``."""


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep what PyTorch frees for the next time, instead of giving it back to the system.

    A training step frees and takes gradients and activations anew. glibc maps large blocks afresh each time and gives
    them back; the system then has to clear and map every page again, which costs a good part of a step. Without effect
    where the C library is another one. glibc serves blocks above 64 MB outside the main thread in this way only if
    ``MALLOC_ARENA_MAX=1`` is in the environment when the process starts.
    """
    if (library := _glibc()) is not None:
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)
        library.mallopt(_M_TOP_PAD, 64 * 2**20)


def give_freed_memory_back() -> None:
    """Give the system what :func:`keep_freed_memory` kept; between two jobs, whose blocks do not fit the same gaps."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    library = ctypes.CDLL(None)
    return library if sys.platform == "linux" and hasattr(library, "gnu_get_libc_version") else None
