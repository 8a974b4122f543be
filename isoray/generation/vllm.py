"""The vLLM engine: the contrast as one vLLM model, with vLLM's scheduling, paged caches and tensor parallelism."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from isoray.errors import DataError, UserError
from isoray.generation.contrast import ContrastConfig, Role
from isoray.generation.engine import (
    Completion,
    Delta,
    Engine,
    Finish,
    Prompt,
    Request,
    TokenScores,
    failed,
    not_numbers,
    token_scores,
)
from isoray.generation.folder import make_contrast_folder, read_spec
from isoray.generation.vllm_plugin import KEY, LOAD_FORMAT
from isoray.models.config import Dtype, LoadOptions
from isoray.models.load import load_tokenizer

DTYPES: dict[Dtype, Any] = {"fp32": "float32", "bf16": "bfloat16"}
INSTALL = "pip install 'isoray[vllm]' (on CPUs, in a checkout: make install)"


class VllmEngine(Engine):
    """Serves contrasts at vLLM's speed. Beams are the Transformers engine's."""

    class Config(Engine.Config):
        """The vLLM engine."""

        kind: Literal["vllm"] = "vllm"
        """The contrast as a model of vLLM's."""
        dtype: Dtype = "fp32"
        """How weights are held and computed with; the contrast itself is always taken in float32."""
        tensor_parallel: int = Field(default=1, ge=1)
        """GPUs that each model is split over."""
        memory_share: float = Field(default=0.9, gt=0, le=1)
        """GPU memory that the engine may take, models and caches together; several engines share a GPU by it."""
        cache_gib: int = Field(default=1, ge=1)
        """On CPUs: memory of the key-value caches of all models together."""
        pin_threads: bool = True
        """On CPUs: tie each compute thread to a core of its own; not where several engines share the cores."""
        compile: bool = False
        """Let vLLM compile the models: a longer start, more tokens per second; on GPUs CUDA graphs, too."""
        prefix_caching: bool = False
        """Keep the caches of prompts for later prompts that begin alike. Saves their computation; results may then
        differ in the last bits by what came before."""
        folder: str | None = None
        """Where the contrast folder is written; default: a temporary one. It names the models and copies no weights."""

    config: Config

    def __init__(self, config: Config, contrast: ContrastConfig) -> None:
        """Loads the contrast's models from their folders. Raises UserError where vLLM is missing or refuses them."""
        super().__init__(config)
        self.contrast = contrast
        self._scratch = None if config.folder else Path(tempfile.mkdtemp(prefix="isoray-vllm-"))
        try:
            out = self._scratch / "contrast" if self._scratch else Path(str(config.folder))
            folder = make_contrast_folder(contrast, out, LoadOptions(dtype=config.dtype))
            self.tokenizer = load_tokenizer(folder)
            self.vocabulary = int(read_spec(folder)["vocabulary"])
            self._engine = _start(config, folder)
        except BaseException:
            self._remove_scratch()
            raise
        self.context = int(self._engine.vllm_config.model_config.max_model_len)
        self._end = self._end_tokens()
        self._requests: dict[str, Request] = {}
        self._refused: list[Delta] = []
        self._text: dict[str, str] = {}

    @property
    def busy(self) -> bool:
        """Whether some request is waiting or under way."""
        return bool(self._requests or self._refused)

    def add(self, request: Request) -> None:
        """Take a request; it is worked on from the next step on."""
        sampling = request.sampling
        try:
            if sampling.beams > 1:
                raise DataError("the vLLM engine has no beams; use the transformers engine")
            prompt_ids = self.encode(request.prompt)
        except DataError as error:
            self._refused.append(failed(request, str(error)))
            return
        self._requests[request.id] = request
        self._engine.add_request(request.id, {"prompt_token_ids": prompt_ids}, self._params(request))

    def step(self) -> list[Delta]:
        """Compute at most one more token for each request under way."""
        deltas, self._refused = self._refused, []
        if self._requests:
            outputs = self._engine.step()
            broken = self._broken() if any(output.finished for output in outputs) else {}
            for name in broken.keys() & self._requests.keys():
                deltas.append(self._failed(name, broken[name]))
                self._engine.abort_request([name])
            known = self._requests.keys() - broken.keys()
            deltas += [self._delta(output) for output in outputs if output.request_id in known]
            for delta in deltas:
                if delta.completion is not None:
                    self._requests.pop(delta.id, None)
                    self._text.pop(delta.id, None)
        return deltas

    def cancel(self, request_id: str) -> None:
        """Drop a request, if it is still there."""
        self._refused = [delta for delta in self._refused if delta.id != request_id]
        if self._requests.pop(request_id, None) is not None:
            self._text.pop(request_id, None)
            self._engine.abort_request([request_id])

    def score(self, texts: Sequence[Prompt]) -> list[TokenScores]:
        """Log-probabilities of given texts under each model, in the order of ``texts``: a pass for each model."""
        assert not self.busy, "texts are scored between requests only"
        from vllm import SamplingParams

        encoded: dict[int, list[int]] = {}
        scores: dict[int, TokenScores] = {}
        for index, text in enumerate(texts):
            try:
                encoded[index] = self.encode(text)
            except DataError as error:
                scores[index] = TokenScores((), {}, f"text {index}: {error}")
        found: dict[int, dict[Role, tuple[float, ...]]] = {index: {} for index in encoded}
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        for role in self.contrast.models:
            self._tell("isoray_alone", role)
            try:
                for index, ids in encoded.items():
                    self._engine.add_request(f"score-{index}", {"prompt_token_ids": ids}, params)
                while self._engine.has_unfinished_requests():
                    for output in self._engine.step():
                        index = int(output.request_id.removeprefix("score-"))
                        found[index][role] = _prompt_log_probs(output, encoded[index])
            finally:
                self._tell("isoray_alone", None)
        scores |= {index: token_scores(index, ids, found[index]) for index, ids in encoded.items()}
        return [scores[index] for index in range(len(texts))]

    def update(self, role: Role, weights: Mapping[str, Tensor] | Path) -> None:
        """Replace weights of one model, in place, in all of vLLM's processes."""
        assert not self.busy, "weights change between requests only"
        if role not in self.contrast.models:
            raise UserError(f"The contrast has no {role} model; it has {', '.join(self.contrast.models)}.")
        if isinstance(weights, Path):
            self._tell("isoray_update", role, str(weights.absolute()))
        else:
            with tempfile.TemporaryDirectory(prefix="isoray-vllm-") as folder:
                plain = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
                save_file(plain, Path(folder) / "model.safetensors")
                self._tell("isoray_update", role, folder)
        self._engine.reset_prefix_cache()

    def close(self) -> None:
        """Free the models and end vLLM's processes."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.engine_core.shutdown()
            del engine
            _forget_process_groups()
        self._remove_scratch()

    def _remove_scratch(self) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _tell(self, method: str, *values: Any) -> list[Any]:
        return list(self._engine.collective_rpc(method, args=values))

    def _broken(self) -> dict[str, list[str]]:
        """The requests for which some model gave numbers that are none, since this was last asked."""
        return {name: roles for worker in self._tell("isoray_broken") for name, roles in worker.items()}

    def _end_tokens(self) -> list[int]:
        configured = self._engine.vllm_config.model_config.try_get_generation_config().get("eos_token_id")
        ids = configured if isinstance(configured, list) else [configured]
        return sorted({int(token) for token in (*ids, self.tokenizer.eos_token_id) if token is not None})

    def _params(self, request: Request) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        asked: dict[str, Any] = {"id": request.id}
        if sampling.alpha is not None:
            asked["alpha"] = sampling.alpha
        if sampling.gamma is not None:
            asked["gamma"] = sampling.gamma
        if sampling.eos == "forbid":
            asked["forbid"] = self._end
        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=request.seed,
            stop=list(sampling.stop) or None,
            stop_token_ids=self._end if sampling.eos == "stop" else None,
            ignore_eos=sampling.eos != "stop",
            logprobs=0,
            output_kind=RequestOutputKind.CUMULATIVE,
            extra_args={KEY: asked},
        )

    def _failed(self, name: str, roles: Sequence[str]) -> Delta:
        request = self._requests[name]
        return failed(request, not_numbers(roles), prompt_tokens=len(self.encode(request.prompt)))

    def _delta(self, output: Any) -> Delta:
        request = self._requests[output.request_id]
        (answer,) = output.outputs
        given = self._text.get(request.id, "")
        self._text[request.id] = answer.text
        piece = answer.text[len(given) :]
        if not output.finished:
            return Delta(request.id, piece)
        tokens = tuple(answer.token_ids)
        log_probs = tuple(step[token].logprob for token, step in zip(tokens, answer.logprobs, strict=True))
        ended = answer.finish_reason == "stop" and not isinstance(answer.stop_reason, str)
        finish: Finish = "length" if answer.finish_reason == "length" else "eos" if ended else "stop"
        completion = Completion(
            request.id, request.prompt, answer.text, tokens, log_probs, finish, len(output.prompt_token_ids)
        )
        return Delta(request.id, piece, completion)


def _start(config: VllmEngine.Config, folder: Path) -> Any:
    # In this process, so that which requests share a step does not depend on when they arrive.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "auto" if config.pin_threads else "nobind"
    with _quiet_start():
        return _engine(config, folder)


def _engine(config: VllmEngine.Config, folder: Path) -> Any:
    try:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as error:
        raise UserError(f"The vLLM engine needs vLLM: {INSTALL}. ({error})") from error
    length: dict[str, Any] = {} if config.context is None else {"max_model_len": config.context}
    args = EngineArgs(
        model=str(folder),
        load_format=LOAD_FORMAT,
        dtype=DTYPES[config.dtype],
        **length,
        max_num_seqs=config.slots,
        tensor_parallel_size=config.tensor_parallel,
        gpu_memory_utilization=config.memory_share,
        kv_cache_memory_bytes=None if torch.cuda.is_available() else config.cache_gib * 2**30,
        enforce_eager=not config.compile,
        enable_prefix_caching=config.prefix_caching,
        logits_processors=["isoray.generation.vllm_model:RowParameters"],
        worker_extension_cls="isoray.generation.vllm_worker.WorkerExtension",
        generation_config="vllm",
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )
    try:
        return LLMEngine.from_engine_args(args)
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"vLLM cannot start with the contrast in {folder}: {error}") from error


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Without the notices of vLLM's start, and with torch's own function afterwards where vLLM replaces it."""
    set_num_threads = torch.set_num_threads
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads = set_num_threads


def _prompt_log_probs(output: Any, ids: Sequence[int]) -> tuple[float, ...]:
    found = output.prompt_logprobs or []
    return tuple(float(step[token].logprob) for token, step in zip(ids[1:], found[1:], strict=True))


def _forget_process_groups() -> None:
    """Let another engine start in this process: vLLM's groups of processes are global."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
