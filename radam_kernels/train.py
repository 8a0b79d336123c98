"""Trains one small transformer under three optimizers and compares their losses and times."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from .train_model import HEAD_WIDTH, ByteModel, held_out_loss, load_text, loss_of, windows
from .train_processes import Processes, UserError, finish, join, leave, pick_device
from .train_report import OURS, TORCH_ADAM, TORCH_RADAM, Run, draw, radam_difference, record, table

HELD_OUT_WINDOWS = 128
EVALUATIONS = 25

if TYPE_CHECKING:
    from tqdm import tqdm

    from .train_checkpoints import Checkpoints

OptimizerFactory = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Setup:
    """What all runs of a comparison share."""

    args: argparse.Namespace
    processes: Processes
    device: torch.device
    text: tuple[Tensor, Tensor]  # to train on, and held out
    factories: dict[str, OptimizerFactory]


def now(device: torch.device) -> float:
    """Seconds on a monotonic clock, after synchronizing `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def is_due(step: int, every: int, last: int) -> bool:
    """Whether `step` is a multiple of `every`, or the last one."""
    return step % every == 0 or step == last


def evaluate(run: Run, model: ByteModel, batch: Tensor, bar: tqdm[NoReturn]) -> None:
    """Records the loss of `batch`, the same on all processes, and shows it on the bar."""
    run.eval_steps.append(run.steps)
    run.held_out.append(held_out_loss(model, batch))
    bar.set_postfix_str(f"held-out loss {run.held_out[-1]:.3f} nats/byte")


def train_one(run: Run, setup: Setup, checkpoints: Checkpoints | None) -> None:
    """Trains a model for `args.steps` steps, or the rest of them; records results in `run`."""
    from tqdm import tqdm

    args, processes, device = setup.args, setup.processes, setup.device
    # Initial values and batches depend on the seed only, so they are the same in every run.
    torch.manual_seed(args.seed)
    draws = torch.Generator().manual_seed(args.seed)
    model = ByteModel(args.layers, args.width, args.context).to(device)
    processes.shard(model, device)
    run.parameters = sum(p.numel() for p in model.parameters())
    optimizer = setup.factories[run.name](model.parameters())
    if checkpoints and run.steps:
        checkpoints.load(model, optimizer, draws)
    train, held_out = setup.text
    last = len(held_out) - args.context - 1
    starts = torch.linspace(0, last, min(HELD_OUT_WINDOWS, last + 1)).long()
    held_out_batch = windows(held_out, starts, args.context, device)

    with tqdm(
        total=args.steps,
        initial=run.steps,
        desc=run.name,
        unit="step",
        dynamic_ncols=True,
        disable=not processes.first,
    ) as bar:
        if not run.eval_steps:
            evaluate(run, model, held_out_batch, bar)
        while run.steps < args.steps:
            begin = now(device)
            # All processes draw the batch, and each takes its part.
            starts = torch.randint(len(train) - args.context, (args.batch,), generator=draws)
            starts = starts.chunk(processes.count)[processes.rank]
            loss = loss_of(model, windows(train, starts, args.context, device))
            optimizer.zero_grad()
            loss.backward()
            backward_done = now(device)
            optimizer.step()
            end = now(device)
            run.optimizer_s.append(end - backward_done)
            run.step_s.append(end - begin)
            bar.update()
            if is_due(run.steps, max(1, args.steps // EVALUATIONS), args.steps):
                evaluate(run, model, held_out_batch, bar)
            if checkpoints and is_due(run.steps, args.checkpoint_every, args.steps):
                checkpoints.save(model, optimizer, draws)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m radam_kernels train` to `parser`."""
    add = parser.add_argument
    add("--steps", type=positive, default=600, help="training steps of each run (%(default)s)")
    add("--seed", type=int, default=0, help="seed of initial values and batches (%(default)s)")
    add("--lr", type=float, default=3e-3, help="learning rate of each optimizer (%(default)s)")
    add("--backend", default="auto", help="backend of radam_kernels.RAdam (%(default)s)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if available)")
    add("--text", type=Path, help="file to train on (default: the help texts of Python)")
    add("--out", type=Path, default=Path("radam_train"), help="folder for results (%(default)s)")
    add("--layers", type=positive, default=4, help="layers of the model (%(default)s)")
    add("--width", type=positive, default=96, help="model width, a multiple of 32 (%(default)s)")
    add("--context", type=positive, default=64, help="context length in bytes (%(default)s)")
    add(
        "--batch",
        type=positive,
        default=16,
        help="windows in a batch of all processes (%(default)s)",
    )
    add(
        "--checkpoint",
        type=folder,
        metavar="DIR",
        help="folder to save to and resume from",
    )
    add(
        "--checkpoint-every",
        type=positive,
        default=100,
        metavar="STEPS",
        help="steps between checkpoints (%(default)s)",
    )


def folder(text: str) -> Path:
    """A path for argparse; the current folder only by its name."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got nothing")
    return Path(text)


