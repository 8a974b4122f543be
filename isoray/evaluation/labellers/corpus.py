"""Corpus: which of several corpora a text resembles most, by a classifier that is trained on them when it is built."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt, StringConstraints, model_validator

from isoray.config.base import ExistingPath, hung_on
from isoray.errors import DataError, UserError
from isoray.evaluation.labellers.base import UNKNOWN, Label, Labeller
from isoray.evaluation.scorers.base import absolute_path
from isoray.generation.prompts import TablePrompts, inputs_of, read_prompts

CorpusName = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")]
LENGTHS = (1, 2, 4)
"""The classifier learns from passages of `chars` characters, of a half and of a quarter of that."""
HELD_OUT = 0.2
"""Share of each corpus's rows on which the classifier is tested."""
NGRAMS = (1, 4)
"""Shortest and longest sequence of characters that is a feature."""
MAX_FEATURES = 100_000
INVERSE_PENALTY = 100.0
"""scikit-learn's C. Rows of TF-IDF have length 1, so its default of 1 leaves probabilities near uniform."""


class CorpusTable(TablePrompts):
    """A table of texts of one domain."""

    column: str = "text"
    """Column with the text; of text files, their lines."""
    limit: PositiveInt | None = None
    """Use so many rows, drawn at random by `seed`."""


