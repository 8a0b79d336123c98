"""`python -m radam_kernels train`, the demo."""

import argparse
import builtins
import contextlib
import fcntl
import io
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from radam_kernels import train

pytest.importorskip("tqdm", reason="the demo needs tqdm: pip install 'radam_kernels[demo]'")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")

STEPS = 8
TINY = ["--steps", str(STEPS), "--layers", "1", "--width", "32", "--context", "16", "--batch", "4"]


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


@dataclass
class Trained:
    """One run of the demo."""

    folder: Path
    printed: str
    numbers: dict

    @property
    def losses(self) -> dict[str, list[float]]:
        runs = self.numbers["optimizers"].items()
        return {name: found["held_out_nats_per_byte"] for name, found in runs}


def run(folder: Path, *words: object) -> Trained:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert train.main(arguments("--out", folder, *words)) == 0
    return Trained(folder, printed.getvalue(), json.loads((folder / "train.json").read_text()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return run(tmp_path_factory.mktemp("demo") / "new" / "folder")


def test_training_prints_a_table_and_writes_a_picture_and_numbers(trained):
    png = (trained.folder / "train.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000
    assert list(trained.losses) == [train.OURS, train.TORCH_RADAM, train.TORCH_ADAM]
    for name, losses in trained.losses.items():
        assert name in trained.printed
        assert losses[-1] < losses[0]
        assert 0 < trained.numbers["optimizers"][name]["optimizer_share_of_step"] < 1


def test_both_radams_train_alike_and_adam_does_not(trained):
    ours, theirs, adam = trained.losses.values()
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert abs(ours[-1] - adam[-1]) > 1e-3


def test_the_same_seed_gives_the_same_losses(tmp_path, trained):
    assert run(tmp_path, "--seed", 0).losses == trained.losses
    other = run(tmp_path, "--seed", 1, "--steps", 1)
    assert other.losses[train.OURS][0] != trained.losses[train.OURS][0], "the initial values"


def test_control_c_leaves_one_line_and_no_files(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "held_out_loss", interrupted)
    assert train.main(arguments("--out", tmp_path / "out")) == 130
    error = capsys.readouterr().err
    assert "interrupted after 0 steps of radam_kernels.RAdam; nothing written" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """Checkpoints of a run that ended in the middle of the second optimizer."""
    folder = tmp_path_factory.mktemp("interrupted")
    real, steps = train.held_out_loss, iter(range(STEPS + 5))

    def loss_or_interrupt(*args):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    words = ["--out", folder / "out", "--checkpoint", folder, "--checkpoint-every", 2]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "held_out_loss", loss_or_interrupt)
        assert train.main(arguments(*words)) == 130
    return folder


def test_a_rerun_resumes_with_the_same_losses_to_the_bit(tmp_path, capsys, interrupted, trained):
    checkpoints = shutil.copytree(interrupted, tmp_path / "checkpoints")
    resumed = run(tmp_path / "out", "--checkpoint", checkpoints)
    assert f"resuming from {checkpoints}: step 2 of torch.optim.RAdam" in resumed.printed
    assert resumed.losses == trained.losses
    again = run(tmp_path / "again", "--checkpoint", checkpoints)
    assert "complete, so nothing is trained" in again.printed
    assert again.numbers["optimizers"] == resumed.numbers["optimizers"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lr", 0.1], "--lr 0.003 (now 0.1)"),
        (["--seed", 1, "--batch", 8], "--seed 0 (now 1), --batch 4 (now 8)"),
        (["--text", __file__], "--text of SHA-256 "),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, capsys, interrupted, words, said):
    files = set(interrupted.rglob("*"))
    words = ["--out", tmp_path / "out", "--checkpoint", interrupted, *words]
    assert train.main(arguments(*words)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "give the same, or choose another folder" in error
    assert set(interrupted.rglob("*")) == files


@pytest.mark.parametrize("damage", ["no JSON", '{"settings": {}}', None])
def test_a_damaged_checkpoint_is_refused(tmp_path, capsys, interrupted, damage):
    checkpoints = shutil.copytree(interrupted, tmp_path / "checkpoints")
    record = max(checkpoints.glob("*/record.json"))  # of the newest
    record.write_text(damage) if damage else record.unlink()
    words = ["--out", tmp_path / "out", "--checkpoint", checkpoints]
    assert train.main(arguments(*words)) == 2
    assert "choose another folder" in capsys.readouterr().err


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("1234")
        lock.flush()
        words = ["--out", tmp_path / "out", "--checkpoint", tmp_path]
        assert train.main(arguments(*words)) == 2
    assert "process 1234 still trains with it" in capsys.readouterr().err


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
