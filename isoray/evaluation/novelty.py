"""How much of what was generated is novel, how many novel domains it shows, and whether later texts show new things.

Measures for novelty discovery by generation (Isonuma and Titov, ICLR 2025), whose exact definitions are not published;
these are ours. Texts are taken in the order in which they were generated, so each measure has a value after every text.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from isoray.evaluation.bootstrap import cluster_interval
from isoray.evaluation.classification import auc, weighted_auc
from isoray.evaluation.clusters import UNSPACED
from isoray.evaluation.diversity import NGRAMS

Floats = npt.NDArray[np.float64]
Domains = Sequence[str | None]
"""The domain of each text in the order of generation; None where it has none."""


def precision(domains_N: Domains, novel: Collection[str]) -> float:
    """Share of the texts that are of a novel domain; NaN of no texts."""
    return _last(precision_curve(domains_N, novel))


def precision_curve(domains_N: Domains, novel: Collection[str]) -> Floats:
    """float64 [N]: the precision of the first n texts, for n = 1 to N."""
    wanted = frozenset(novel)
    novel_N = np.array([domain in wanted for domain in domains_N], float)
    shares_N: Floats = np.cumsum(novel_N) / np.arange(1, len(novel_N) + 1)
    return shares_N


def coverage(domains_N: Domains, novel: Collection[str]) -> float:
    """Share of the novel domains of which there is a text: 0 of no texts, NaN where there is no novel domain."""
    found = first_hits(domains_N, novel)
    return sum(hit is not None for hit in found.values()) / len(found) if found else math.nan


def coverage_curve(domains_N: Domains, novel: Collection[str]) -> Floats:
    """float64 [N]: the coverage of the first n texts, for n = 1 to N; NaN where there is no novel domain."""
    found = first_hits(domains_N, novel)
    if not found:
        return np.full(len(domains_N), np.nan)
    new_N = np.zeros(len(domains_N))
    for hit in found.values():
        if hit is not None:
            new_N[hit - 1] += 1
    return np.cumsum(new_N) / len(found)


def hits(domains_N: Domains, novel: Collection[str]) -> dict[str, int]:
    """How many texts there are of each novel domain, in alphabetical order of the domains."""
    return {domain: sum(found == domain for found in domains_N) for domain in sorted(set(novel))}


def first_hits(domains_N: Domains, novel: Collection[str]) -> dict[str, int | None]:
    """Which text, counted from 1, was the first of each novel domain; None where there was none."""
    firsts: dict[str | None, int] = {}
    for number, domain in enumerate(domains_N, start=1):
        firsts.setdefault(domain, number)
    return {domain: firsts.get(domain) for domain in sorted(set(novel))}


@dataclass(frozen=True)
class Along:
    """Diversity along the order of generation; NaN where it is not defined."""

    distinct: dict[int, Floats]
    """Dist-n by n, float64 [N]: of the first 1 to N texts together. High is diverse."""
    self_bleu_N: Floats
    """float64: BLEU of each text against those before it, in [0, 1]; of the first, and of blank ones, NaN."""


def along(tokens_N: Sequence[Sequence[Hashable]], texts_N: Sequence[str], *, window: int | None = None) -> Along:
    """Diversity of the texts in the order of generation.

    Args:
        tokens_N: each text's words or token ids, which Dist-n counts. In scripts without spaces words would be whole
            sentences, so token ids are the fairer choice.
        texts_N: the same texts in characters, which self-BLEU compares.
        window: self-BLEU compares each text with so many texts before it; None: with all of them.
    """
    assert window is None or window >= 1, "a window of no texts"
    assert len(tokens_N) == len(texts_N), "one list of tokens per text"
    return Along(
        distinct={n: np.fromiter(_distinct(tokens_N, n), float, len(texts_N)) for n in NGRAMS},
        self_bleu_N=np.array([_bleu_before(texts_N, number, window) for number in range(len(texts_N))], float),
    )


class Auroc(NamedTuple):
    """Area under the ROC curve and its percentile interval; NaN where it is not defined."""

    auroc: float
    low: float
    high: float


def auroc(
    novel_N: Sequence[bool] | npt.NDArray[np.bool_],
    scores_N: Sequence[float] | Floats,
    clusters_N: Sequence[int] | None = None,
    *,
    seed: int,
    resamples: int = 2000,
) -> Auroc:
    """How often an example of a novel domain scores above a familiar one, ties counting half, and its 95 % interval.

    For the variant in which the examples of a corpus are ranked. ``clusters_N`` says which examples belong together and
    are drawn together, such as chunks of a document; without it each stands alone. NaN where there is but one class.
    """
    novel, scores = np.asarray(novel_N, bool), np.asarray(scores_N, np.float64)
    clusters = np.arange(len(scores)) if clusters_N is None else np.asarray(clusters_N, np.int64)
    assert novel.shape == scores.shape == clusters.shape, "one label, score and cluster per example"
    low, high = cluster_interval(weighted_auc(novel, scores), clusters, seed=seed, resamples=resamples)
    return Auroc(auc(novel, scores), low, high)


def _distinct(tokens_N: Sequence[Sequence[Hashable]], n: int) -> Iterator[float]:
    """:func:`isoray.evaluation.diversity.distinct` of the first 1 to N texts, without counting each anew."""
    grams: set[tuple[Hashable, ...]] = set()
    total = 0
    for tokens in tokens_N:
        grams.update(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        total += len(tokens)
        yield len(grams) / total if total else math.nan


def _bleu_before(texts_N: Sequence[str], number: int, window: int | None) -> float:
    """BLEU-4 of a text against those before it, by sacrebleu as in :func:`isoray.evaluation.diversity.self_bleu`.

    Ours: a text in a script without spaces is compared by characters; the tokenizer 13a would take its sentences for
    words.
    """
    from sacrebleu.metrics.bleu import BLEU

    text = texts_N[number]
    before = [other for other in texts_N[0 if window is None else max(0, number - window) : number] if other.strip()]
    if not text.strip() or not before:
        return math.nan
    tokenize = "char" if is_unspaced(text) else "13a"
    bleu = BLEU(smooth_method="exp", effective_order=True, tokenize=tokenize)
    return min(float(bleu.sentence_score(text, before).score) / 100, 1.0)


def is_unspaced(text: str) -> bool:
    """Whether most letters of ``text`` belong to scripts that put no spaces between words."""
    return 2 * len(UNSPACED.findall(text)) > sum(map(str.isalpha, text))


def _last(curve_N: Floats) -> float:
    return float(curve_N[-1]) if len(curve_N) else math.nan
