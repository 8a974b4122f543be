"""What a run does otherwise than the paper, for its report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from isoray.attribution.config import SampleConfig, TruthConfig, UnTracConfig, UnTracInvConfig
from isoray.config.base import Config

PAPER_SEEDS = 4
BOOKKEEPING = frozenset({"evaluate_every", "log_every", "checkpoint_every", "keep_checkpoints"})
"""Settings that change what is seen of a training, not the training."""


def deviations(
    *,
    untrac: UnTracConfig | None,
    untrac_inv: UnTracInvConfig | None,
    truth: TruthConfig | None,
    sample: SampleConfig,
) -> Iterator[dict[str, Any]]:
    """Rows ``{option, value, paper}`` of table ``deviations``; the defaults of the settings are the paper's."""
    for name, ours, paper in (
        ("untrac", untrac, UnTracConfig()),
        ("untrac_inv", untrac_inv, UnTracInvConfig()),
        ("truth", truth, TruthConfig()),
    ):
        for key in () if ours is None else sorted(type(ours).model_fields.keys() - BOOKKEEPING):
            value, published = getattr(ours, key), getattr(paper, key)
            if value != published:
                yield {"option": f"{name}.{key}", "value": _short(value), "paper": _short(published)}
    if sample.seeds != PAPER_SEEDS:
        yield {"option": "sample.seeds", "value": sample.seeds, "paper": PAPER_SEEDS}
    if truth is not None:
        yield {
            "option": "leave-one-out batches",
            "value": "those of the full training, with the blocks of the excluded corpus replaced: less noise",
            "paper": "drawn anew",
        }


def _short(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.model_dump().items()) if isinstance(value, Config) else str(value)
