"""The package as a wheel: installed away from the checkout, it has all that it needs."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import World, build_world, run_values, write_yaml

ROOT = Path(__file__).parents[1]
# `pip wheel` writes beside what it builds, so that a copy is built.
_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "pcscale", "recipes", "deepspeed_configs")
Program = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheel")


@pytest.fixture(scope="module")
def wheel(folder: Path) -> Path:
    source = folder / "source"
    source.mkdir()
    for name in _SOURCES:
        original = ROOT / name
        if original.is_dir():
            shutil.copytree(original, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(original, source)
    _run(sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def program(wheel: Path, folder: Path) -> Program:
    """`program("python", ...)`: run a program of an environment that has the wheel; returns standard output.

    Its dependencies are this environment's, whose own `.pth` files, such as that of an editable install, are not read.
    """
    environment = folder / "environment"
    _run(sys.executable, "-m", "venv", "--without-pip", environment)
    packages = Path(_run(environment / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--python", environment / "bin/python")
    _run(*pip, "install", "--no-deps", "--no-index", wheel)
    return lambda name, *arguments: _run(environment / "bin" / name, *arguments, folder=folder)


@pytest.fixture(scope="module")
def world(folder: Path) -> World:
    return build_world(folder)


def _run(*command: str | Path, folder: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_has_the_licence_types_templates_recipes_and_deepspeed_files(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    data = {name.removeprefix("pcscale/") for name in names if name.startswith("pcscale/")}
    assert {"py.typed", "reporting/report.html.j2", "reporting/report.css"} <= data
    for kept in ("recipes/*.yaml", "recipes/*.sh", "deepspeed_configs/*.json"):
        files = {str(path.relative_to(ROOT)) for path in ROOT.glob(kept)}
        assert files
        assert files <= data
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "tools", "benchmarks", "examples")) for name in names)


def test_its_recipes_are_listed_and_copied(program: Program, folder: Path) -> None:
    listed = json.loads(program("pcscale", "recipes", "--json"))["recipes"]
    known = [path.stem for path in ROOT.glob("recipes/*") if path.suffix in (".yaml", ".sh")]
    assert sorted(recipe["name"] for recipe in listed) == sorted(known)
    program("pcscale", "recipes", "smollm2-half")
    copied = (folder / "smollm2-half.yaml").read_text(encoding="utf-8")
    assert copied == (ROOT / "recipes" / "smollm2-half.yaml").read_text(encoding="utf-8")


def test_its_deepspeed_files_are_found_by_name(program: Program, folder: Path) -> None:
    code = "from pcscale.config.files import resolve_deepspeed; print(resolve_deepspeed('zero3_offload_cpu'))"
    path = Path(program("python", "-c", code))
    assert path.is_relative_to(folder / "environment")
    assert path.read_bytes() == (ROOT / "deepspeed_configs" / "zero3_offload_cpu.json").read_bytes()


@pytest.mark.slow
def test_a_whole_job_runs_with_it(program: Program, world: World, folder: Path) -> None:
    assert Path(program("python", "-c", "import pcscale; print(pcscale.__file__)")).is_relative_to(
        folder / "environment"
    )
    run = folder / "run"
    yaml = write_yaml(folder / "run.yaml", run_values(world, run, max_steps=2))
    report = json.loads(program("pcscale", "compress", yaml, "--json", "--quiet"))
    assert report["evaluation"]["compressed"]["loss"] > 0
    assert (run / "merged" / "model.safetensors").exists()
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")
