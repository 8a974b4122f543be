"""The arithmetic of UnTrac alone, in plain PyTorch: ``python untrac_floor.py SPEC.json`` (see :mod:`untrac`).

Seconds of one training step (forward, backward, optimizer) over the real examples, and of the forward passes of one
evaluation at the batch size that is fastest here. The head is computed at labelled positions only: less arithmetic
gives the same numbers nowhere. Tensors are ready beforehand, nothing is logged or checked.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM


def main() -> None:
    """Measure and write the seconds."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    steps = [batch_of([row], spec["pad"]) for row in spec["train"][: spec["steps"] + 3]]
    result = {"step_seconds": step_seconds(model, steps, spec["lr"])} | evaluation_seconds(model, spec)
    Path(spec["out"]).write_text(json.dumps(result))


def batch_of(rows: list[dict[str, list[int]]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Padded tokens, which positions have a label after them, and these labels."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [pad] * (width - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"][1:] + [-100] * (width - len(row["labels"]) + 1) for row in rows])
    keep = labels != -100
    return ids, keep, labels[keep]


def loss_of(model: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean over the labelled tokens."""
    ids, keep, targets = batch
    return F.cross_entropy(model.lm_head(model.model(input_ids=ids, use_cache=False)[0][keep]), targets)


def step_seconds(model: Any, batches: list[tuple[Tensor, Tensor, Tensor]], lr: float) -> float:
    """Mean seconds of a step; the first three warm up."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    begin = 0.0
    for number, batch in enumerate(batches):
        if number == 3:
            begin = time.perf_counter()
        (-loss_of(model, batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (time.perf_counter() - begin) / (len(batches) - 3)


def evaluation_seconds(model: Any, spec: dict[str, Any]) -> dict[str, float]:
    """Median seconds of the forward passes over the test set, at the fastest of some batch sizes."""
    rows = sorted(spec["test"], key=lambda row: -len(row["input_ids"]))
    model.eval()
    found: dict[int, float] = {}
    for size in spec["eval_batches"]:
        batches = [batch_of(rows[start : start + size], spec["pad"]) for start in range(0, len(rows), size)]

        def forward(batches: list[tuple[Tensor, Tensor, Tensor]] = batches) -> None:
            with torch.no_grad():
                for batch in batches:
                    loss_of(model, batch)

        found[size] = median_seconds(forward, spec["repeats"])
    best = min(found, key=found.__getitem__)
    return {"evaluation_seconds": found[best], "evaluation_batch": best}


def median_seconds(work: Callable[[], None], repeats: int) -> float:
    """Median of ``repeats`` runs after one to warm up."""
    work()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
