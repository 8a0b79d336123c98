"""Imports of a package that is not built, built from other sources, or without the GIL; and what is
packaged."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from radam_kernels import modules
from radam_kernels.fingerprint import fingerprint

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(modules.__file__).parent
in_tree = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not run from a source tree")


def copy(to: Path, *, csrc: bool = (ROOT / "csrc").is_dir(), compiled: bool = True) -> Path:
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


def imported(
    tree: Path, *options: str, before: str = "", **variables: str
) -> subprocess.CompletedProcess:
    """Imports the package after the statement `before`, under Python's `options`."""
    # Without `site`, an editable install has no say in where the modules of the package are.
    path = os.pathsep.join([str(tree), str(Path(torch.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **variables}
    script = f"{before}\nimport radam_kernels\nprint(radam_kernels.__file__)"
    command = [sys.executable, *options, "-S", "-c", script]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def refusal(tree: Path, *options: str, before: str = "", **variables: str) -> str:
    done = imported(tree, *options, before=before, **variables)
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


def check_refusal_without_gil(message: str) -> None:
    assert "can't run without the GIL" in message
    assert "only the GIL protects" in message
    assert "Unset PYTHON_GIL" in message


@pytest.mark.parametrize("again", [False, True])
def test_python_without_the_gil_is_refused(tmp_path, again):
    before = "import sys\nsys._is_gil_enabled = lambda: False"
    if again:  # once loaded, the compiled module is found in sys.modules
        before += "\ntry:\n    import radam_kernels\nexcept ImportError:\n    pass"
    check_refusal_without_gil(refusal(copy(tmp_path), before=before))


free_threaded = pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="not a free-threaded Python"
)


@free_threaded
@pytest.mark.parametrize("before", ["", "import torch"])
def test_a_free_threaded_python_told_to_disable_the_gil_is_refused(tmp_path, before):
    tree = copy(tmp_path)
    check_refusal_without_gil(refusal(tree, before=before, PYTHON_GIL="0"))
    check_refusal_without_gil(refusal(tree, "-X", "gil=0", before=before))


# What a free-threaded Python does while another thread runs without the GIL.
ENABLES = """
import sys
import threading

import torch

assert not sys._is_gil_enabled(), "a module that torch loads needs the GIL"
over = threading.Event()
box = {}


def work():
    while not over.is_set():
        box["x"] = [box.get("x"), torch.ones(1)][1:]


threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
from radam_kernels import RAdam

assert sys._is_gil_enabled()
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
RAdam([p]).step()
over.set()
for thread in threads:
    thread.join()
assert sys._is_gil_enabled()
"""


@free_threaded
def test_a_free_threaded_python_enables_the_gil(tmp_path):
    done = imported(copy(tmp_path), before=ENABLES, PYTHON_GIL="")
    assert done.returncode == 0, done.stderr
    assert "has been enabled to load module 'radam_kernels._cpu'" in done.stderr


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
