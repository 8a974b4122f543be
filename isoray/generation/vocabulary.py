"""Whether models share a vocabulary, so that their distributions can be subtracted token by token."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerFast

from isoray.errors import UserError


def shared_vocabulary(tokenizers: Mapping[str, PreTrainedTokenizerFast], heads: Mapping[str, int]) -> int:
    """How many token ids, from 0 on, mean the same to all models; the others count for none.

    ``heads`` are the sizes of the models' output layers, which may be padded beyond the tokenizer, each differently. A
    tokenizer may have further *added* tokens at the end (a padding token, say, from a fine-tuning). Raises UserError,
    with the first token that differs, for tokenizers that are not equal otherwise.
    """
    (first_name, first), *others = tokenizers.items()
    tokens = _by_id(first)
    shared = len(tokens)
    for name, tokenizer in others:
        its = _by_id(tokenizer)
        for index, (ours, theirs) in enumerate(zip(tokens, its, strict=False)):
            if ours != theirs:
                raise UserError(
                    f"The models of a contrast need one vocabulary, but token {index} is {ours!r} for {first_name} and "
                    f"{theirs!r} for {name}; choose models with the same tokenizer."
                )
        longer, extra = (first, tokens[len(its) :]) if len(tokens) > len(its) else (tokenizer, its[len(tokens) :])
        added = {*longer.all_special_tokens, *longer.get_added_vocab(), None}
        if lacking := [token for token in extra if token not in added]:
            raise UserError(
                f"The models of a contrast need one vocabulary, but {first_name} has {len(tokens)} tokens and {name} "
                f"{len(its)}; the first that one of them lacks is {lacking[0]!r}. Choose models with one tokenizer."
            )
        shared = min(shared, len(its))
    for name, size in heads.items():
        if size < shared:
            raise UserError(
                f"The {name} model predicts {size} tokens, but the tokenizer has {shared}: model and tokenizer do not "
                "belong together."
            )
    return shared


def _by_id(tokenizer: PreTrainedTokenizerFast) -> list[str | None]:
    """Tokens in the order of their ids, None where an id is not used."""
    vocabulary = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        tokens[index] = token
    return tokens
