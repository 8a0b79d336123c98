"""A wheel built from the sdist: what is in it, and that it trains."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("cmake", "ninja", "c++")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not run from a source tree"),
    pytest.mark.skipif(
        not all(map(shutil.which, TOOLS)), reason=f"builds with {', '.join(TOOLS)}; one is missing"
    ),
]

# As pip does. The tree is read-only for what asks before it writes; root could write all the same.
BUILD = """
import os, sys
from setuptools import build_meta
if sys.argv[1] == "wheel":
    os.access = lambda path, mode: mode != os.W_OK
print(getattr(build_meta, f"build_{sys.argv[1]}")(sys.argv[2]))
"""

TRAIN = """
import torch
from radam_kernels import RAdam
param = torch.ones(3, requires_grad=True)
optimizer = RAdam([param], lr=0.1, backend="cpu")
for _ in range(3):
    param.grad = torch.ones(3)
    optimizer.step()
print(param.tolist())
"""


def build(kind: str, tree: Path, out: Path) -> Path:
    environment = {**os.environ, "RADAM_CUDA": "0"}
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return out / done.stdout.splitlines()[-1]


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def tracked() -> set[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git repository")
    return {Path(name) for name in listed.stdout.split("\0") if name}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The sdist, unpacked where a path has spaces and letters that are not ASCII."""
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("Bäume mit Lücken")
    for name in tracked():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name, follow_symlinks=False)
    with tarfile.open(build("sdist", clone, out)) as archive:
        archive.extractall(out, filter="data")
    (found,) = (path for path in out.iterdir() if path.is_dir())
    return found


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    before = files(sources)
    built = build("wheel", sources, tmp_path_factory.mktemp("wheel"))
    assert files(sources) == before, "a build wrote into a tree that is read-only"
    return built


def test_the_sdist_has_all_that_git_has_but_for_the_tools_of_its_repository(sources):
    left_out = {path for path in tracked() - files(sources) if path.parts[0] != "docs"}
    assert {path.parts[0] for path in left_out} <= {
        ".ci",
        ".clang-format",
        ".github",
        ".gitignore",
        "mkdocs.yml",
    }


def test_the_wheel_has_the_package_and_nothing_else(wheel, sources):
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(n) for n in archive.namelist() if ".dist-info/" not in n and n[-1] != "/"}
    compiled = {name for name in names if name.suffix == ".so"}
    assert [name.name.partition(".")[0] for name in compiled] == ["_cpu"]
    packaged = {path for path in files(sources) if path.parts[0] == "radam_kernels"}
    assert names - compiled == packaged


def test_a_wheel_needs_torch_and_numpy_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    needed = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert {re.match(r"\w+", requirement)[0] for requirement in needed} == {"torch", "numpy"}


def test_a_wheel_trains(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # Without `site`, an editable install has no say in where the package is.
    path = os.pathsep.join([str(tmp_path), str(Path(torch.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-S", "-c", TRAIN],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    steps = [float(number) for number in done.stdout.strip("[]\n").split(",")]
    assert steps == pytest.approx([1 - 3 * 0.1] * 3)
