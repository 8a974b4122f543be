"""N-gram likelihood ratios: which of a model's texts are least like another model's, by counts alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

Text = Sequence[Hashable]
Gram = tuple[Hashable, ...]


class Counts:
    """How often each n-gram of up to ``n`` units occurs, and how often something follows its beginning."""

    def __init__(self, texts: Sequence[Text], n: int) -> None:
        self._n = n
        self._grams, self._contexts = Counter[Gram](), Counter[Gram]()
        for text in texts:
            self.add(text, 1)

    def add(self, text: Text, times: int) -> None:
        """Count ``text`` so many times more; -1 takes it out again."""
        for end in range(1, len(text) + 1):
            for order in range(1, min(self._n, end) + 1):
                gram = tuple(text[end - order : end])
                self._grams[gram] += times
                self._contexts[gram[:-1]] += times

    def log_probability(self, text: Text, vocabulary: int) -> float:
        """Mean log-probability (nats) of the units of ``text``, of ``vocabulary`` possible ones."""
        return sum(math.log(self._probability(text[:end], vocabulary)) for end in range(1, len(text) + 1)) / len(text)

    def _probability(self, text: Text, vocabulary: int) -> float:
        """Of the last unit, given those before it: interpolated over the orders (Jelinek and Mercer, 1980), each
        weighed by seen / (seen + 1) of its context (ours); below the unigrams every unit is alike."""
        probability = 1.0 / vocabulary
        for order in range(1, min(self._n, len(text)) + 1):
            gram = tuple(text[len(text) - order :])
            seen = self._contexts[gram[:-1]]
            if not seen:
                break
            probability = (self._grams[gram] + probability) / (seen + 1)
        return probability


def rank(own: Sequence[Text], other: Sequence[Text], *, n: int) -> list[int]:
    """The places of ``own`` texts, those first that n-grams of all other ``own`` texts explain best against those of
    ``other``: by the difference of the mean log-probabilities. No text helps to explain itself."""
    vocabulary = len({unit for text in (*own, *other) for unit in text})
    mine, theirs = Counts(own, n), Counts(other, n)
    scores = []
    for text in own:
        mine.add(text, -1)
        scores.append(mine.log_probability(text, vocabulary) - theirs.log_probability(text, vocabulary))
        mine.add(text, 1)
    return sorted(range(len(own)), key=lambda place: -scores[place])
