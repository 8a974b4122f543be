"""The vLLM plugin (entry point ``vllm.general_plugins``): makes contrasts known to every process of vLLM.

vLLM calls :func:`register` wherever isoray is installed, for any model, so it does nothing but register.
"""

from __future__ import annotations

ARCHITECTURE = "IsorayContrastForCausalLM"
"""The architecture that a contrast folder's config names."""
KEY = "isoray_contrast"
"""The key of a contrast folder's config under which the models stand."""
LOAD_FORMAT = "isoray_contrast"
"""vLLM's load format of a contrast folder: each model's weights from its own folder."""


def register() -> None:
    """Register the contrast's architecture, imported when it is first used, and the loader of its weights."""
    from vllm import ModelRegistry
    from vllm.model_executor.model_loader import register_model_loader

    from isoray.generation.vllm_loader import ContrastLoader

    ModelRegistry.register_model(ARCHITECTURE, "isoray.generation.vllm_model:ContrastForCausalLM")
    register_model_loader(LOAD_FORMAT)(ContrastLoader)
