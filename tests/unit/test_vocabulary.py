"""Which models share a vocabulary."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from isoray.errors import UserError
from isoray.generation.vocabulary import shared_vocabulary


def tokenizer_of(*tokens: str, special: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=tokens[0]))
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token=tokens[0])
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    fast.add_tokens(list(added))
    return fast


PLAIN = tokenizer_of("?", "a", "b")
LONGER = tokenizer_of("?", "a", "b", special=("<pad>",)), tokenizer_of("?", "a", "b", added=("c",))


def test_heads_may_be_padded() -> None:
    assert shared_vocabulary({"positive": PLAIN, "negative": PLAIN}, {"positive": 3, "negative": 8}) == 3


def test_a_head_that_is_too_small() -> None:
    with pytest.raises(UserError, match="negative model predicts 2 tokens, but the tokenizer has 3"):
        shared_vocabulary({"positive": PLAIN, "negative": PLAIN}, {"positive": 3, "negative": 2})


@pytest.mark.parametrize(
    "more", [tokenizer_of("?", "a", "b", special=("<pad>",)), tokenizer_of("?", "a", "b", added=("c",))]
)
def test_one_may_have_added_tokens(more: PreTrainedTokenizerFast) -> None:
    assert len(more) == 4
    heads = {"positive": 4, "negative": 4}
    assert shared_vocabulary({"positive": PLAIN, "negative": more}, heads) == 3
    assert shared_vocabulary({"positive": more, "negative": PLAIN}, heads) == 3
    assert shared_vocabulary({"positive": more, "negative": more}, heads) == 4


def test_the_first_token_that_differs_is_named() -> None:
    with pytest.raises(UserError, match="token 1 is 'a' for positive and 'x' for negative"):
        shared_vocabulary({"positive": PLAIN, "negative": tokenizer_of("?", "x", "y")}, {})
    with pytest.raises(UserError, match="token 2 is 'b' for base and 'c' for negative"):
        shared_vocabulary({"base": PLAIN, "positive": PLAIN, "negative": tokenizer_of("?", "a", "c")}, {})


def test_a_word_more_is_another_vocabulary() -> None:
    with pytest.raises(
        UserError, match="positive has 3 tokens and negative 4; the first that one of them lacks is 'c'"
    ):
        shared_vocabulary({"positive": PLAIN, "negative": tokenizer_of("?", "a", "b", "c")}, {})
