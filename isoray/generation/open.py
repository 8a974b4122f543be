"""Opening the engine that a config names."""

from __future__ import annotations

from typing import cast

from isoray.config.base import component_of
from isoray.generation.contrast import ContrastConfig
from isoray.generation.engine import Engine


def open_engine(config: Engine.Config, contrast: ContrastConfig) -> Engine:
    """The engine of ``config``'s kind, with the models of ``contrast`` loaded from their local folders.

    Raises UserError for models that cannot be loaded or contrasted, and for an engine that is not installed.
    """
    return cast(Engine, component_of(type(config))(config, contrast))
