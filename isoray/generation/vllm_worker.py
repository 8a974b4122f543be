"""What the vLLM engine asks of vLLM's workers, wherever they run: methods that vLLM adds to its worker class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoray.generation.contrast import Role
from isoray.generation.vllm_loader import reload_weights
from isoray.generation.vllm_model import ContrastForCausalLM


class WorkerExtension:
    """Mixed into vLLM's worker (``worker_extension_cls``) and called by name, so that nothing is pickled."""

    model_runner: Any

    def _isoray_model(self) -> ContrastForCausalLM:
        model = self.model_runner.get_model()
        assert isinstance(model, ContrastForCausalLM)
        return model

    def isoray_alone(self, role: Role | None) -> None:
        """Give out the logits of one model, or of the contrast again (None)."""
        model = self._isoray_model()
        model.alone = role
        if model.unsound:
            model.unsound = False
            self._isoray_wipe()

    def isoray_broken(self) -> dict[str, list[str]]:
        """Requests for which models gave numbers that are none, and which; forgotten then."""
        rows = self._isoray_model().rows
        broken, rows.broken = rows.broken, {}
        if broken:
            self._isoray_wipe()
        return broken

    def _isoray_wipe(self) -> None:
        """Make zeros of what is no number in the caches.

        Whoever gets a block next reads past its own tokens, with weight 0; but 0 x NaN is NaN.
        """
        for cache in self.model_runner.kv_caches:
            if isinstance(cache, Tensor) and cache.is_floating_point():
                torch.nan_to_num_(cache, nan=0.0, posinf=0.0, neginf=0.0)

    def isoray_update(self, role: Role, folder: str) -> None:
        """Replace weights of one model by those in ``folder``."""
        runner = self.model_runner
        part = self._isoray_model().parts[role]
        reload_weights(part, runner.model_config, runner.vllm_config.load_config, Path(folder))
