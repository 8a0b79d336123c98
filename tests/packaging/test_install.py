"""Imports of a package that is not built, or built from other sources; and what is packaged."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from radam_kernels import modules
from radam_kernels.fingerprint import fingerprint

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(modules.__file__).parent
in_tree = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not run from a source tree")


def copy(to: Path, *, csrc: bool = True, compiled: bool = True) -> Path:
    """A copy of the package, as a clone or as an installed one."""
    ignored = shutil.ignore_patterns("__pycache__", *([] if compiled else ["*.so", "*.pyd"]))
    shutil.copytree(PACKAGE, to / "radam_kernels", ignore=ignored)
    if compiled:  # an editable install keeps its modules here; any other one, where it installed
        for name in ("_cpu", "_cuda"):
            if module := modules.load_optional(name):
                shutil.copy(module.__file__, to / "radam_kernels")
    if csrc:
        shutil.copytree(ROOT / "csrc", to / "csrc")
    return to


def imported(tree: Path) -> subprocess.CompletedProcess:
    # Without `site`, an editable install has no say in where the modules of the package are.
    path = os.pathsep.join([str(tree), str(Path(torch.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", "-c", "import radam_kernels; print(radam_kernels.__file__)"]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def refusal(tree: Path) -> str:
    done = imported(tree)
    assert done.returncode != 0, done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: "), done.stderr
    return last


@in_tree
def test_a_source_tree_that_is_not_built_says_so(tmp_path):
    message = refusal(copy(tmp_path, compiled=False))
    assert "source tree is not built" in message
    assert "_cpu" in message
    assert f"run `pip install -e .` in {tmp_path}" in message


@in_tree
def test_modules_of_other_sources_say_so(tmp_path):
    tree = copy(tmp_path)
    (tree / "csrc" / "core" / "more.h").touch()
    assert fingerprint(tree) != modules.cpu.fingerprint
    header = tree / "csrc" / "core" / "update.h"
    header.write_text(header.read_text() + "int more;\n")
    message = refusal(tree)
    assert "was built from other sources" in message
    assert modules.cpu.fingerprint in message
    assert fingerprint(tree) in message
    assert f"run `pip install -e .` in {tmp_path}" in message


@in_tree
def test_modules_of_these_sources_are_imported(tmp_path):
    done = imported(copy(tmp_path))
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


def test_an_installed_package_needs_no_sources(tmp_path):
    done = imported(copy(tmp_path, csrc=False))
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


def test_an_installed_package_without_its_modules_says_so(tmp_path):
    message = refusal(copy(tmp_path, csrc=False, compiled=False))
    assert "it was not installed" in message
    assert "pip install --force-reinstall" in message


def test_the_compiled_modules_carry_the_fingerprint_of_their_sources():
    assert re.fullmatch("[0-9a-f]{12}", modules.cpu.fingerprint)
    if cuda := modules.load_optional("_cuda"):
        assert cuda.fingerprint == modules.cpu.fingerprint


@in_tree
def test_every_folder_of_the_package_is_packaged_and_no_other():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib comes with Python 3.11")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (ROOT / "radam_kernels").rglob("*.py")}
    assert sorted(packages) == sorted(
        str(folder.relative_to(ROOT)).replace("/", ".") for folder in folders
    )


@in_tree
def test_setup_declares_both_modules(monkeypatch):
    # An editable install holds the extensions it was told of, and no others.
    import runpy

    setuptools = pytest.importorskip("setuptools")
    told = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: told.update(options))
    runpy.run_path(str(ROOT / "setup.py"))
    names = [extension.name for extension in told["ext_modules"]]
    assert names == ["radam_kernels._cpu", "radam_kernels._cuda"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has several")
def test_the_cpu_kernel_finds_the_instruction_sets_of_this_cpu():
    """Some compilers' runtimes do not tell a program of them."""
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    has = set(found[1].split())
    v3 = {"avx2", "bmi1", "bmi2", "fma"} <= has
    v4 = v3 and {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"} <= has
    levels = ["x86-64-v4"] * v4 + ["x86-64-v3"] * v3 + ["baseline"]
    assert list(modules.cpu.instruction_sets) == levels
