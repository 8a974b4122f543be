"""Texts in groups for people to read: clusters of like vectors, and the words that set each apart."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from isoray.errors import NumericError
from isoray.evaluation.words import CJK

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Word = tuple[str, float]
"""A word and its contrast, or its score."""
COMPONENTS = 50
"""Vectors of more dimensions are reduced to so many."""
STARTS = 10
"""So often k-means starts afresh; the tightest clustering stays."""
REFERENCES = 20
"""So many sets of vectors without clusters are drawn. One set in 21 without clusters is above all of them by chance."""
UNSPACED = re.compile(rf"[{CJK}\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
"""Characters of scripts that put no spaces between words: Kana, Han, Thai, Lao, Burmese, Khmer."""


@dataclass(frozen=True)
class Clusters:
    """Which texts belong together; the largest cluster is number 0."""

    assignment_N: Ints
    """int64: of each vector, its cluster's number."""
    members: tuple[tuple[int, ...], ...]
    """Of each cluster its vectors' numbers, those nearest to its centre first."""
    silhouette: float
    """Mean silhouette (Rousseeuw, 1987) by cosine distance, in [-1, 1]; NaN where there is but one cluster."""

    @property
    def count(self) -> int:
        """How many clusters there are."""
        return len(self.members)


def cluster(vectors_ND: npt.NDArray[np.floating], *, most: int, seed: int) -> Clusters:
    """The clusters of ``vectors_ND`` (float [N, D]), at most ``most``, by k-means on vectors of length 1.

    More than 50 dimensions are reduced to the 50 largest singular directions first. The number of clusters is the one
    with the largest mean silhouette (cosine). There is no silhouette for one cluster, so (ours, after SigClust, Liu et
    al., 2008) the vectors are one cluster unless theirs is above those of 20 sets of vectors that are drawn from a
    single normal distribution of the same mean and covariance, and cut into as many clusters.

    A function of ``seed`` and the order of the vectors; clusters that stand clearly apart do not hang on either. Raises
    NumericError for vectors that are not finite.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    assert vectors_ND.ndim == 2 and most >= 1, "vectors [N, D], and at least one cluster"
    given_ND = np.asarray(vectors_ND, np.float64)
    if len(bad := np.flatnonzero(~np.isfinite(given_ND).all(axis=1))):
        raise NumericError(
            f"{len(bad)} of {len(given_ND)} vectors to be clustered are not finite, the first is number {bad[0]}. "
            "The model that gave them may be damaged, or its numbers too large for its dtype."
        )
    rows_ND = _reduced(_unit(given_ND))

    def divide(rows_ND: Floats, count: int) -> tuple[float, Ints]:
        found_N = KMeans(count, n_init=STARTS, random_state=seed % 2**32).fit_predict(rows_ND).astype(np.int64)
        if len(np.unique(found_N)) < 2:
            return -math.inf, found_N
        return float(silhouette_score(rows_ND, found_N, metric="cosine")), found_N

    different = len(np.unique(rows_ND.round(9), axis=0))
    tried = [divide(rows_ND, count) for count in range(2, min(most, different, len(rows_ND) - 1) + 1)]
    best, assignment_N = max(tried, key=lambda pair: pair[0], default=(-math.inf, np.zeros(0, np.int64)))
    random = np.random.Generator(np.random.Philox(seed))
    count = len(np.unique(assignment_N))
    if not tried or any(divide(_reference(rows_ND, random), count)[0] >= best for _ in range(REFERENCES)):
        best, assignment_N = math.nan, np.zeros(len(rows_ND), np.int64)
    return _ordered(rows_ND, assignment_N, best)


def contrastive_words(
    texts_words: Sequence[Sequence[Word]], assignment_N: Sequence[int] | Ints, *, top: int
) -> list[list[Word]]:
    """Of each cluster the ``top`` words that best set it apart, with their scores, the highest first.

    Ours: the score of a word is the sum of its positive contrasts in the cluster's texts, times ``1 - e / c``, where c
    is the share of the cluster's texts that hold it and e that of all other texts; words for which that is not positive
    are left out. So are marks of a single character, pieces of broken characters and, where a cluster has several
    texts, words that only one of them holds, unless there is no other word.

    Args:
        texts_words: of each text its words in order, each with its contrast, such as :func:`words_of` gives.
        assignment_N: of each text its cluster's number; numbers count from 0.
    """
    clusters_N = [int(number) for number in assignment_N]
    assert len(clusters_N) == len(texts_words), "one cluster per text"
    sizes = Counter(clusters_N)
    holds: defaultdict[int, Counter[str]] = defaultdict(Counter)
    gains: defaultdict[int, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for words, number in zip(texts_words, clusters_N, strict=True):
        holds[number].update({word for word, _ in words})
        for word, contrast in words:
            gains[number][word] += max(0.0, contrast)
    everywhere = sum(holds.values(), Counter[str]())
    found: list[list[Word]] = []
    for number in range(max(sizes, default=-1) + 1):
        others = len(clusters_N) - sizes[number]
        scored = []
        for word, gain in gains[number].items():
            here = holds[number][word]
            elsewhere = (everywhere[word] - here) / others if others else 0.0
            score = gain * (1 - elsewhere * sizes[number] / here)
            if score > 0 and _is_word(word):
                scored.append((word, score))
        common = [(word, score) for word, score in scored if sizes[number] == 1 or holds[number][word] > 1]
        found.append(sorted(common or scored, key=lambda pair: (-pair[1], pair[0]))[:top])
    return found


def words_of(pieces_T: Sequence[str], contrast_T: Sequence[float] | Floats) -> list[Word]:
    """The words that the tokens of a text make up, in order, each with the sum of its tokens' contrasts.

    A word begins at white space; punctuation tokens at its ends are words of their own, and so is each token in a
    script without spaces. A token of several words shares its contrast equally among them; that of white space alone
    is nobody's.

    Args:
        pieces_T: the tokens, decoded one by one, with their white space.
        contrast_T: the contrast of each token.
    """
    words: list[Word] = []
    open_word: list[Word] = []

    def finish() -> None:
        words.extend(_joined(open_word))
        open_word.clear()

    for piece, contrast in zip(pieces_T, contrast_T, strict=True):
        parts = piece.split()
        if piece[:1].isspace():
            finish()
        for place, part in enumerate(parts):
            share = float(contrast) / len(parts)
            if place:
                finish()
            if UNSPACED.search(part):
                finish()
                words.append((part, share))
            else:
                open_word.append((part, share))
        if piece[-1:].isspace():
            finish()
    finish()
    return words


def _unit(rows_ND: Floats) -> Floats:
    """Rows of length 1; rows of nothing but zeros stay."""
    norms_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    unit_ND: Floats = rows_ND / np.where(norms_N1 > 0, norms_N1, 1.0)
    return unit_ND


def _reduced(rows_ND: Floats) -> Floats:
    if rows_ND.shape[1] <= COMPONENTS:
        return rows_ND
    _, _, directions = np.linalg.svd(rows_ND, full_matrices=False)
    return _unit(rows_ND @ directions[:COMPONENTS].T)


def _reference(rows_ND: Floats, random: np.random.Generator) -> Floats:
    """As many vectors from one normal distribution with the mean and covariance of ``rows_ND``."""
    mean_D = rows_ND.mean(axis=0)
    _, scales, directions = np.linalg.svd(rows_ND - mean_D, full_matrices=False)
    drawn = random.standard_normal((len(rows_ND), len(scales))) * scales / math.sqrt(len(rows_ND) - 1)
    return _unit(mean_D + drawn @ directions)


def _ordered(rows_ND: Floats, assignment_N: Ints, silhouette: float) -> Clusters:
    """Clusters numbered by size, then by their first member; members by their cosine with the cluster's mean."""
    groups = [np.flatnonzero(assignment_N == number) for number in np.unique(assignment_N)]
    groups.sort(key=lambda group: (-len(group), int(group[0])))
    numbers_N = np.zeros(len(assignment_N), np.int64)
    members = []
    for number, group in enumerate(groups):
        numbers_N[group] = number
        near = rows_ND[group] @ rows_ND[group].mean(axis=0)
        members.append(tuple(group[np.argsort(-near, kind="stable")].tolist()))
    return Clusters(numbers_N, tuple(members), silhouette)


def _joined(pieces: Sequence[Word]) -> list[Word]:
    """One word of ``pieces``, but for the marks at its ends."""
    inner = [place for place, (piece, _) in enumerate(pieces) if not _is_mark(piece)]
    if not inner:
        return list(pieces)
    first, last = inner[0], inner[-1] + 1
    word = "".join(piece for piece, _ in pieces[first:last])
    return [*pieces[:first], (word, sum(contrast for _, contrast in pieces[first:last])), *pieces[last:]]


def _is_mark(piece: str) -> bool:
    """Whether there is nothing but punctuation and symbols in ``piece``; an underscore belongs to words."""
    return all(unicodedata.category(character)[0] in "PS" and character != "_" for character in piece)


def _is_word(word: str) -> bool:
    return "\ufffd" not in word and not (len(word) <= 1 and _is_mark(word))
