"""Language: which natural language a text is written in."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from isoray.config.base import nearest
from isoray.errors import UserError
from isoray.evaluation.labellers.base import UNKNOWN, Label, Labeller

PACKAGE = "py3langid"


class Language(Labeller):
    """The ISO 639 code of the language that a text is most probably in (py3langid, after Lui and Baldwin, 2012).

    The confidence is its normalised probability: near 1 of a paragraph, lower of a few words. Source code counts as the
    language of its names and comments, most often `en`; `zxx` is a text of no language.
    """

    class Config(Labeller.Config):
        """The language of a text."""

        kind: Literal["language"] = "language"
        """The natural language, as an ISO 639 code such as `en`."""
        languages: tuple[Annotated[str, StringConstraints(pattern=r"^[a-z]{2,3}$")], ...] = ()
        """Only these languages are considered, so that related ones cannot be confused; empty: all 140
        of the model."""
        min_confidence: float = Field(default=0.5, ge=0, le=1)
        """A text whose language is less probable than this is `unknown`."""

        def depends_on(self) -> list[Any]:
            """The settings and the package's version, which its model comes with."""
            return [*super().depends_on(), importlib.metadata.version(PACKAGE)]

    config: Config

    def __init__(self, config: Config) -> None:
        """Raises UserError for a language that the model does not know."""
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        super().__init__(config)
        # An identifier of its own: restricting the languages changes it for all who use it.
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        known = list(self._identifier.labels)
        for language in config.languages:
            if language not in known:
                raise UserError(f"labeller language: `languages` has {language!r}; {nearest(language, known)}.")
        if config.languages:
            self._identifier.set_languages(list(config.languages))

    def label(self, texts: Sequence[str]) -> list[Label]:
        """The label of each text."""
        found = (self._identifier.classify(text) for text in texts)
        return [
            Label(str(name) if confidence >= self.config.min_confidence else UNKNOWN, min(1.0, float(confidence)))
            for name, confidence in found
        ]