def positive(text: str) -> int:
    """An integer of 1 or more, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def require(args: argparse.Namespace, processes: Processes) -> None:
    """Raises UserError for errors that would otherwise show only after minutes of training."""
    try:
        import matplotlib  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{error.name} is missing; run: pip install 'radam_kernels[demo]'"
        ) from error
    if args.width % HEAD_WIDTH:
        raise UserError(f"--width: expected a multiple of {HEAD_WIDTH}, got {args.width}")
    if args.batch % processes.count:
        above = args.batch + -args.batch % processes.count
        raise UserError(
            f"--batch: {processes.count} processes cannot share {args.batch} windows evenly; "
            f"give a multiple of {processes.count}, such as {above}"
        )
    existing = next(path for path in (args.out, *args.out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--out: {existing} is not a folder to write to; choose another")


def optimizer_factories(
    args: argparse.Namespace, device: torch.device
) -> dict[str, OptimizerFactory]:
    """The optimizers to compare, all with torch's defaults except for the learning rate."""
    from . import RAdam

    ours = partial(RAdam, lr=args.lr, backend=args.backend)
    try:
        ours([torch.zeros(1, device=device, requires_grad=True)])
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--backend {args.backend} --lr {args.lr}: {error}") from error
    return {
        OURS: ours,
        TORCH_RADAM: partial(torch.optim.RAdam, lr=args.lr),
        TORCH_ADAM: partial(torch.optim.Adam, lr=args.lr),
    }


def prepare(args: argparse.Namespace, processes: Processes) -> Setup:
    """Checks the arguments and reads the text; raises UserError."""
    require(args, processes)
    device = pick_device(args.device, processes)
    text = load_text(args.text, args.context)
    return Setup(args, processes, device, text, optimizer_factories(args, device))


def open_checkpoints(
    setup: Setup, runs: dict[str, Run]
) -> AbstractContextManager[Checkpoints | None]:
    """The checkpoints of `args.checkpoint`, if given; fills `runs` with what is already done."""
    args = setup.args
    if not args.checkpoint:
        return nullcontext()
    from .train_checkpoints import Checkpoints

    names = "steps", "seed", "lr", "layers", "width", "context", "batch", "backend"
    settings = {f"--{name}": str(getattr(args, name)) for name in names}
    text = torch.cat(setup.text).to(torch.uint8).numpy().tobytes()
    settings["--text"] = f"of SHA-256 {hashlib.sha256(text).hexdigest()[:12]}"
    return Checkpoints(args.checkpoint, settings, runs, setup.processes)


def compare(args: argparse.Namespace, runs: dict[str, Run], processes: Processes) -> None:
    """Trains under each optimizer into `runs`; rank 0 prints and writes the results."""
    setup = processes.agree(lambda: prepare(args, processes))
    with open_checkpoints(setup, runs) as checkpoints:
        if runs and processes.first:
            run = list(runs.values())[-1]
            where = f"step {run.steps} of {run.name}"
            if len(runs) == len(setup.factories) and run.steps == args.steps:
                where = "complete, so nothing is trained"
            print(f"resuming from {args.checkpoint}: {where}", flush=True)
        for name in setup.factories:
            run = runs.setdefault(name, Run(name))
            if run.steps < args.steps:
                train_one(run, setup, checkpoints)
    if processes.first:
        write_results(setup, runs)


def write_results(setup: Setup, runs: dict[str, Run]) -> None:
    """Prints the table, and writes the PNG and the JSON."""
    args, processes, device = setup.args, setup.processes, setup.device
    cuda = device.type == "cuda"
    machine = {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "processes": processes.count,
        "cpu_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    where = machine["device"] if cuda else f"CPU, {torch.get_num_threads()} threads"
    if processes.distributed:
        where = f"FSDP2, {processes.count} processes, each {where}"
    caption = (
        f"byte-level transformer, {runs[OURS].parameters / 1e6:.2f} M parameters, "
        f"lr {args.lr:g}, seed {args.seed}; {where}; torch {torch.__version__}"
    )
    settings = {key: str(value) for key, value in vars(args).items() if key != "main"}
    png, numbers = draw(runs, caption), record(runs, settings, machine)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "train.png").write_bytes(png)
    (args.out / "train.json").write_text(numbers + "\n")
    print(f"{caption}\n\n{table(runs)}\n")
    print(f"greatest difference between the two RAdams: {radam_difference(runs):.1e} nats/byte")
    print(f"written: {args.out / 'train.png'}, {args.out / 'train.json'}")


def main(args: argparse.Namespace) -> int:
    """Runs the comparison; returns 0, 2 for a UserError, or 130 for Ctrl-C."""
    runs: dict[str, Run] = {}
    processes = Processes()
    code = 0
    try:
        processes = join()
        compare(args, runs, processes)
    except UserError as error:
        if processes.first:
            print(f"radam_kernels train: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        run = next(reversed(runs.values()), Run("training"))
        left = (
            f"a rerun resumes at the last checkpoint in {args.checkpoint}"
            if args.checkpoint
            else "nothing written"
        )
        print(f"interrupted after {run.steps} steps of {run.name}; {left}", file=sys.stderr)
        return finish(processes, 130)
    leave(processes)
    return finish(processes, code)
