"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., object]:
    """Makes a 2-layer Llama with 97 tokens; the same weights for the same seed. Picklable."""
    from tiny import make_llama

    return make_llama


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets: ISORAY_DATA, else ../shared/data."""
    root = Path(os.environ.get("ISORAY_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"no real data at {root}; set ISORAY_DATA to the folder that holds corpora/ and untrac_synthetic/")
    return root
