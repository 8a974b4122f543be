"""Labellers: blank texts are unknown, what is no label is told, and each kind tells real texts of its domains apart."""

from __future__ import annotations

import gzip
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isoray.config.base import Slot, kinds
from isoray.errors import DataError, NumericError, UserError
from isoray.evaluation.labellers.base import UNKNOWN, Label, Labeller, label_texts
from isoray.evaluation.labellers.code import Code, votes
from isoray.evaluation.labellers.corpus import Corpus, cut
from isoray.evaluation.labellers.language import Language
from isoray.evaluation.labellers.toxicity import Toxicity
from isoray.evaluation.scorers.base import Scorer

ENGLISH = "The river rises in the hills above the town and runs for sixty miles before it meets the sea."
FRENCH = "La rivière prend sa source dans les collines au-dessus de la ville et coule jusqu'à la mer."
GERMAN = "Der Fluss entspringt in den Hügeln über der Stadt und fließt sechzig Meilen weit bis zum Meer."
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"


def names(labeller: Labeller, *texts: str) -> list[str]:
    return [label.name for label in label_texts(labeller, texts)]


class Odd(Labeller):
    """Gives what it was made with."""

    class Config(Labeller.Config):
        """Any labels."""

        kind: str = "odd"
        """Odd."""
        names: tuple[Any, ...] = ()
        """Their names."""
        confidence: float = 0.5
        """Their confidence."""

    config: Config

    def label(self, texts: Sequence[str]) -> list[Label]:
        """The labels."""
        return [Label(name, self.config.confidence) for name in self.config.names]


def test_what_is_no_label_is_told() -> None:
    secret = "x" * 60 + "unseen"
    for value in (math.nan, math.inf, -0.1, 1.5):
        with pytest.raises(NumericError, match=r"'test_labellers' gave the confidence .* text 1, .* 'xxx") as told:
            label_texts(Odd(Odd.Config(names=("a",), confidence=value)), [" ", secret])
        assert "unseen" not in str(told.value)
    with pytest.raises(UserError, match="gave 1 labels for 2 texts"):
        label_texts(Odd(Odd.Config(names=("a",))), ["one", "two"])
    for name in ("", " ", None, 3):
        with pytest.raises(UserError, match="as the label's name for text 0, which begins 'one'"):
            label_texts(Odd(Odd.Config(names=(name,))), ["one"])
    assert label_texts(Odd(Odd.Config(names=("a",))), ["", "one", "\n"]) == [
        Label(UNKNOWN, 0.0),
        Label("a", 0.5),
        Label(UNKNOWN, 0.0),
    ]
    assert label_texts(Odd(Odd.Config(names=("a",))), []) == [], "nobody was asked"


def test_kinds_make_slots() -> None:
    assert kinds("isoray.evaluation.labellers") == ["code", "corpus", "language", "toxicity"]
    config = Slot("isoray.evaluation.labellers")._resolve({"kind": "language", "languages": ["en", "de"]})
    assert isinstance(config, Language.Config)
    with Labeller.build(config) as labeller:
        assert isinstance(labeller, Language)
    assert isinstance(Slot("isoray.evaluation.labellers")._resolve("code"), Code.Config)


def test_languages() -> None:
    with Language(Language.Config()) as labeller:
        assert names(labeller, ENGLISH, FRENCH, " ", GERMAN, JAPANESE) == ["en", "fr", UNKNOWN, "de", "ja"]
        assert all(0.9 < label.confidence <= 1 for label in label_texts(labeller, [ENGLISH, FRENCH, GERMAN]))
    with Language(Language.Config(languages=("en", "de"))) as labeller:
        assert set(names(labeller, ENGLISH, FRENCH, GERMAN)) == {"en", "de"}
    with Language(Language.Config()) as labeller:
        assert names(labeller, FRENCH) == ["fr"], "another labeller's languages are its own"
    with Language(Language.Config(min_confidence=1)) as labeller:
        assert names(labeller, "ok") == [UNKNOWN]
    with pytest.raises(UserError, match="`languages` has 'xq'"):
        Language(Language.Config(languages=("xq",)))
    with pytest.raises(ValueError, match="pattern"):
        Language.Config(languages=("English",))
    assert Language.Config().depends_on() != Language.Config(languages=("en",)).depends_on()


