"""`python -m radam_kernels doctor`, and the command line."""

import argparse
import subprocess
import sys
import sysconfig

import pytest
import torch

from radam_kernels import doctor
from radam_kernels.backends.cuda import NOT_BUILT


def test_the_doctor_finds_the_backends_that_work(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_SIZES", {"cpu": 1 << 16, "gpu": 1 << 16})
    assert doctor.main(argparse.Namespace()) == 0
    printed = capsys.readouterr().out
    for words in ("cpu           works on cpu", "reference     works on cpu", "same bits", "GB/s"):
        assert words in printed
    assert "All is well: RAdam takes the " in printed
    assert "cpu backend on cpu" in printed


@pytest.mark.parametrize(
    ("torchs_cuda", "built", "words", "no_words"),
    [
        (None, "no nvcc", "this torch has no CUDA to run it", "nvcc"),
        (None, "off", "this torch has no CUDA to run it", "RADAM_CUDA"),
        ("13.0", "no nvcc", "put CUDA's compiler on the PATH", "RADAM_CUDA"),
        ("13.0", "off", "RADAM_CUDA=0 was set", "nvcc"),
    ],
)
def test_the_doctor_says_why_the_cuda_kernel_is_missing(
    monkeypatch, torchs_cuda, built, words, no_words
):
    monkeypatch.setattr(torch.version, "cuda", torchs_cuda)
    monkeypatch.setattr(doctor, "load_optional", lambda name: None)
    monkeypatch.setattr(doctor, "NOT_BUILT", {doctor.cpu.cuda_built: NOT_BUILT[built]})
    said = doctor._facts()["cuda"]
    assert words in said
    assert no_words not in said


def test_the_doctor_tells_of_a_free_threaded_python(monkeypatch):
    words = "free-threaded, with the GIL"
    assert (words in doctor._facts()["python"]) == bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    monkeypatch.setattr(sysconfig, "get_config_var", {"Py_GIL_DISABLED": 1}.get)
    assert words in doctor._facts()["python"]


def test_the_doctor_says_what_a_torch_lacks(monkeypatch):
    for name in ("FULLY_SHARDS_ON_CPU", "COMPILES_VIEWS"):
        monkeypatch.setattr(doctor, name, False)
    said = doctor._facts()["torch lacks"]
    assert "fully_shard on the CPU" in said
    assert "compiled radam_ of tensors in flat buffers" in said
    monkeypatch.setattr(doctor, "FULLY_SHARDS_ON_CPU", True)
    assert "fully_shard" not in doctor._facts().get("torch lacks", "")


def test_the_doctor_tells_of_wrong_bits(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_time", lambda *_: 1.0)
    right = doctor._step
    monkeypatch.setattr(
        doctor,
        "_step",
        lambda tensors, step, backend: right(tensors, step + (backend == "cpu"), backend),
    )
    assert doctor.main(argparse.Namespace()) == 1
    assert "WRONG" in capsys.readouterr().out


def test_the_command_line_has_both():
    run = subprocess.run(
        [sys.executable, "-m", "radam_kernels", "--help"], capture_output=True, text=True
    )
    assert run.returncode == 0
    assert "train" in run.stdout
    assert "doctor" in run.stdout
