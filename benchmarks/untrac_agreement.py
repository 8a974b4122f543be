"""Whether isoray unlearns as the plain way does, apart from rounding: ``python untrac_agreement.py SPEC.json``.

The first steps of one set, once by the loop of isoray and once by Transformers' model and PyTorch's Adam, in float64
and in float32. Gradients that rounding alone keeps from being zero are as large a step for Adam as any others, so in
float32 some weights go the other way from the first step on, and ascent widens the difference. In float64 they agree.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from texts import Texts
from torch import nn
from transformers import AutoModelForCausalLM

from isoray.corpora.store import Block
from isoray.corpora.stream import BlockStream
from isoray.objectives.gradient_ascent import GradientAscent
from isoray.training.config import TrainingConfig
from isoray.training.loop import train
from isoray.training.optim import AdamConfig
from isoray.training.parallel import Parallel


def main() -> None:
    """Both ways in both types; writes the largest difference of a weight matrix, relative to how far it moved."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    found = {str(dtype).removeprefix("torch."): difference(spec, dtype) for dtype in (torch.float64, torch.float32)}
    Path(spec["out"]).write_text(json.dumps({"steps": len(spec["train"]), **found}))


def difference(spec: dict[str, Any], dtype: torch.dtype) -> float:
    """The largest, over the weights, of |ours - theirs| / |ours - start|."""
    start, ours, theirs = (AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype) for _ in range(3))
    by_isoray(ours, spec)
    by_hand(theirs, spec)
    weights = zip(start.parameters(), ours.parameters(), theirs.parameters(), strict=True)
    with torch.no_grad():
        return max(float((one - other).norm() / (one - before).norm()) for before, one, other in weights)


def by_isoray(model: nn.Module, spec: dict[str, Any]) -> None:
    """Gradient ascent by the loop, a row a step."""
    rows = [(np.array(row["input_ids"], np.int32), np.array(row["labels"], np.int32)) for row in spec["train"]]
    texts = Texts("set", [Block(ids, labels, np.zeros(len(ids), np.int32)) for ids, labels in rows])
    stream = BlockStream([texts], batch_size=1, seed=0, shuffle=False)
    config = TrainingConfig(steps=len(rows), batch_size=1, optimizer=AdamConfig(lr=spec["lr"]))
    ascent = GradientAscent(GradientAscent.Config(average="example"))
    list(train(Parallel(model), ascent, {"train": stream}, config, seed=0, pad_token_id=spec["pad"]))


def by_hand(model: nn.Module, spec: dict[str, Any]) -> None:
    """The same as anyone would write it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=spec["lr"])
    model.train()
    for row in spec["train"]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        (-F.cross_entropy(logits[:-1], labels[1:])).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