CODE = {
    "python": "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return [line for line in file]\n",
    "method": "        self.calls += 1\n        if not self._open:\n            raise ValueError('closed')\n",
    "prompt": ">>> sorted([3, 1, 2])\n[1, 2, 3]\n",
    "c": '#include <stdio.h>\n\nint main(void) {\n    printf("%d\\n", 1);\n    return 0;\n}\n',
    "java": "public class Main {\n    int size;\n    @Override\n    int size() {\n        return size;\n    }",
    "javascript": "const xs = [1, 2];\nxs.forEach((x) => {\n  console.log(x);\n});\n",
    "rust": "fn main() {\n    let mut total = 0;\n    for x in v.iter() {\n        total += x;\n    }\n}\n",
    "go": 'package main\n\nimport "fmt"\n\nfunc main() {\n\tx := 3\n\tfmt.Println(x)\n}\n',
    "sql": "SELECT name, age FROM people\nWHERE age > 30\nORDER BY name;\n",
    "shell": 'for f in *.txt; do\n  echo "$f"\ndone\nexport PATH=$HOME/bin:$PATH\n',
    "html": '<div class="menu">\n  <a href="/home">Home</a>\n</div>\n',
    "json": '{\n  "name": "Anna",\n  "sizes": [1, 2, 3]\n}\n',
    "comments": "# The first line says what follows,\n# the second goes on,\n# and the third ends it.\nx = 1\n",
}
PROSE = {
    "english": ENGLISH,
    "japanese": JAPANESE,
    "german law": "§ 3 (1) Im Sinne des Gesetzes sind\n1.  Arbeitnehmer im Sinne des § 5 Abs. 1;\n2.  Beamte (§ 7);\n",
    "french law": "Article 2534\n----\nPour les besoins de leur publication, les ordonnances (art. L. 321-4) sont :\n",
    "recipe": "Pancakes\n\n- 250 g flour\n- 2 eggs\n\n1. Mix the flour and the eggs.\n2. Fry for 3 minutes.\n",
    "poem": "O rose, thou art sick:\nThe invisible worm,\nThat flies in the night\nIn the howling storm,\n",
    "play": "CLARENCE:\nUntutor'd lad, thou art too malapert.\n\nEDWARD:\nI know my duty; you are all undutiful:\n",
    "mail": "From: Jane <jane@example.org>\nSubject: Re: tomorrow\n\n> meet at 10:30?\n\nYes (if it rains, too).\n",
    "markdown": "# The garden\n\n**Roses** need sun; *ferns* do not. See [this](https://example.org).\n\n* water\n",
    "wikitext": " = = Reception = = \n\n The <unk> came on 3 @-@ inch discs ; 1 @,@ 200 were sold ( 1981 ) \n",
    "names": "iPhone users who upgraded from McDonald's AlexNet said: @some_body wins (again)!",
    "numbers": "1 2 3",
}


@pytest.mark.parametrize("text", CODE.values(), ids=CODE)
def test_code_is_code(text: str) -> None:
    (label,) = label_texts(Code(Code.Config()), [text])
    assert label.name == "code" and 0.5 < label.confidence <= 1


@pytest.mark.parametrize("text", PROSE.values(), ids=PROSE)
def test_prose_is_no_code(text: str) -> None:
    (label,) = label_texts(Code(Code.Config()), [text])
    assert label.name == "prose" and 0.5 <= label.confidence <= 1


def test_an_article_with_an_example_goes_by_what_there_is_more_of() -> None:
    labeller = Code(Code.Config())
    assert names(labeller, f"{ENGLISH}\n\n    x = read(path)\n\n{ENGLISH} {ENGLISH}", CODE["python"] + ENGLISH) == [
        "prose",
        "code",
    ]
    sure, mixed = label_texts(labeller, [CODE["c"], CODE["python"] + ENGLISH])
    assert sure.confidence > mixed.confidence


