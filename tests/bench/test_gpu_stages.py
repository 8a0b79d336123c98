"""`python -m bench gpu`, as far as it can be tried without a GPU."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import stages, tune
from bench.gpu.stages import Run
from bench.results import ROOT
from radam_kernels import RAdam
from radam_kernels.fingerprint import measured_fingerprint


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path, deadline=time.monotonic() + 60)


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Makes a shell script that stands for a tool on the PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return make


@pytest.mark.slow
def test_a_dry_run_goes_through_every_stage(tmp_path):
    status = stages.main(["--dry-run", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "stages.json").read_text())
    assert status == 0, found
    assert list(found) == list(stages.STAGES)
    expected = dict.fromkeys(("sanitize", "ncu", "nsys"), "skipped")
    for name, stage in found.items():
        assert stage["status"] == expected.get(name, "ok"), stage
        assert stage["sources"] == measured_fingerprint(ROOT)
    assert (tmp_path / "results.json").exists()
    tuned = json.loads((tmp_path / "tune.json").read_text())
    names = {row["optimizer"] for row in tuned["rows"] if row["status"] == "measured"}
    assert {tune.TODAY, tune.TRITON_TODAY} <= names


def test_a_stage_that_was_ok_is_not_run_again_unless_named(run, monkeypatch, capsys):
    calls = []

    def stage(name: str, status: str):
        return (lambda _: calls.append(name) or stages.Outcome(status, "")), 9

    monkeypatch.setattr(
        stages, "STAGES", {"build": stage("build", "ok"), "test": stage("test", "failed")}
    )
    assert stages.go_through(["build", "test"], run, 60, again=False) == 1
    assert stages.go_through(["build", "test"], run, 60, again=False) == 1
    assert calls == ["build", "test", "test"]
    stages.go_through(["build"], run, 60, again=True)
    assert calls[3:] == ["build"]
    # Other sources make it run again.
    kept = json.loads((run.out / stages.FILE).read_text())
    kept["build"]["sources"] = "0123456789ab"
    (run.out / stages.FILE).write_text(json.dumps(kept))
    stages.go_through(["build"], run, 60, again=False)
    assert calls[4:] == ["build"]
    assert stages.go_through(["build"], run, -1, again=True) == 1, "no time is a failure"
    assert calls[5:] == []


def test_a_command_that_takes_too_long_ends_with_its_children(run):
    run.deadline = time.monotonic() + 1
    begin = time.monotonic()
    assert run.call("log", ["sh", "-c", "sleep 60 & echo $! && wait"]) == 124
    assert time.monotonic() - begin < 30
    child = int((run.logs / "log.log").read_text())
    state = Path(f"/proc/{child}/stat")
    while state.exists() and state.read_text().split()[2] != "Z":  # or this test hangs
        time.sleep(0.01)
    assert run.why("log", 124) == "out of time"


JUNIT = '<testsuites><testsuite tests="{}" failures="{}" errors="0" skipped="1"/></testsuites>'


@pytest.mark.parametrize(
    ("script", "status", "reason"),
    [
        ("exit 0", "ok", "5 tests"),
        ("exit 86", "failed", "exit status 86"),
        ("exit 1", "failed", "exit status 1"),  # a test failed
        ("rm $junit; echo Device not supported; exit 1", "skipped", "Device not supported"),
        ("rm $junit; exit 0", "skipped", "exit status 0"),
    ],
)
def test_the_sanitizer_counts_only_where_tests_ran(run, tool, script, status, reason):
    find = "for word; do case $word in *.xml) junit=$word;; esac; done; "
    tool("compute-sanitizer", f"{find} echo '{JUNIT.format(5, 0)}' >$junit; {script}")
    found = stages.sanitize(run)
    assert found.status == status
    assert found.reason.count(reason) == len(stages.TOOLS)


def test_a_profiler_that_is_refused_is_no_failure(run, tool):
    tool("ncu", "echo '==ERROR== ERR_NVGPUCTRPERM: no permission'; exit 1")
    found = stages.ncu(run)
    assert found == ("skipped", "exit status 1: ==ERROR== ERR_NVGPUCTRPERM: no permission")


def test_a_profile_is_read_by_the_names_of_its_metrics(run, tool):
    name, metric = "radam_step_kernel", next(iter(stages.METRICS))
    head = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    lines = f'==PROF== Connected\n{head}\n"0","{name}","{metric}","%","93.5"'
    log = "for word; do case $word in *.csv) log=$word;; esac; done; "
    tool("ncu", f"{log} cat <<'E' >$log\n{lines}\nE\n")
    found = stages.ncu(run)
    assert found.status == "ok"
    assert "2^28 float32: 93.5 % of the peak bandwidth" in found.reason


def test_a_variant_is_built_with_its_macros_and_a_failure_says_why(tmp_path, tool):
    tool("cmake", 'echo "$@" >>' + str(tmp_path / "said") + "; echo 'error: no semicolon'; exit 1")
    variant = tune.Variant("a b", {"RADAM_VECTORS": 2, "RADAM_STREAMING": None})
    reason = tune.build(variant, tmp_path, "90", time.monotonic() + 60)
    assert "it does not build: error: no semicolon" in reason
    said = (tmp_path / "said").read_text()
    assert "-DCMAKE_CUDA_FLAGS=-DRADAM_VECTORS=2 -DRADAM_STREAMING" in said
    assert "-DRADAM_CUDA_ARCHS=90-real" in said
    macros = {name for v in tune.variants() for name in v.macros}
    files = (ROOT / "csrc" / "cuda").iterdir()
    source = "".join(file.read_text() for file in files)
    assert all(f"def {name}\n" in source for name in macros), "the kernel knows each macro"


def test_a_variant_with_other_bits_has_no_time(monkeypatch):
    device = torch.device("cpu")
    row = tune.Variant(tune.TODAY).optimizer(half=False)
    assert tune.refusals([tune.Variant(tune.TODAY)], [row], torch.float32, device) == {}

    class Off(RAdam):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for param in group["params"]:
                    self.state[param]["exp_avg_sq"][-1:] *= 1 + 2**-23

    monkeypatch.setattr(tune, "_Tuned", Off)
    found = tune.refusals([tune.Variant(tune.TODAY)], [row], torch.float32, device)
    assert found[tune.TODAY]["status"] == "wrong"
    assert "tensor 0 has other bits in 1 of" in found[tune.TODAY]["reason"]


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert stages.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err
    assert tune.main([]) == 2
    with pytest.raises(SystemExit):
        stages.main(["paint"])
    assert "paint" in capsys.readouterr().err
