"""Text from tokens, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """Turns the tokens of one text into characters as they come; special tokens give none.

    Held back is what may become a stop string, and half a character; the latter is never given out if its other half
    does not come.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        # Some tokenizers write a word at the start of a text without the space that it has after a prompt.
        self._decode = DecodeStream(ids=list(prompt_ids), skip_special_tokens=True)
        self._tokenizer = tokenizer
        self._stop = [string for string in stop if string]
        self.text = ""
        """All that was decoded, cut off before a stop string."""
        self._given = 0
        self.stopped = False
        """Whether a stop string has come; nothing may be pushed any more."""

    def push(self, token_ids: Sequence[int]) -> None:
        """Decode further tokens, until one of them completes a stop string."""
        for token in token_ids:
            piece = self._decode.step(self._tokenizer, token)
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

    def _held_back(self) -> int:
        """Length of the longest end of the text that some stop string begins with."""
        return max(
            (size for string in self._stop for size in range(1, len(string)) if self.text.endswith(string[:size])),
            default=0,
        )
