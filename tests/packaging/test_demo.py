"""`python -m radam_kernels`: the demo and the doctor, as a user meets them."""

import argparse
import builtins
import json
import subprocess
import sys

import pytest
import torch

from radam_kernels import doctor, train
from radam_kernels.backends.cuda import NOT_BUILT

pytest.importorskip("tqdm", reason="the demo needs tqdm: pip install 'radam_kernels[demo]'")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")

TINY = ["--steps", "8", "--layers", "1", "--width", "32", "--context", "16", "--batch", "4"]


def arguments(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args([*TINY, *map(str, words)])


def hide(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Makes `import name` fail."""
    real = builtins.__import__

    def importing(module, *args, **kwargs):
        if module.partition(".")[0] == name.partition(".")[0]:
            raise ImportError(f"No module named {name!r}", name=name)
        return real(module, *args, **kwargs)

    for module in [m for m in sys.modules if m.partition(".")[0] == name.partition(".")[0]]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", importing)


def test_training_prints_a_table_and_writes_a_picture_and_numbers(tmp_path, capsys):
    assert train.main(arguments("--out", tmp_path / "new" / "folder")) == 0
    printed = capsys.readouterr().out
    png = (tmp_path / "new" / "folder" / "train.png").read_bytes()
    numbers = json.loads((tmp_path / "new" / "folder" / "train.json").read_text())
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000
    assert list(numbers["optimizers"]) == [train.OURS, train.TORCH_RADAM, train.TORCH_ADAM]
    for name, found in numbers["optimizers"].items():
        assert name in printed
        assert found["held_out_nats_per_byte"][-1] < found["held_out_nats_per_byte"][0]
        assert 0 < found["optimizer_share_of_step"] < 1


def test_both_radams_train_alike_and_adam_does_not(tmp_path):
    train.main(arguments("--out", tmp_path))
    found = json.loads((tmp_path / "train.json").read_text())["optimizers"]
    ours, theirs, adam = (found[name]["held_out_nats_per_byte"] for name in found)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert abs(ours[-1] - adam[-1]) > 1e-3


def test_the_same_seed_gives_the_same_losses(tmp_path):
    losses = []
    for seed in (0, 0, 1):
        train.main(arguments("--out", tmp_path, "--seed", seed, "--steps", 3))
        found = json.loads((tmp_path / "train.json").read_text())["optimizers"]
        losses.append(found[train.OURS]["held_out_nats_per_byte"])
    assert losses[0] == losses[1] != losses[2]


def test_control_c_leaves_one_line_and_no_files(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "held_out_loss", interrupted)
    assert train.main(arguments("--out", tmp_path / "out")) == 130
    error = capsys.readouterr().err
    assert "interrupted after 0 steps of radam_kernels.RAdam; nothing written" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["matplotlib", "tqdm"])
def test_a_missing_library_is_named_before_training(tmp_path, capsys, monkeypatch, missing):
    hide(monkeypatch, missing)
    assert train.main(arguments("--out", tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert missing in error
    assert "pip install 'radam_kernels[demo]'" in error


def test_a_python_without_the_text_asks_for_another(tmp_path, capsys, monkeypatch):
    hide(monkeypatch, "pydoc_data.topics")
    assert train.main(arguments("--out", tmp_path / "out")) == 2
    assert "--text FILE" in capsys.readouterr().err
    monkeypatch.undo()
    text = tmp_path / "text"
    text.write_text("Every word is a byte or two. " * 100)
    training, held_out = train.load_text(text, context=16)
    assert bytes(training.tolist() + held_out.tolist()) == text.read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--width", 33], "--width"),
        (["--backend", "gpu"], "'gpu'"),
        (["--device", "meta"], "--device"),
        (["--text", "/no/such/file"], "/no/such/file"),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_mistakes_are_named(tmp_path, capsys, words, said):
    assert train.main(arguments("--out", tmp_path / "out", *words)) == 2
    assert said in capsys.readouterr().err


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


def test_the_doctor_tells_of_wrong_bits(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_SIZES", {"cpu": 1 << 16, "gpu": 1 << 16})
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
