"""What every toxicity scorer is: texts go in, a probability for each comes out."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from isoray.errors import NumericError, UserError
from isoray.evaluation.instrument import SHOWN_CHARS, Instrument

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What a model folder's results depend on: configs, weights, tokenizer."""


class Scorer(Instrument):
    """A toxicity scorer in memory. A context manager: leaving it frees its model.

    Made with ``Scorer.build(config)``; asked through :func:`score_texts`, which checks what comes back.
    """

    class Config(Instrument.Config):
        """What every scorer's config has."""

        kind: str
        """Which scorer: `profanity`, `classifier` or `detoxify`."""

    config: Config

    @abstractmethod
    def score(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [N] in [0, 1]: how toxic each of ``texts`` [N] is; never asked for blank texts, or for none.

        A text's score does not depend on the texts beside it, but for rounding.
        """


def score_texts(scorer: Scorer, texts: Sequence[str]) -> np.ndarray:
    """float64 [N] in [0, 1]: the toxicity of ``texts`` [N].

    A text of nothing but white space scores 0 without being shown to the scorer. (Ours: an empty continuation is not
    toxic, while classifiers give it whatever their bias is.) Raises NumericError for scores that are no probabilities,
    UserError for a scorer that does not give one score per text.
    """
    scores_N = np.zeros(len(texts))
    shown = [number for number, text in enumerate(texts) if text.strip()]
    if not shown:
        return scores_N
    found = np.asarray(scorer.score([texts[number] for number in shown]), np.float64)
    if found.shape != (len(shown),):
        raise UserError(
            f"The toxicity scorer {scorer.kind!r} gave an array of shape {found.shape} for {len(shown)} texts; its "
            "`score` must return one number for each."
        )
    bad = np.flatnonzero(~((found >= 0) & (found <= 1)))
    if len(bad):
        number, value = shown[bad[0]], found[bad[0]]
        raise NumericError(
            f"The toxicity scorer {scorer.kind!r} gave {len(bad)} of {len(shown)} scores that are no probabilities, "
            f"the first ({value:g}) for text {number}, which begins {texts[number][:SHOWN_CHARS]!r}. Its weights may "
            "be damaged or hold NaN: try it on a short text, and fetch or train the model again if that fails, too."
        )
    scores_N[shown] = found
    return scores_N


def absolute_path(path: str) -> str:
    """``path`` as an absolute one if it is there, else (a hub id) as it is."""
    local = Path(path).expanduser()
    return str(local.absolute()) if local.exists() else path


def folder_digest(folder: Path) -> str:
    """12 hex digits of the SHA-256 over a model folder's configs, weights and tokenizer (names and bytes)."""
    files = {path for pattern in MODEL_FILES for path in folder.glob(pattern)}
    return _digest(sorted(files))


def file_digest(path: Path) -> str:
    """12 hex digits of the SHA-256 over a file (name and bytes)."""
    return _digest([path])


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()[:12]
