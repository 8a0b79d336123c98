"""bench/gpu_tune.py as far as it can be tried without a GPU: its variants, checks and table."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_tune, variants
from bench.gpu_tune import MAIN, Candidate, tuned_cases
from bench.turns import OUT_OF_TIME
from bench.variants import FEW_DTYPES, TODAY, VARIANTS, Variant, load_triton, substitute
from radam_kernels.fingerprint import measured_fingerprint

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SMALLER = ("CHUNK = 4096 ", "CHUNK = 1024 ")
WRONG = {
    "a wrong sign": ("one_minus_beta1 * (g - m)", "one_minus_beta1 * (g + m)"),
    "a chunk in the middle": ("if action != _SKIP:", "if (action != _SKIP) & (chunk != 1):"),
}


def script(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def broken_tools(tmp_path):
    """A folder of a compiler and a cmake that fails."""
    folder = tmp_path / "tools"
    folder.mkdir()
    script(folder, "nvcc", "exit 1")
    script(folder, "cmake", "echo 'step_cuda.cu(3): error: expected a semicolon'; exit 1")
    return folder


def tune(candidates, file: Path, *, minutes: float = 1.0):
    deadline = time.monotonic() + 60 * minutes
    return gpu_tune.run(tuned_cases(True)[:1], candidates, CPU, file, deadline, 0.1)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_every_variant_applies_to_the_sources(variant):
    before = (ROOT / variant.source).read_text()
    after = substitute(before, variant.changes)
    assert (after == before) == (not variant.changes)
    assert variant.triton or substitute(after, [FEW_DTYPES]) != after


def test_variants_differ_and_hold_todays_kernels():
    assert len({v.name for v in VARIANTS}) == len(VARIANTS)
    texts = [(v.source, substitute((ROOT / v.source).read_text(), v.changes)) for v in VARIANTS]
    assert len(set(texts)) == len(VARIANTS) - 1, "but for today's, which is there twice"
    assert {*gpu_tune.DRY_VARIANTS, variants.TRITON_TODAY} <= {v.name for v in VARIANTS}


@pytest.mark.parametrize(("text", "times"), [("b", 0), ("a; a;", 2)])
def test_a_change_that_is_not_there_once_is_named(text, times):
    with pytest.raises(ValueError, match=f"found {times} times: 'a;'"):
        substitute(text, [("a;", "b;")])


def test_three_dots_stand_for_anything():
    assert substitute("x(1, 2); y(3);", [("x( ... );", "z();")]) == "z(); y(3);"


def test_a_dry_run_measures_and_says_what_does_not_build(tmp_path, broken_tools):
    command = ["bash", str(ROOT / "bench" / "gpu_report.sh"), "--dry-run", "--stage", "tune"]
    path = f"{broken_tools}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        [*command, "--out", tmp_path],
        env={**os.environ, "PATH": path, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    log = (tmp_path / "tune.log").read_text()
    assert run.returncode == 1, log
    assert "it does not build: step_cuda.cu(3): error: expected a semicolon" in log
    assert (tmp_path / "report.txt").read_text().startswith("tune\tfailed\t")
    assert re.search(rf"^> {TODAY} .*%", log, re.MULTILINE), log
    found = json.loads((tmp_path / "tune.json").read_text())
    assert found["dry_run"] is True
    assert found["sources"] == measured_fingerprint(ROOT)
    assert list(found["cases"]) == [tuned.name for tuned in tuned_cases(True)]
    for case in found["cases"].values():
        assert case["rows"][TODAY]["device_ms"]["median"] > 0
        assert case["rows"][TODAY]["copy_share"] > 0


@pytest.mark.parametrize("fault", WRONG)
def test_a_variant_that_is_wrong_has_no_speed(tmp_path, fault):
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("the kernel is interpreted only where there is no GPU")
    names = ("right", "wrong")
    changes = (SMALLER,), (SMALLER, WRONG[fault])
    made = [Variant(f"{n}, {fault}", c, True) for n, c in zip(names, changes, strict=True)]
    candidates = [Candidate(v, load_triton(v, tmp_path)) for v in made]
    results = tune(candidates, tmp_path / "tune.json")
    right, wrong = (results["cases"][MAIN]["rows"][v.name] for v in made)
    assert "device_ms" in right
    assert "off by" in wrong["wrong"] or "other bits" in wrong["wrong"]
    assert "device_ms" not in wrong
    assert any("WRONG" in line for line in gpu_tune.table(results))


def test_todays_kernels_are_in_force_again_afterwards(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    before = gpu_tune.triton_.CHUNK, gpu_tune.triton_.launch_, gpu_tune.cuda._cuda
    variant = next(v for v in VARIANTS if v.name == "triton: 1024 by 4 warps")
    tune([Candidate(variant, load_triton(variant, tmp_path))], tmp_path / "tune.json")
    assert before == (gpu_tune.triton_.CHUNK, gpu_tune.triton_.launch_, gpu_tune.cuda._cuda)


def test_what_does_not_build_or_lacks_time_is_told(tmp_path, monkeypatch, broken_tools):
    monkeypatch.setenv("PATH", f"{broken_tools}{os.pathsep}{os.environ['PATH']}")
    some = [v for v in VARIANTS if not v.triton][:2]
    soon = time.monotonic() + 60
    for until, reason in ((soon, "expected a semicolon"), (soon - 60, OUT_OF_TIME)):
        built = gpu_tune.build_all(some, tmp_path / reason, "90-real", until)
        assert [reason in c.not_measured for c in built.values()] == [True, True]
    results = tune([Candidate(Variant(TODAY)), built[some[1].name]], tmp_path / "tune.json")
    assert results["cases"][MAIN]["rows"][some[1].name]["not_measured"] == OUT_OF_TIME
    none = tune([Candidate(Variant(TODAY))], tmp_path / "tune.json", minutes=-1)
    assert none["cases"][MAIN]["rows"][TODAY]["not_measured"] == OUT_OF_TIME
    assert json.loads((tmp_path / "tune.json").read_text())["cases"] == none["cases"]


def test_a_variant_that_breaks_the_device_is_named(tmp_path, monkeypatch):
    def lost(*arguments):
        raise gpu_tune.DeviceLostError("unroll 2: the device failed")

    monkeypatch.setattr(gpu_tune, "refusals", lost)
    rows = tune([Candidate(Variant(TODAY))], tmp_path / "tune.json")["cases"][MAIN]["rows"]
    assert rows[TODAY]["not_measured"] == "unroll 2: the device failed"


def test_the_best_comes_first_and_spills_are_marked(tmp_path):
    names = TODAY, "better", "worse"
    results = tune([Candidate(Variant(n)) for n in names], tmp_path / "tune.json")
    for name, share in zip(names, (0.8, 0.9, 0.7), strict=True):
        results["cases"][MAIN]["rows"][name]["copy_share"] = share
    code = {"registers": 40, "stack": 16}
    results["variants"]["better"]["machine_code"] = {"float32/float32/float32": code}
    lines = gpu_tune.table(results)
    assert [line.split()[0] for line in lines[1:4]] == ["better", ">", "worse"]
    assert "40*" in lines[1]
    assert "90.0%" in lines[1]
