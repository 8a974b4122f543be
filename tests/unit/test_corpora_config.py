"""Corpora in the configuration: lists and mappings, defaults, and mistakes that are named."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from isoray.corpora.config import CorporaConfig


def test_a_mapping_is_a_list_with_names() -> None:
    fields = {"path": "x.jsonl"}
    listed = CorporaConfig.model_validate({"train": [{"name": "a", **fields}, {"name": "b", **fields}]})
    mapped = CorporaConfig.model_validate({"train": {"a": fields, "b": fields}})
    assert listed == mapped
    assert listed.digest() == mapped.digest()


def test_defaults_hold_for_all_corpora_and_survive_a_round_trip() -> None:
    config = CorporaConfig.model_validate(
        {
            "defaults": {"on_bad_row": "skip", "limit": 5},
            "train": {"a": {"path": "x"}, "b": {"path": "y", "limit": 7}},
            "test": {"t": {"path": "z", "on_bad_row": "quarantine"}},
        }
    )
    assert [corpus.limit for corpus in config.train] == [5, 7]
    assert [corpus.on_bad_row for corpus in (*config.train, *config.test)] == ["skip", "skip", "quarantine"]
    assert CorporaConfig.model_validate(config.model_dump(mode="json")) == config


def test_texts_are_packed_and_prompts_are_not_unless_told() -> None:
    config = CorporaConfig.model_validate({"train": {"a": {"path": "x"}, "b": {"path": "y", "packing": True}}})
    plain, told = config.train
    assert [config.packs(plain, has_prompts=has) for has in (False, True)] == [True, False]
    assert config.packs(told, has_prompts=True)
    assert not CorporaConfig(packing=False).packs(plain, has_prompts=False)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ({"name": "a"}, "exactly one of path, hub and generator"),
        ({"name": "a", "path": "x", "hub": "y"}, "exactly one of path, hub and generator"),
        ({"name": "a/b", "path": "x"}, "name"),
        ({"name": "a", "path": "x", "columns": {"prompt": "q"}}, "go together"),
        ({"name": "a", "path": "x", "columns": {"text": "t", "prompt": "q", "response": "r"}}, "map either"),
        ({"name": "a", "path": "x", "on_bad_row": "ignore"}, "on_bad_row"),
        ({"name": "a", "path": "x", "limit": 0}, "limit"),
    ],
)
def test_mistakes_in_a_corpus_are_named(corpus: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CorporaConfig.model_validate({"train": [corpus]})


def test_two_corpora_need_two_names() -> None:
    with pytest.raises(ValidationError, match="'a' is given to more than one"):
        CorporaConfig.model_validate({"train": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]})
