"""The benchmarks run, and what they compare does agree. Their times are not looked at: other programs run too."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_train_step() -> None:
    shown = run("train_step.py")
    assert shown.count("the same bits") == 2
    rates = re.findall(r"^(trainer|sorted|packed) +([\d,]+) labelled tokens/s", shown, re.MULTILINE)
    assert [name for name, _ in rates] == ["trainer", "sorted", "packed"]
    assert all(int(rate.replace(",", "")) > 0 for _, rate in rates)


@pytest.mark.timeout(600)
def test_untrac() -> None:
    shown = run("untrac.py")
    assert re.search(r"isoray is [\d.]+ times as fast as trainer-cores", shown)
    assert "(rounding)" in shown
    assert re.search(r"^floor +[\d.]+ ", shown, re.MULTILINE)


@pytest.mark.timeout(600)
def test_contrast() -> None:
    shown = run("contrast.py")
    rates = re.findall(r"^(\S+) +([\d.]+) tokens/s", shown, re.MULTILINE)
    assert [name for name, _ in rates][:2] == ["transformers", "isoray"]
    assert all(float(rate) > 0 for _, rate in rates)
    assert "isoray: 16 of 16 texts equal those of transformers" in shown


@pytest.mark.timeout(600)
def test_tune() -> None:
    shown = run("tune.py")
    for side in ("isoray", "isoray, a process each", "raw"):
        assert re.search(rf"^{re.escape(side)} +[\d.]+", shown, re.MULTILINE), f"{side} is not shown"


@pytest.mark.timeout(600)
def test_cge() -> None:
    shown = run("cge.py")
    rates = re.findall(r"^(\S+) +([\d.]+) texts a minute", shown, re.MULTILINE)
    assert len(rates) == 5 and all(float(rate) > 0 for _, rate in rates)
    assert re.search(r"isoray-iterative is [\d.]+ times as fast as transformers-iterative", shown)
