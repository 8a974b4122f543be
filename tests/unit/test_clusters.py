"""Clusters: found where there are some, one where there are none; their words are those that set them apart."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pytest

from isoray.errors import NumericError
from isoray.evaluation.clusters import cluster, contrastive_words, words_of


def blobs(
    sizes: Sequence[int], dimensions: int, *, seed: int = 0, spread: float = 0.3
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors about as many centres, shuffled, and which centre each is from."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(len(sizes), dimensions))
    origin = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return centres[origin] + spread * random.normal(size=(len(origin), dimensions)), origin


def partition(assignment: Sequence[int] | np.ndarray) -> set[frozenset[int]]:
    numbers = np.asarray(assignment)
    return {frozenset(np.flatnonzero(numbers == number).tolist()) for number in np.unique(numbers)}


def slow_silhouette(vectors: np.ndarray, assignment: np.ndarray) -> float:
    """Rousseeuw's, by cosine distance, vector by vector."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    values = []
    for row, own in enumerate(assignment):
        far = {
            number: np.mean([1 - unit[row] @ unit[o] for o in np.flatnonzero(assignment == number) if o != row])
            for number in np.unique(assignment)
        }
        inside, outside = far.pop(own), min(far.values())
        values.append((outside - inside) / max(inside, outside))
    return float(np.mean(values))


@pytest.mark.parametrize(("sizes", "dimensions"), [((12, 8), 20), ((20, 15, 10, 5), 40), ((20, 30, 10), 400)])
def test_clusters_are_found(sizes: Sequence[int], dimensions: int) -> None:
    vectors, origin = blobs(sizes, dimensions)
    found = cluster(vectors, most=8, seed=0)
    assert found.count == len(sizes) and partition(found.assignment_N) == partition(origin)
    assert [len(members) for members in found.members] == sorted(sizes, reverse=True), "the largest is number 0"
    for number, members in enumerate(found.members):
        assert sorted(members) == np.flatnonzero(found.assignment_N == number).tolist()
        unit = vectors[list(members)] / np.linalg.norm(vectors[list(members)], axis=1, keepdims=True)
        if dimensions <= 50:
            assert (np.diff(unit @ unit.mean(0)) <= 1e-12).all(), "the most central first"
            assert found.silhouette == pytest.approx(slow_silhouette(vectors, found.assignment_N))
    assert found.assignment_N.dtype == np.int64


def test_the_same_seed_gives_the_same_and_the_order_of_rows_no_others() -> None:
    vectors, _ = blobs((15, 12, 9), 30)
    one, again, other = (cluster(vectors, most=6, seed=seed) for seed in (3, 3, 4))
    assert one.members == again.members and one.silhouette == again.silhouette
    order = np.random.default_rng(0).permutation(len(vectors))
    turned = cluster(vectors[order], most=6, seed=3)
    assert partition(other.assignment_N) == partition(one.assignment_N)
    assert {frozenset(order[list(group)].tolist()) for group in turned.members} == partition(one.assignment_N)
    longer = vectors * np.random.default_rng(1).uniform(0.1, 10, (len(vectors), 1))
    assert cluster(longer, most=6, seed=3).members == one.members, "the length of a vector does not matter"


def test_no_clusters_are_one() -> None:
    random = np.random.default_rng(0)
    counts = []
    for seed in range(12):
        vectors = random.normal(size=(40, 30)) * random.uniform(0.2, 3, 30) + 2 * (seed % 2)
        found = cluster(vectors, most=6, seed=seed)
        counts.append(found.count)
        if found.count == 1:
            assert math.isnan(found.silhouette) and sorted(found.members[0]) == list(range(40))
    assert counts.count(1) >= 10


def test_small_and_odd_sets() -> None:
    vectors, _ = blobs((6, 6), 10)
    assert cluster(vectors, most=1, seed=0).count == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cluster(np.ones((9, 4)), most=5, seed=0).members == (tuple(range(9)),), "all alike"
        assert cluster(np.zeros((5, 4)), most=5, seed=0).count == 1
        for count in (1, 2):
            assert cluster(vectors[:count], most=5, seed=0).members == (tuple(range(count)),)
        none = cluster(np.zeros((0, 4)), most=5, seed=0)
        assert none.count == 0 and none.assignment_N.shape == (0,)
        twice = np.repeat(np.eye(3), [5, 4, 3], axis=0)
        assert cluster(twice, most=6, seed=0).members == (tuple(range(5)), tuple(range(5, 9)), tuple(range(9, 12)))
    half = vectors.astype(np.float16)
    assert partition(cluster(half, most=5, seed=0).assignment_N) == partition(
        cluster(vectors, most=5, seed=0).assignment_N
    )
    for bad in (math.nan, math.inf):
        vectors[3, 2] = bad
        with pytest.raises(NumericError, match=r"1 of 12 vectors .* the first is number 3"):
            cluster(vectors, most=5, seed=0)