@pytest.mark.parametrize(
    "piece", ["a", "a.", "a(", "= ", "':", "_", "<a", "{", "import ", "a, ", "int ", "a::", "[a", "("]
)
def test_no_text_takes_the_patterns_long(piece: str) -> None:
    began = time.perf_counter()
    votes(piece * (50_000 // len(piece)))
    votes((piece * 160)[:159] + "!")
    assert time.perf_counter() - began < 3


def corpus_texts(data_root: Path, name: str, every: int) -> list[str]:
    path = data_root / "corpora" / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path}: one of the corpora that come with the real data")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file][::every]


def test_real_code_and_prose_are_told_apart(data_root: Path) -> None:
    prose = "aozora_ja bible_kjv books_en jargon_file law_de law_fr medicine_nih plays_en recipes wikitext2".split()
    labeller = Code(Code.Config())
    for chars in (None, 300):
        for name in ("python_source", *prose):
            found = names(labeller, *(text[:chars] for text in corpus_texts(data_root, name, 4)))
            want = "code" if name == "python_source" else "prose"
            assert found.count(want) / len(found) >= 0.95, (name, chars)


class Shouting(Scorer):
    """Takes capitals for toxic."""

    class Config(Scorer.Config):
        """No settings."""

        kind: str = "shouting"
        """Shouting."""

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """The share of capitals."""
        return np.array([sum(map(str.isupper, text)) / len(text) for text in texts])


def test_toxicity_goes_by_the_threshold() -> None:
    texts = ["AAAa", "AAaa", "aaaa"]
    with Toxicity(Toxicity.Config(scorer=Shouting.Config())) as labeller:
        assert label_texts(labeller, texts) == [Label("toxic", 0.75), Label("toxic", 0.5), Label("benign", 1.0)]
    with Toxicity(Toxicity.Config(scorer=Shouting.Config(), threshold=0.7)) as labeller:
        assert names(labeller, *texts, "") == ["toxic", "benign", "benign", UNKNOWN]
    one, other = (Toxicity.Config(scorer=Shouting.Config(), threshold=value).depends_on() for value in (0.5, 0.7))
    assert one != other and Shouting.Config().depends_on() in one


def test_toxicity_of_swear_words() -> None:
    pytest.importorskip("profanity_check")
    with Toxicity(Toxicity.Config()) as labeller:
        assert names(labeller, "you fucking idiot", "what a lovely day") == ["toxic", "benign"]


WORDS = {
    "sea": "ship sail wave harbour anchor deck tide captain storm gull".split(),
    "law": "court judge statute appeal clause plaintiff verdict hearing counsel tort".split(),
    "kitchen": "flour butter oven knead simmer whisk salt pepper dough broth".split(),
}


def write_table(path: Path, words: Sequence[str], *, rows: int = 30, seed: int = 0, column: str = "text") -> Path:
    random = np.random.default_rng(seed)
    lines = [{column: " ".join(random.choice(words, 60).tolist()), "half": row % 2} for row in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def corpora(tmp_path: Path, **changes: Any) -> Corpus.Config:
    tables: Mapping[str, Any] = {name: {"path": f"{name}.jsonl"} for name in WORDS}
    for number, (name, words) in enumerate(WORDS.items()):
        write_table(tmp_path / f"{name}.jsonl", words, seed=number)
    return Corpus.Config.model_validate({"root": str(tmp_path), "corpora": tables, "chars": 200, **changes})


def test_the_nearest_corpus_is_found(tmp_path: Path) -> None:
    config = corpora(tmp_path)
    with Corpus(config) as labeller:
        short = [" ".join(words[2:5]) for words in WORDS.values()]
        assert names(labeller, *short, "", "猫である") == [*WORDS, UNKNOWN, UNKNOWN]
        rows = labeller.held_out
        assert [row["corpus"] for row in rows] == list(WORDS)
        assert all(row["passages"] > 20 and row["accuracy"] == 1 for row in rows)
        assert all(row["most_confused_with"] is None for row in rows)
        again = Corpus(config)
        assert label_texts(again, short) == label_texts(labeller, short) and again.held_out == rows
        other = Corpus(corpora(tmp_path, seed=1))
        assert label_texts(other, short) != label_texts(labeller, short), "another seed learns from other passages"
    with Corpus(corpora(tmp_path, min_confidence=1)) as labeller:
        assert set(names(labeller, *short)) == {UNKNOWN}
        assert {row["most_confused_with"] for row in labeller.held_out} == {UNKNOWN}


def test_what_is_held_out_was_not_learnt_from(tmp_path: Path) -> None:
    """Rows of words that no other row has: told apart only by a classifier that has seen them."""
    random = np.random.default_rng(0)
    for name in ("one", "other"):
        lines = [
            " ".join("".join(chr(97 + c) for c in random.integers(0, 26, 9)) for _ in range(40)) for _ in range(60)
        ]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    tables = {name: {"path": f"{name}.txt"} for name in ("one", "other")}
    labeller = Corpus(Corpus.Config.model_validate({"root": str(tmp_path), "corpora": tables, "chars": 200}))
    for row in labeller.held_out:
        assert row["accuracy"] < 0.8
        assert row["most_confused_with"] in ({"one", "other"} - {row["corpus"]})


def test_rows_are_chosen(tmp_path: Path) -> None:
    write_table(tmp_path / "sea.jsonl", WORDS["sea"], column="body")
    tables = {
        "even": {"path": "sea.jsonl", "column": "body", "where": {"half": 0}, "limit": 10},
        "given": {"texts": ["a single text of some words"]},
    }
    config = Corpus.Config.model_validate({"root": str(tmp_path), "corpora": tables})
    even, given = Corpus(config).held_out
    assert even["passages"] > 0 and given["passages"] == 0 and math.isnan(given["accuracy"])
    before = config.depends_on()
    assert config.absolute().depends_on() == before, "the folder does not matter"
    write_table(tmp_path / "sea.jsonl", WORDS["sea"], rows=31, column="body")
    assert config.depends_on() != before, "the files do"


def test_corpora_that_cannot_be_learnt_from(tmp_path: Path) -> None:
    def refused(words: str, **table: Any) -> None:
        config = corpora(tmp_path)
        tables = {**config.model_dump()["corpora"], "odd": table}
        with pytest.raises(DataError, match=words):
            Corpus(Corpus.Config.model_validate({"root": str(tmp_path), "corpora": tables}))

    refused(r"corpora\.odd: .*no.*'txt'.*its `column`", path="sea.jsonl", column="txt")
    refused(r"corpora\.odd: .*'sae.jsonl'; did you mean 'sea.jsonl'", path="sae.jsonl")
    refused(r"corpora\.odd: .*holds no", path="sea.jsonl", where={"half": 7})
    refused(r"corpora\.odd: all of its 1 rows are blank", texts=[" "])
    refused(r"corpora\.sea and corpora\.odd cannot be told apart", path="sea.jsonl")
    refused(r"corpora\.odd and corpora\.sea cannot be told apart", path="sea.jsonl", limit=5)
    two = {"sea": {"texts": ["a"]}}
    for tables, words in (
        (two, "at least 2"),
        ({**two, "unknown": {"texts": ["b"]}}, "'unknown' is taken"),
        ({**two, "law": {"texts": ["b"], "repeat": 2}}, "each row of the table is used once"),
        ({**two, "law": {}}, "give `path`"),
    ):
        with pytest.raises(ValueError, match=words):
            Corpus.Config.model_validate({"corpora": tables})


def test_texts_are_cut_at_white_space() -> None:
    text = " ".join(f"word{number}" for number in range(100))
    passages = list(cut(text, 50))
    assert max(map(len, passages)) <= 50 and min(map(len, passages)) >= 25
    assert " ".join(passages) == text[: len(" ".join(passages))], "nothing is lost but the end"
    assert list(cut("x" * 120, 50)) == ["x" * 50, "x" * 50], "a short rest is left out"
    assert list(cut("x" * 130, 50)) == ["x" * 50, "x" * 50, "x" * 30]
    assert list(cut(" short ", 50)) == ["short"]
    assert list(cut(" \n", 50)) == []


def test_real_corpora_are_told_apart_also_in_short(data_root: Path) -> None:
    wanted = ["books_en", "law_de", "aozora_ja", "python_source", "medicine_nih"]
    held = {name: corpus_texts(data_root, name, 1)[-40:] for name in wanted}
    tables = {name: {"texts": corpus_texts(data_root, name, 4)[:-10]} for name in wanted}
    config = Corpus.Config.model_validate({"corpora": tables, "passages": 150})
    with Corpus(config) as labeller:
        assert min(row["accuracy"] for row in labeller.held_out) > 0.9
        for name, texts in held.items():
            found = names(labeller, *(text[:100] for text in texts))
            assert found.count(name) / len(found) > 0.85, name
