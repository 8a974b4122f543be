"""Text comes piece by piece: whole characters, nothing of a stop string, and all in all what decoding gives."""

from __future__ import annotations

import random

import pytest
from generating import tokenizer
from tokenizers import Tokenizer, decoders, models
from toy_tokenizer import BOS, EOS

from isoray.generation.text import TextStream

TEXT = "naïve café, 東京タワー 🙂🙃!"


def bytes_as_tokens() -> Tokenizer:
    """One token per byte."""
    return tokenizer().backend_tokenizer


def words_and_bytes() -> Tokenizer:
    """As SentencePiece has it: words with their space before them, bytes for what is no word."""
    vocabulary = {"<s>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    for word in ("▁", "▁hello", "▁world", "é", ","):
        vocabulary[word] = len(vocabulary)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<s>"])
    return made


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    found = []
    for token in ids:
        stream.push([token])
        found.append(stream.take())
    return [*found, stream.take(last=True)]


@pytest.mark.parametrize("cut", range(0, 24, 3))
def test_characters_come_whole(cut: int) -> None:
    ids = list(TEXT.encode())
    got = pieces(TextStream(bytes_as_tokens(), ids[:cut]), ids[cut:])
    assert "\ufffd" not in "".join(got)
    before = bytes(ids[:cut]).decode(errors="ignore")
    assert "".join(got) == TEXT[len(before) :], "a character that the prompt had begun comes with its end"
    assert all(piece in TEXT for piece in got)


def test_any_bytes_give_what_decoding_gives() -> None:
    random.seed(0)
    decode = bytes_as_tokens().decode
    for _ in range(300):
        ids = [random.choice([*range(258), *TEXT.encode()]) for _ in range(random.randrange(1, 25))]
        cut = random.randrange(len(ids))
        stream = TextStream(bytes_as_tokens(), ids[:cut])
        got = "".join(pieces(stream, ids[cut:]))
        prompt = decode(ids[:cut]).rstrip("\ufffd")
        assert got == stream.text == decode(ids)[len(prompt) :].rstrip("\ufffd")


def test_what_is_before_half_a_character_is_not_held_back() -> None:
    stream = TextStream(bytes_as_tokens(), [])
    stream.push([*b"ab", "é".encode()[0]])
    assert stream.take() == "ab"
    assert stream.take(last=True) == "", "half a character is never given out"
    assert stream.text == "ab"


def test_spaces_between_words_stay() -> None:
    made = words_and_bytes()
    hello, world = made.token_to_id("▁hello"), made.token_to_id("▁world")
    space, accent = made.token_to_id("▁"), made.token_to_id("é")
    assert pieces(TextStream(made, [hello]), [world, world]) == [" world", " world", ""]
    assert pieces(TextStream(made, [0]), [hello, world]) == ["hello", " world", ""]
    assert "".join(pieces(TextStream(made, [hello]), [space, space, accent, world])) == "  é world"


def test_characters_of_byte_tokens() -> None:
    made = words_and_bytes()
    ids = [made.token_to_id(f"<0x{byte:02X}>") for byte in "東京🙂".encode()]
    for cut in range(len(ids)):
        before = "東京🙂".encode()[:cut].decode(errors="ignore")
        assert (
            "".join(pieces(TextStream(made, [made.token_to_id("▁hello"), *ids[:cut]]), ids[cut:]))
            == "東京🙂"[len(before) :]
        )


def test_special_tokens_are_no_text() -> None:
    assert pieces(TextStream(bytes_as_tokens(), [BOS]), [*b"a", EOS, *b"b"]) == ["a", "", "b", ""]


def test_stop_strings_are_found_across_tokens() -> None:
    stream = TextStream(bytes_as_tokens(), list(b"<EN"), stop=["<END>", "Q:"])
    got = pieces(stream, list(b"D> is no stop, <E is none"))
    assert "".join(got) == "D> is no stop, <E is none"
    assert not stream.stopped
    stream = TextStream(bytes_as_tokens(), [], stop=["<END>", "Q:"])
    given = ""
    for token in b"ab<ENc<END>de":
        stream.push([token])
        given += stream.take()
        assert "ab<ENc".startswith(given), "nothing of a stop string is given out"
        if stream.stopped:
            break
    assert token == ord(">") and given == stream.text == "ab<ENc"


def test_the_first_stop_string_counts() -> None:
    stream = TextStream(bytes_as_tokens(), [], stop=["yz", "", "xyzw", "w"])
    stream.push(list(b"axyzw"))
    assert stream.stopped and stream.take(last=True) == "ax"


def test_the_end_gives_what_might_have_become_a_stop_string() -> None:
    stream = TextStream(bytes_as_tokens(), [], stop=["END"])
    stream.push(list(b"the EN"))
    assert stream.take() == "the "
    assert stream.take(last=True) == "EN"
