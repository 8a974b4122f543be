"""Tokenizers: train a byte-level BPE, load one, and give every tokenizer a padding token."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from isoray.errors import DataError, UserError
from isoray.models.config import TokenizerConfig
from isoray.models.folders import quiet

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


def train_tokenizer(
    texts: Iterable[str], config: TokenizerConfig, *, context: int | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al., 2016; GPT-2's pre-tokenisation) trained on ``texts``.

    Any text decodes to itself. The special tokens have the first ids: bos 0, eos 1, pad 2. Nothing is added to a text
    when it is encoded. The result depends only on the texts, whatever their order and the number of threads.

    Raises DataError if the texts are empty.
    """
    special = list(dict.fromkeys((BOS, EOS, PAD, *config.special_tokens)))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    characters = 0

    def counted() -> Iterable[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield text

    bpe.train_from_iterator(counted(), trainer)
    if not characters:
        raise DataError("The tokenizer has no text to be trained on: the corpora are empty.")
    limit = {} if context is None else {"model_max_length": context}
    build: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = build(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        **limit,
    )
    return tokenizer


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a Transformers folder, with a padding token. No network. UserError if there is none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise UserError(f"{folder} holds no tokenizer (tokenizer.json); copy the one that the model was trained with.")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"The tokenizer in {folder} cannot be loaded: {first_line(error)}") from error
    return with_pad_token(tokenizer)


def with_pad_token(tokenizer: Any) -> PreTrainedTokenizerFast:
    """``tokenizer`` itself; if it lacks a padding token, its end-of-text token (or the nearest to it) pads.

    The vocabulary does not grow, so no embedding is resized. Labels never depend on the padding token's id: a padded
    position has label -100 because it is padded, not because of what stands there.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{type(tokenizer).__name__} has no fast version; convert it to a tokenizer.json.")
    if tokenizer.pad_token is None:
        substitute = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
        if substitute is None:
            raise UserError("The tokenizer has neither a padding nor an end-of-text token; give it one.")
        tokenizer.pad_token = substitute
    return cast(PreTrainedTokenizerFast, tokenizer)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a message of our own."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
