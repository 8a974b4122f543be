"""Where an exploration departs from the published code, in words, for results and report."""

from __future__ import annotations

from collections.abc import Iterator

from isoray.exploration.config import ExploreConfig, LearnConfig


def deviations(explore: ExploreConfig) -> Iterator[str]:
    """One line for each departure."""
    published = ExploreConfig()
    for name in ("texts", "explorers", "share_every", "alpha", "gamma", "prompt"):
        mine, theirs = getattr(explore, name), getattr(published, name)
        if mine != theirs:
            yield f"explore.{name}: {mine!r}; published: {theirs!r}."
    if explore.sampling != published.sampling:
        yield "explore.sampling: texts are drawn otherwise than published (255 new tokens, 4 beams, no end of text)."
    if explore.learn != LearnConfig():
        yield "explore.learn: the reference learns otherwise than published (AdamW, lr 5e-5, gradient clipped to 1)."
    if "ngram" in explore.methods:
        yield "explore.methods: `ngram` is a baseline of ours."
