"""The profile of a step by its stages."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bench import step_profile

pytestmark = pytest.mark.bench


def test_the_profile_names_all_stages_and_leaves_a_trace(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    options = ["--case", "1,000 tensors of 64 float32", "--device", "cpu", "--steps", "3"]
    assert step_profile.main([*options, "--trace", str(trace), "--new-gradients"]) == 0
    printed = capsys.readouterr().out
    for row in (*step_profile.STAGES, "the rest", "step()"):
        assert f"\n{row} " in printed
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {f"radam_kernels.{stage}" for stage in step_profile.STAGES} <= names


def test_nsys_missing_is_said_plainly(tmp_path):
    script = Path(step_profile.__file__).with_name("nsys.sh")
    (tmp_path / "bash").symlink_to(shutil.which("bash"))
    done = subprocess.run(
        [str(script)], env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "nsys is not on PATH" in done.stderr
