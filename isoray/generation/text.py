"""Text from tokens, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes half a character to."""


class TextStream:
    """Turns the tokens of one text into characters as they come; special tokens give none.

    Held back is what may become a stop string, and half a character; the latter is never given out if its other half
    does not come.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers write a word at the start of a text without the space that it has after others, so tokens are
        # decoded together with those before them. A character that the prompt leaves unfinished counts as new.
        self._ids = list(prompt_ids)
        self._old = len(self._ids)
        # (Half a character may spoil the whole ones before it, where bytes are tokens: so look without it, too.)
        ends = [self._ids[: len(self._ids) - half] for half in range(4)]
        self._seen = max(len(self._decode(ids).rstrip(UNFINISHED)) for ids in ends)
        self._stop = [string for string in stop if string]
        self.text = ""
        """All that was decoded, cut off before a stop string."""
        self._given = 0
        self.stopped = False
        """Whether a stop string has come; nothing may be pushed any more."""

    def push(self, token_ids: Sequence[int]) -> None:
        """Decode further tokens, until one of them completes a stop string."""
        for token in token_ids:
            piece = self._piece(token)
            if not piece:
                continue
            # A stop string may have begun in text that is already here.
            searched = max(0, len(self.text) - max(map(len, self._stop), default=0))
            self.text += piece
            places = [place for string in self._stop if (place := self.text.find(string, searched)) >= 0]
            if places:
                self.text = self.text[: min(places)]
                self.stopped = True
                return

    def take(self, *, last: bool = False) -> str:
        """What can be given out since it was last asked for; with ``last``, all that is left."""
        end = len(self.text) if last or self.stopped else len(self.text) - self._held_back()
        given = self.text[self._given : end]
        self._given = max(self._given, end)
        return given

    def _piece(self, token: int) -> str:
        """What ``token`` adds to the text; nothing while a character is unfinished."""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = text.rstrip(UNFINISHED)
        piece = whole[self._seen :]
        if piece:
            self._seen = len(whole)
            if whole == text:
                self._forget()
        return piece

    def _forget(self) -> None:
        """Keep those tokens only that the last piece came from."""
        last = self._ids[self._old :]
        text = self._decode(last)
        if not text.startswith(UNFINISHED):
            self._ids, self._seen = last, len(text)
        self._old = len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _held_back(self) -> int:
        """Length of the longest end of the text that some stop string begins with."""
        return max(
            (size for string in self._stop for size in range(1, len(string)) if self.text.endswith(string[:size])),
            default=0,
        )
