"""Measures of novelty: hand-computed, against slow references, and at their ends."""

from __future__ import annotations

import math

import numpy as np
import pytest

from isoray.evaluation.classification import auc
from isoray.evaluation.diversity import distinct, self_bleu
from isoray.evaluation.novelty import (
    along,
    auroc,
    coverage,
    coverage_curve,
    first_hits,
    hits,
    is_unspaced,
    precision,
    precision_curve,
)

DOMAINS = ["de", None, "en", "ja", "de", "en"]
NOVEL = {"ja", "de", "fr"}


def test_known_values() -> None:
    assert precision(DOMAINS, NOVEL) == 3 / 6
    assert precision_curve(DOMAINS, NOVEL).tolist() == [1, 1 / 2, 1 / 3, 2 / 4, 3 / 5, 3 / 6]
    assert coverage(DOMAINS, NOVEL) == 2 / 3
    assert coverage_curve(DOMAINS, NOVEL).tolist() == [1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3]
    assert hits(DOMAINS, NOVEL) == {"de": 2, "fr": 0, "ja": 1}
    assert first_hits(DOMAINS, NOVEL) == {"de": 1, "fr": None, "ja": 4}
    assert list(hits(DOMAINS, ["ja", "de", "ja"])) == ["de", "ja"], "each domain once, in alphabetical order"


def test_the_ends() -> None:
    assert math.isnan(precision([], NOVEL)) and coverage([], NOVEL) == 0
    assert precision_curve([], NOVEL).shape == coverage_curve([], NOVEL).shape == (0,)
    assert precision(DOMAINS, set()) == 0 and math.isnan(coverage(DOMAINS, set()))
    assert np.isnan(coverage_curve(DOMAINS, set())).all() and len(coverage_curve(DOMAINS, set())) == 6
    assert hits(DOMAINS, set()) == first_hits(DOMAINS, set()) == {}
    assert precision([None, None], NOVEL) == coverage([None, None], NOVEL) == 0
    assert precision(["de", "fr", "ja"], NOVEL) == coverage(["de", "fr", "ja"], NOVEL) == 1


def test_curves_are_the_values_of_the_first_texts() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        domains = [[None, "a", "b", "c", "d"][place] for place in random.integers(0, 5, 30)]
        novel = {"a", "b", "c", "never"}
        shares, covered = precision_curve(domains, novel), coverage_curve(domains, novel)
        assert shares.dtype == covered.dtype == np.float64
        for n in range(1, 31):
            first = domains[:n]
            assert (
                shares[n - 1] == pytest.approx(sum(domain in novel for domain in first) / n) == precision(first, novel)
            )
            assert covered[n - 1] == pytest.approx(len(novel & set(first)) / 4) == coverage(first, novel)
        assert (np.diff(covered) >= 0).all()


def texts_of(count: int) -> list[str]:
    random = np.random.default_rng(1)
    return [" ".join(random.choice("a b c d e f g h".split(), random.integers(0, 12))) for _ in range(count)]


def test_diversity_along_is_that_of_the_first_texts() -> None:
    texts = texts_of(25)
    tokens = [text.split() for text in texts]
    found = along(tokens, texts)
    assert sorted(found.distinct) == [1, 2, 3]
    for n, values_N in found.distinct.items():
        want = [distinct(tokens[:number], n) for number in range(1, 26)]
        np.testing.assert_allclose(values_N, want)
    ids = [["abcdefgh".index(word) for word in words] for words in tokens]
    np.testing.assert_array_equal(along(ids, texts).distinct[2], found.distinct[2])


def test_self_bleu_compares_with_the_texts_before() -> None:
    from sacrebleu import sentence_bleu

    texts = ["the cat sat on the mat", "", "a dog sat on the mat", "the cat sat on the mat", "birds sing in tall trees"]
    tokens = [text.split() for text in texts]
    whole, last = along(tokens, texts).self_bleu_N, along(tokens, texts, window=1).self_bleu_N
    assert np.isnan(whole[:2]).all(), "nothing before it, nothing in it"
    want = sentence_bleu(texts[2], [texts[0]], use_effective_order=True).score / 100
    assert whole[2] == pytest.approx(want) and 0 < want < 1
    assert whole[3] == pytest.approx(1) and last[3] < 0.7
    assert whole[4] == last[4] == 0
    assert math.isnan(last[2]), "the only text in its window is blank"
    np.testing.assert_array_equal(along(tokens, texts, window=4).self_bleu_N, whole)
    pair = along(tokens[2:4], texts[2:4]).self_bleu_N[1], along(tokens[3:1:-1], texts[3:1:-1]).self_bleu_N[1]
    assert sum(pair) / 2 == pytest.approx(self_bleu(texts[2:4]))


def test_texts_without_spaces_are_compared_by_characters() -> None:
    japanese = [
        "吾輩は猫である。名前はまだ無い。どこで生れたか",
        "吾輩は犬である。名前はまだ無い。どこで生れたか",
        "昨夜遅くに雨が降った。",
    ]
    found = along([list(text) for text in japanese], japanese).self_bleu_N
    assert 0.5 < found[1] < 1, "one character differs"
    assert found[2] < 0.1
    assert all(is_unspaced(text) for text in [*japanese, "猫", "สวัสดีครับ"])
    for text in (
        "",
        "a few words",
        "Donaudampfschifffahrt und Rindfleischetikettierung",
        "x = f(y)\n",
        "Er sagte 猫 zu ihr",
    ):
        assert not is_unspaced(text)


def test_the_ends_of_diversity_along() -> None:
    empty = along([], [])
    assert empty.self_bleu_N.shape == empty.distinct[1].shape == (0,)
    blank = along([[], ["a"]], ["", "a"])
    np.testing.assert_array_equal(blank.distinct[1], [math.nan, 1])
    assert np.isnan(blank.self_bleu_N).all()


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    random = np.random.default_rng(2)
    novel = random.random(60) < 0.3
    scores = np.round(random.normal(size=60) + novel, 1)
    pairs = [(a > b) + (a == b) / 2 for a in scores[novel] for b in scores[~novel]]
    found = auroc(novel, scores, seed=0)
    assert found.auroc == pytest.approx(np.mean(pairs)) == auc(novel, scores)
    assert found.low < found.auroc < found.high
    assert found == auroc(novel, scores, seed=0) != auroc(novel, scores, seed=1)
    pairs_of_rows = auroc(np.repeat(novel, 2), np.repeat(scores, 2), np.repeat(np.arange(60), 2), seed=0)
    assert pairs_of_rows == pytest.approx(found), "a row that stands twice tells no more than once"
    assert all(math.isnan(value) for value in auroc([True, True], [0.1, 0.2], seed=0))
    assert found._fields == ("auroc", "low", "high")
