"""`torchrun -m radam_kernels train`, the demo under FSDP2."""

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from radam_kernels import train
from radam_kernels.sharding import FULLY_SHARDS_ON_CPU

pytest.importorskip("tqdm", reason="the demo needs tqdm: pip install 'radam_kernels[demo]'")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available() and FULLY_SHARDS_ON_CPU),
        reason="fully_shard of this torch does not run on the CPU",
    ),
]

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 90
STEPS = 8
TINY = [
    "--layers",
    "1",
    "--width",
    "32",
    "--context",
    "16",
    "--batch",
    "4",
    "--checkpoint-every",
    "3",
    "--device",
    "cpu",
]
# While the second optimizer's second checkpoint is being written; the first is complete by then.
KILL_AT = STEPS + 6
KILLED = f"""
import os, signal, sys
from radam_kernels import __main__
from radam_kernels.train_checkpoints import Checkpoints

save = Checkpoints.save

def save_and_die(self, *state):
    save(self, *state)
    if sum(run.steps for run in self._runs.values()) == {KILL_AT}:
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoints.save = save_and_die
sys.exit(__main__.main())
"""

# What a thread of gloo can do while the interpreter shuts down.
ABORTING = """
import atexit, os, sys
from radam_kernels import __main__

atexit.register(os.abort)
sys.exit(__main__.main())
"""


def start(*program: object, steps: int = STEPS) -> subprocess.Popen:
    """Two processes under torchrun; their output and torchrun's come mixed in `stdout`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, *map(str, program), "--steps", str(steps)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """The exit code and the output; kills what takes too long."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes
        process.communicate(timeout=TIMEOUT_S)
        raise
    return process.returncode, output


def demo(*words: object) -> list[object]:
    return ["-m", "radam_kernels", "train", *TINY, *words]


def losses(out: Path) -> dict[str, list[float]]:
    runs = json.loads((out / "train.json").read_text())["optimizers"]
    return {name: run["held_out_nats_per_byte"] for name, run in runs.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(*demo("--out", folder / "out", "--checkpoint", folder / "checkpoints"))
    code, output = finish(process)
    assert code == 0, output
    return folder, output


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run whose processes were killed while they saved one."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "killed.py").write_text(KILLED)
    program = [folder / "killed.py", "train", *TINY, "--checkpoint", folder / "checkpoints"]
    code, output = finish(start(*program, "--out", folder / "out"))
    assert code != 0
    assert "Signal 9 (SIGKILL)" in output
    assert not (folder / "out").exists()
    return folder / "checkpoints"


def test_rank_0_alone_prints_and_writes(whole):
    folder, output = whole
    assert output.count("held-out loss     optimizer    share of") == 1
    assert output.count("written: ") == 1
    assert output.count(f" 0/{STEPS} [00:00<?, ?step/s]") == 3, "progress bars"
    assert "FSDP2, 2 processes" in output
    assert json.loads((folder / "out" / "train.json").read_text())["machine"]["processes"] == 2
    for name, run in losses(folder / "out").items():
        assert run[-1] < run[0], name


def test_a_killed_run_resumes_with_the_same_losses_to_the_bit(whole, killed, tmp_path):
    checkpoints = shutil.copytree(killed, tmp_path / "checkpoints")
    incomplete = checkpoints / f"radam_train-{3 * STEPS:08}"
    incomplete.mkdir()
    (incomplete / "__0_0.distcp").write_bytes(b"the first half of")
    code, output = finish(start(*demo("--out", tmp_path / "out", "--checkpoint", checkpoints)))
    assert code == 0, output
    assert losses(tmp_path / "out") == losses(whole[0] / "out")
    resumed = f"resuming from {checkpoints}: step (3|6) of torch.optim.RAdam"
    assert re.search(resumed, output), output
    assert [path.name for path in checkpoints.glob("radam_train-*")] == [incomplete.name]
    assert (incomplete / ".metadata").exists()


def test_another_number_of_processes_resumes_within_rounding(whole, killed, tmp_path):
    checkpoints = shutil.copytree(killed, tmp_path / "checkpoints")
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    words = [*TINY, "--steps", STEPS, "--out", tmp_path / "out", "--checkpoint", checkpoints]
    assert train.main(parser.parse_args([*map(str, words)])) == 0
    resumed, uninterrupted = losses(tmp_path / "out"), losses(whole[0] / "out")
    assert resumed[train.OURS] == uninterrupted[train.OURS], "which was done before the kill"
    for name, expected in uninterrupted.items():
        assert resumed[name] == pytest.approx(expected, abs=1e-5)


def test_a_refusal_is_printed_once_and_ends_all_without_a_shutdown_of_python(whole, tmp_path):
    (tmp_path / "aborting.py").write_text(ABORTING)
    words = ["--out", tmp_path, "--checkpoint", whole[0] / "checkpoints", "--lr", 0.5]
    process = start(tmp_path / "aborting.py", "train", *TINY, *words)
    code, output = finish(process)
    assert code != 0
    assert output.count("holds a run with --lr 0.003 (now 0.5)") == 1
    assert "exitcode  : 2 (pid" in output, output
    assert "UserError" not in output


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A run that trains until it is interrupted."""
    words = ["--out", tmp_path / "out", "--checkpoint", tmp_path / "checkpoints"]
    process = start(*demo(*words), steps=10**6)
    yield process
    process.terminate()
    process.wait(TIMEOUT_S)


def test_control_c_ends_all_processes(endless, tmp_path):
    end = time.monotonic() + TIMEOUT_S
    while not list(tmp_path.glob("checkpoints/*/.metadata")):
        assert time.monotonic() < end
        time.sleep(0.02)
    endless.send_signal(signal.SIGINT)
    code, output = finish(endless)
    assert code != 0
    assert output.count("interrupted after ") == 1
    assert "steps of radam_kernels.RAdam; a rerun resumes at the last checkpoint in " in output
    assert "KeyboardInterrupt" not in output


def test_the_batch_is_shared_evenly():
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args(["--batch", "15"])
    with pytest.raises(train.UserError, match=r"4 processes cannot share 15 windows .* such as 16"):
        train.require(args, train.Processes(count=4))
