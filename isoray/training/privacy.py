"""Differentially private training: DP-SGD (Abadi et al., 2016, algorithm 1), with Opacus.

Every example is in a step's batch with the same chance, its gradient is clipped, and Gaussian noise is added to the
sum: how much the trained weights can tell of any one example is then bounded, and the accountant says by what. The unit
is a block of the training corpora, so blocks must hold one example each. The loss of an example is the mean over its
labelled tokens, so that no example is clipped for being long.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from isoray.config.base import digest_of
from isoray.corpora.store import Blocks
from isoray.corpora.stream import PoissonStream, Stream
from isoray.errors import UserError
from isoray.models.structure import plain
from isoray.objectives.base import Objective
from isoray.objectives.lm import LanguageModelling
from isoray.objectives.reduce import Batch, label_counts
from isoray.training.config import PrivacyConfig
from isoray.training.epsilon import epsilon_spent, noise_multiplier_for
from isoray.training.parallel import Parallel

FILE = "privacy.json"
"""Beside a model's weights: what they were trained to guarantee."""

UNIT = "one example (block) of the training corpora, added or removed"
"""What two corpora that the guarantee calls neighbours differ in."""


@dataclass(frozen=True)
class Accounting:
    """What a private training adds in noise, and what it has spent after each step: a pure function of its settings."""

    config: PrivacyConfig
    examples: int
    batch_size: int
    """Expected number of examples per step."""
    steps: int
    """Of the whole training."""

    @property
    def rate(self) -> float:
        """Chance of an example to be in a step's batch."""
        return self.batch_size / self.examples

    @property
    def delta(self) -> float:
        """The probability with which the guarantee may fail."""
        return 1 / self.examples if self.config.delta is None else self.config.delta

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise on the sum of clipped gradients, over the norm that they are clipped to."""
        if self.config.noise_multiplier is not None:
            return self.config.noise_multiplier
        assert self.config.epsilon is not None
        return noise_multiplier_for(self.config.accountant, self.config.epsilon, self.rate, self.steps, self.delta)

    def epsilon(self, steps: int) -> float:
        """What ``steps`` optimizer steps have spent, at ``delta``."""
        return epsilon_spent(self.config.accountant, self.noise_multiplier, self.rate, steps, self.delta)


def account_for(config: PrivacyConfig, streams: Mapping[str, Stream], *, steps: int) -> Accounting:
    """The accounting of a training of ``steps`` steps on ``streams``.

    Raises UserError without Opacus, for a stream that draws its batches in another way, for packed corpora, and for
    amounts that the accountant cannot show.
    """
    if importlib.util.find_spec("opacus") is None:
        raise UserError("training.privacy needs the library Opacus; install it with `pip install 'isoray[privacy]'`.")
    if len(streams) > 1:
        raise _no_sum(f"an objective with the roles {', '.join(streams)}")
    for stream in streams.values():
        if not isinstance(stream, PoissonStream):
            raise UserError(
                "training.privacy: this kind of training draws its batches so that the guarantee would not hold "
                "(every example must be drawn by itself). Only ordinary fine-tuning can be private; set it to null."
            )
        if packed := [store.name for store in stream.stores if _is_packed(store)]:
            raise _packed(packed)
    (stream,) = streams.values()
    assert isinstance(stream, PoissonStream)
    if stream.examples == 1 and config.delta is None:
        raise UserError("training.privacy: one example alone cannot be hidden among others; give more examples.")
    accounting = Accounting(config, stream.examples, stream.batch_size, steps)
    accounting.epsilon(steps)  # what cannot be accounted for is said before anything is trained
    return accounting


class PrivateUpdates:
    """One private optimizer step after the other: the sum of the examples' clipped gradients, noise, the update.

    The gradient is divided by the *expected* batch size: the batch's own would tell how many examples there were.

    Raises UserError for whatever would break the guarantee.
    """

    def __init__(
        self,
        parallel: Parallel,
        objective: Objective,
        optimizer: Optimizer,
        parameters: list[nn.Parameter],
        check_gradient: Callable[[Tensor, int], Tensor],
        accounting: Accounting,
        *,
        seed: int,
    ) -> None:
        _check_supported(parallel, objective, parameters)
        from isoray.training.per_example import PerExampleGradients

        self._parallel, self._optimizer = parallel, optimizer
        self._parameters, self._check_gradient = parameters, check_gradient
        self._accounting, self._seed = accounting, seed
        config = accounting.config
        self._gradients = PerExampleGradients(
            parallel.model, parameters, clip_norm=config.clip_norm, clipping=config.clipping
        )

    def take(
        self, micro_batches: list[dict[str, Batch]], step: int, *, measure: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
        """Take step ``step``; the sum of the examples' losses, their number, and the noisy gradient's norm if measured.

        A step that drew no example takes a step of noise alone and has no sum. Raises NumericError for a measured norm
        that is not finite.
        """
        config = self._accounting.config
        optimizer = self._gradients.optimizer(
            self._optimizer,
            noise_multiplier=self._accounting.noise_multiplier,
            generator=None if config.secure else self._generator(step),
        )
        sums: dict[str, Tensor] = {}
        count = torch.zeros((), dtype=torch.int64, device=self._parallel.ranks.device)
        for batches in micro_batches:
            batch = batches["train"]
            if "segment_ids" in batch:
                raise _packed(["a block of this step"])
            nll_B = self._gradients.add(batch, optimizer, self._parallel.call)
            sums["nll"] = sums.get("nll", torch.zeros_like(nll_B[0])) + nll_B.sum()
            count = count + (label_counts(batch) > 0).sum()
        self._add_noise(optimizer)
        norm = None
        if measure:
            norm = self._check_gradient(self._parallel.gradient_norm(self._parameters), step)
        self._optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sums, {"nll": count}, norm

    def _generator(self, step: int) -> torch.Generator:
        device = self._parallel.ranks.device
        return torch.Generator(device).manual_seed(int(digest_of([self._seed, step, "privacy noise"]), 16))

    def _add_noise(self, optimizer: Any) -> None:
        """From the sums of clipped gradients to the gradients that the weights are updated by."""
        for parameter in self._parameters:
            summed: Any = parameter
            if summed.summed_grad is None:  # no example was drawn
                summed.summed_grad = torch.zeros_like(parameter)
        config = self._accounting.config
        if config.secure:
            std = self._accounting.noise_multiplier * config.clip_norm
            for parameter in self._parameters:
                summed = parameter
                parameter.grad = summed.summed_grad + system_noise(parameter, std)
        else:
            optimizer.add_noise()
        for parameter in self._parameters:
            assert parameter.grad is not None
            parameter.grad /= self._accounting.batch_size


def system_noise(like: Tensor, std: float) -> Tensor:
    """Gaussian noise in the shape, dtype and place of ``like``, from the operating system's randomness.

    Each value is half the sum of four draws, against attacks on the gaps between floating-point numbers (Holohan and
    Braghin, 2021).
    """
    noise = torch.empty(like.numel(), dtype=torch.float64)
    for piece in torch.split(noise, 2**18):
        words = np.frombuffer(os.urandom(32 * len(piece)), np.uint64)
        uniform = torch.from_numpy(((words >> np.uint64(12)) + 0.5) * 2.0**-52)  # strictly between 0 and 1
        piece.copy_(torch.special.ndtri(uniform).view(-1, 4).sum(dim=1) / 2)
    return (noise * std).to(like).view_as(like)


def write_privacy(folder: Path, accounting: Accounting, *, steps: int) -> None:
    """Say beside the model in ``folder`` what its ``steps`` private steps guarantee."""
    import opacus

    config = accounting.config
    told = {
        "epsilon": accounting.epsilon(steps),
        "delta": accounting.delta,
        "noise_multiplier": accounting.noise_multiplier,
        "clip_norm": config.clip_norm,
        "sample_rate": accounting.rate,
        "steps": steps,
        "accountant": config.accountant,
        "unit": UNIT,
        "examples": accounting.examples,
        "secure": config.secure,
        "opacus": opacus.__version__,
    }
    (folder / FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def read_privacy(folder: Path) -> dict[str, Any] | None:
    """What :func:`write_privacy` wrote beside the model in ``folder``; None where it was not trained privately."""
    try:
        told: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return told


def _check_supported(parallel: Parallel, objective: Objective, parameters: Sequence[nn.Parameter]) -> None:
    """Raises UserError for a training whose examples cannot be kept apart, or not exactly enough."""
    compute = parallel.compute
    if parallel.ranks.world > 1:
        raise UserError("training.privacy: private training runs on one worker; set scaling.workers to 1.")
    for name in ("compile", "activation_checkpointing"):
        if getattr(compute, name):
            raise UserError(f"training.privacy: Opacus sees no layers through compute.{name}; set it to false.")
    if compute.precision != "fp32" or any(p.dtype not in (torch.float32, torch.float64) for p in parameters):
        raise UserError(
            "training.privacy: norms rounded to bf16 would let gradients pass that are longer than clip_norm; set "
            "compute.precision to fp32, and model.dtype too where all weights are trained."
        )
    if plain(parallel.model).config.is_encoder_decoder:
        raise UserError("training.privacy: encoder-decoder models are not supported; choose a causal model.")
    if type(objective) is not LanguageModelling or objective.config.average != "example":
        raise _no_sum(f"the objective `{objective.kind}` with these settings")


def _no_sum(objective: str) -> UserError:
    return UserError(
        "training.privacy clips the gradient of each example, so the loss must be a sum of terms that hang on one "
        f"example each; that of {objective} is not. Set the objective's kind to lm and its average to example."
    )


def _is_packed(store: Blocks) -> bool:
    base: Any = store
    while hasattr(base, "base"):  # a view
        base = base.base
    manifest = getattr(base, "manifest", None)  # stores in memory have none
    return manifest is not None and (manifest.packed or manifest.segments > manifest.blocks)


def _packed(names: Sequence[str]) -> UserError:
    return UserError(
        f"training.privacy: {', '.join(names)} holds several documents, but the unit of privacy is one example and a "
        "block counts as one. Build the corpus with `packing: false`."
    )