class Corpus(Labeller):
    """The most probable of several corpora, by multinomial logistic regression on character n-grams (TF-IDF).

    Ours. Every corpus weighs the same, however long it is. The confidence is the probability; a text of some other
    domain still gets one of these names unless the classifier is unsure, so add a corpus of ordinary text to tell
    novel from familiar.
    """

    class Config(Labeller.Config):
        """Which corpus a text resembles."""

        kind: Literal["corpus"] = "corpus"
        """The nearest of several corpora, by a classifier of character n-grams trained on them."""
        root: ExistingPath = "."
        """Folder (or URL) on which relative paths hang."""
        corpora: dict[CorpusName, CorpusTable] = Field(min_length=2)
        """The corpora, by the name that becomes the label."""
        chars: int = Field(default=600, ge=40)
        """About so many characters make a passage, cut at white space where there is some; and shorter ones, since
        texts to be labelled may be short."""
        passages: int = Field(default=900, ge=len(LENGTHS))
        """Passages, at most, that are learnt from per corpus, drawn at random by `seed`."""
        min_confidence: float = Field(default=0.5, ge=0, le=1)
        """A text whose corpus is less probable than this is `unknown`."""
        seed: NonNegativeInt = 0
        """Decides which rows are held out, and which passages are learnt from."""

        @model_validator(mode="after")
        def _names(self) -> Self:
            if UNKNOWN in self.corpora:
                raise ValueError(f"corpora: the name {UNKNOWN!r} is taken; choose another")
            return self

        def depends_on(self) -> list[Any]:
            """The settings, and the files' sizes and times. Raises UserError for one that is not there."""
            files = [inputs_of(self.table(name))[1] for name in self.corpora]
            return [self.model_dump(mode="json", exclude={"root"}), files]

        def absolute(self) -> Self:
            """The same, with an absolute root."""
            return self.model_copy(update={"root": absolute_path(self.root)})

        def table(self, name: str) -> CorpusTable:
            """The table of the corpus ``name``, with its path hung on the root. UserError if it is not there."""
            table = self.corpora[name]
            if table.path is None:
                return table
            path = hung_on(f"corpora.{name}.path", table.path, self.root)
            return table.model_copy(update={"path": path})

    config: Config

    def __init__(self, config: Config) -> None:
        """Trains the classifier. Raises DataError for corpora that cannot be read, are empty or hold the same texts."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        super().__init__(config)
        texts = _read(config)
        learnt: list[tuple[str, str]] = []
        self._held_out: dict[str, list[str]] = {}
        for number, (name, rows) in enumerate(texts.items()):
            random = np.random.Generator(np.random.Philox([config.seed, number]))
            tested, rest = _split(rows, random)
            self._held_out[name] = _draw(tested, config, random)
            learnt += [(passage, name) for passage in _draw(rest, config, random)]
        self._features = TfidfVectorizer(
            analyzer="char",
            ngram_range=NGRAMS,
            lowercase=False,
            sublinear_tf=True,
            min_df=2,
            max_features=MAX_FEATURES,
            dtype=np.float64,
        )
        self._model = LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=1000)
        passages, names = zip(*learnt, strict=True)
        self._model.fit(self._features.fit_transform(passages), names)

    def label(self, texts: Sequence[str]) -> list[Label]:
        """The label of each text; `unknown`, with confidence 0, where it shares no n-gram with any corpus."""
        vectors_NF = self._features.transform(texts)
        chances_NC = self._model.predict_proba(vectors_NF)
        labels = []
        for filled, chances_C in zip(np.diff(vectors_NF.indptr), chances_NC, strict=True):
            best = int(chances_C.argmax())
            confidence = float(chances_C[best]) if filled else 0.0
            sure = filled and confidence >= self.config.min_confidence
            labels.append(Label(str(self._model.classes_[best]) if sure else UNKNOWN, confidence))
        return labels

    @property
    def held_out(self) -> list[dict[str, Any]]:
        """How well passages of rows that were not learnt from are told: a row for each corpus.

        Rows have ``corpus``, ``passages`` (how many were asked), ``accuracy`` (an `unknown` is a mistake; NaN where a
        corpus of one row left none to ask) and ``most_confused_with`` (the most frequent wrong label, or None).
        """
        rows = []
        for name, passages in self._held_out.items():
            found = Counter(label.name for label in self.label(passages)) if passages else Counter[str]()
            wrong = sorted((-count, label) for label, count in found.items() if label != name)
            rows.append(
                {
                    "corpus": name,
                    "passages": len(passages),
                    "accuracy": found[name] / len(passages) if passages else float("nan"),
                    "most_confused_with": wrong[0][1] if wrong else None,
                }
            )
        return rows


def cut(text: str, chars: int) -> Iterator[str]:
    """``text`` in passages of at most ``chars`` characters.

    Cut at the last white space in a passage's second half, if there is one, else at its end. A rest of less than half
    of ``chars`` is left out, unless it is all there is.
    """
    text = text.strip()
    start = 0
    while start < len(text):
        end = start + chars
        if end < len(text):
            space = max((place for place in range(start + chars // 2, end + 1) if text[place].isspace()), default=end)
            end = space
        passage = text[start:end].strip()
        if passage and (start == 0 or len(passage) >= chars / 2):
            yield passage
        start = end


def _read(config: Corpus.Config) -> dict[str, list[str]]:
    """The different texts of each corpus that are not blank."""
    texts: dict[str, list[str]] = {}
    for name in config.corpora:
        try:
            rows = [str(row["prompt"]) for row in read_prompts(config.table(name), seed=config.seed)]
        except UserError as error:
            told = str(error).removeprefix("prompts: ").removeprefix(f"corpora.{name}.path: ")
            told = told.replace("`prompts.column`", "its `column`")
            raise DataError(f"labeller corpus: corpora.{name}: {told}") from error
        texts[name] = list(dict.fromkeys(text for text in rows if text.strip()))
        if not texts[name]:
            raise DataError(f"labeller corpus: corpora.{name}: all of its {len(rows)} rows are blank.")
    for one, other in itertools.permutations(texts, 2):
        if set(texts[one]) <= set(texts[other]):
            raise DataError(
                f"labeller corpus: corpora.{one} and corpora.{other} cannot be told apart: every row of {one} is also "
                f"one of {other}. Check their paths and `where`."
            )
    return texts


def _split(rows: Sequence[str], random: np.random.Generator) -> tuple[list[str], list[str]]:
    """Rows to be tested on, and those to be learnt from, which get the only row of one."""
    order = [rows[place] for place in random.permutation(len(rows))]
    tested = max(1, round(HELD_OUT * len(rows))) if len(rows) > 1 else 0
    return order[:tested], order[tested:]


def _draw(rows: Sequence[str], config: Corpus.Config, random: np.random.Generator) -> list[str]:
    """Passages of all lengths, as many of each, and no more than asked for."""
    drawn = []
    for length in LENGTHS:
        found = [passage for row in rows for passage in cut(row, config.chars // length)]
        chosen = random.permutation(len(found))[: config.passages // len(LENGTHS)]
        drawn += [found[place] for place in chosen]
    return drawn