def test_words_set_a_cluster_apart() -> None:
    texts = [
        [("the", 0.5), ("court", 2.0), ("judge", 1.0), (",", 9.0)],
        [("the", 0.5), ("court", 1.0), ("judge", -3.0), ("once", 8.0)],
        [("the", 0.5), ("flour", 1.0), ("court", 1.0), ("caf\ufffd", 9.0)],
        [("the", 0.5), ("flour", 1.5), (",", 9.0), ("caf\ufffd", 9.0)],
    ]
    law, kitchen = contrastive_words(texts, [0, 0, 1, 1], top=5)
    assert law == [("court", pytest.approx(3.0 * (1 - 0.5 / 1))), ("judge", pytest.approx(1.0))]
    assert kitchen == [("flour", pytest.approx(2.5))]
    assert contrastive_words(texts, [0, 0, 1, 1], top=1)[0] == law[:1]
    assert contrastive_words([], [], top=3) == []


def test_words_of_one_text_are_shown_only_where_nothing_else_is() -> None:
    texts = [[("alpha", 1.0), ("the", 1.0)], [("beta", 2.0), ("the", 1.0)], [("gamma", 3.0), ("the", 1.0)]]
    pair, single = contrastive_words(texts, np.array([0, 0, 1]), top=5)
    assert pair == [("beta", 2.0), ("alpha", 1.0)], "`the` sets nothing apart"
    assert single == [("gamma", 3.0)]
    assert contrastive_words(texts, [0, 0, 0], top=5) == [[("the", 3.0)]]
    assert contrastive_words(texts, [2, 2, 2], top=5) == [[], [], [("the", 3.0)]]


def test_tokens_make_words() -> None:
    pieces = ["Hel", "lo", ",", " wor", "ld", "!", "\n\n", "don", "'", "t", " (", "so", ")", " 1", ".", "5"]
    found = words_of(pieces, np.arange(len(pieces), dtype=float))
    assert found == [
        ("Hello", 1.0),
        (",", 2.0),
        ("world", 7.0),
        ("!", 5.0),
        ("don't", 7.0 + 8.0 + 9.0),
        ("(", 10.0),
        ("so", 11.0),
        (")", 12.0),
        ("1.5", 13.0 + 14.0 + 15.0),
    ]
    assert words_of([], []) == []
    assert words_of([" ", "", "\n"], [1.0, 2.0, 3.0]) == []
    assert words_of(["of the", " end ", "ing"], [4.0, 1.0, 1.0]) == [
        ("of", 2.0),
        ("the", 2.0),
        ("end", 1.0),
        ("ing", 1.0),
    ]
    assert words_of(["__", "init", "__"], [1.0, 1.0, 1.0]) == [("__init__", 3.0)]
    assert words_of([" !", "?"], [1.0, 2.0]) == [("!", 1.0), ("?", 2.0)]
    with pytest.raises(ValueError, match="zip"):
        words_of(["a"], [])


def test_scripts_without_spaces_are_taken_token_by_token() -> None:
    assert words_of(["吾輩", "は", "猫", "。", "AI", "です"], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == [
        ("吾輩", 1.0),
        ("は", 2.0),
        ("猫", 3.0),
        ("。", 4.0),
        ("AI", 5.0),
        ("です", 6.0),
    ]
    assert words_of(["สวัส", "ดี"], [1.0, 2.0]) == [("สวัส", 1.0), ("ดี", 2.0)]
    assert words_of(["नमस्", "ते", " जी"], [1.0, 2.0, 3.0]) == [("नमस्ते", 3.0), ("जी", 3.0)], "vowel signs belong to words"


def test_the_words_of_a_text_keep_its_contrast() -> None:
    random = np.random.default_rng(0)
    pieces = [["a", " b", "c ", ".", "猫", " d e", "'"][place] for place in random.integers(0, 7, 200)]
    contrasts = random.normal(size=200)
    assert sum(contrast for _, contrast in words_of(pieces, contrasts)) == pytest.approx(contrasts.sum())
