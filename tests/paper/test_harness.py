"""The harness of bench/paper: kept runs, failures, digests of code, the command and the page."""

import importlib
import json
import re
import signal
import sys
from contextlib import nullcontext

import pytest

pytest.importorskip("sklearn", reason="bench/paper needs pip install -e '.[paper]'")
import pandas as pd
from matplotlib.figure import Figure

from bench.paper import __main__ as command
from bench.paper.experiments import EXPERIMENTS
from bench.paper.harness import report, runner
from bench.paper.harness.code_digest import code_digest
from bench.paper.harness.experiment import Experiment, Run, Verdict
from bench.paper.harness.provenance import PAPER

TOY = """
import os, signal, time
from pathlib import Path
from ..harness import parts
from ..harness.shift import shifted

def count(log, times):
    with open(log, "a") as file:
        file.write("run\\n")
    return [{"value": parts.FACTOR * shifted(times)}]

def fail_unless(exists):
    if not Path(exists).exists():
        raise OSError(f"{exists} is missing")
    import torch
    return [{"value": 0, "threads": torch.get_num_threads()}]

def end(after, interrupt):
    while not Path(after).exists():
        time.sleep(0.01)
    if interrupt:
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(600)
    os._exit(7)
"""
FILES = {
    "experiments/toy.py": TOY,
    "harness/parts.py": "FACTOR = 2\n",
    "harness/shift.py": "def shifted(x):\n    return x + OFFSET\n\nOFFSET = 0\n",
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The module of an experiment, in a package that is laid out like bench.paper."""
    for name, text in FILES.items():
        file = tmp_path / "_toy_paper" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("_toy_paper.experiments.toy")
    for name in [name for name in sys.modules if name.startswith("_toy_paper")]:
        del sys.modules[name]


def experiment(*runs):
    return Experiment(
        "toy",
        "A toy",
        "Two is twice one.",
        runs=lambda quick: list(runs),
        judge=lambda rows, quick: [Verdict(True, f"the sum is {rows['value'].sum()}")],
        draw=lambda rows: Figure(figsize=(1, 1)),
    )


def test_finished_runs_are_kept_and_failed_ones_repeated(toy, tmp_path, monkeypatch, capsys):
    log, missing = tmp_path / "log", tmp_path / "missing"
    bad = Run(toy.fail_unless, {"exists": str(missing)})
    counts = [Run(toy.count, {"log": str(log), "times": times}) for times in (1, 2)]
    monkeypatch.setattr(command, "EXPERIMENTS", {"toy": experiment(bad, *counts)})
    arguments = ["toy", "--quick", "--jobs", "1", "--out", str(tmp_path)]
    assert command.main(arguments) == 1
    printed = capsys.readouterr().out
    assert f"failed: toy {bad.key}: OSError" in printed
    assert "in fail_unless" in printed
    assert f"no result: 1 runs failed: {bad.key}" in printed
    assert not (tmp_path / "quick" / "toy.csv").exists()
    assert log.read_text() == "run\nrun\n"

    missing.touch()
    assert command.main(arguments) == 0
    assert "supported: the sum is 6" in capsys.readouterr().out
    assert log.read_text() == "run\nrun\n"
    head = (tmp_path / "quick" / "toy.csv").read_text()
    assert re.search(r"# runs: 3\n.*\n# date: .*\n# commit: .+\n# sources: \w{12}\n# torch: ", head)
    rows = pd.read_csv(tmp_path / "quick" / "toy.csv", comment="#")
    assert list(rows["value"]) == [0, 2, 4]
    assert rows["threads"].max() == 1, "more than one thread in a process"


def test_a_kept_run_is_valid_for_the_same_arguments_and_code_only(toy, tmp_path):
    run = Run(toy.count, {"log": "log", "times": 1})
    assert runner.digest(run) != runner.digest(run._replace(arguments={"log": "log", "times": 2}))
    kept = runner.Kept(runner.digest(run), [{"value": 2}], 0.1, {})
    runner.keep(runner.kept_path(tmp_path, experiment(), run), kept)
    for file, old, new, same in (
        ("experiments/toy.py", "is missing", "is gone", True),
        ("experiments/toy.py", "def count", "# why\ndef count", True),
        ("harness/shift.py", "(x):\n", '(x):\n    """Adds."""\n', True),
        ("harness/shift.py", "OFFSET = 0", "OFFSET = 1", False),
        ("harness/parts.py", "FACTOR = 2", "FACTOR = 3", False),
        ("experiments/toy.py", "FACTOR * ", "FACTOR + ", False),
    ):
        path = tmp_path / "_toy_paper" / file
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
        code_digest.cache_clear()
        found = runner.read_kept(tmp_path, experiment(), run)
        assert found == (kept if same else None), (file, new)
        path.write_text(text)


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also in a shell's background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("interrupt", [True, False])
def test_finished_runs_are_kept_at_an_interrupt_and_when_a_process_dies(toy, tmp_path, interrupt):
    one = Run(toy.count, {"log": str(tmp_path / "log"), "times": 1})
    file = runner.kept_path(tmp_path, experiment(), one)
    end = Run(toy.end, {"after": str(file), "interrupt": interrupt})
    toys = experiment(one, end)
    with pytest.raises(KeyboardInterrupt) if interrupt else nullcontext():
        assert end.key in runner.execute_missing([toys], tmp_path, quick=True, jobs=2)["toy"]
    assert runner.read_kept(tmp_path, toys, one).rows[0]["value"] == 2


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_run_of_an_experiment_has_its_own_file(name):
    for quick in (True, False):
        keys = [run.key for run in EXPERIMENTS[name].runs(quick)]
        assert len(set(keys)) == len(keys)
        assert all(re.fullmatch(r"[\w.,=+-]{1,200}", key) for key in keys)


def test_the_command_lists_the_experiments_and_refuses_invalid_arguments(capsys):
    assert command.main([]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for one in EXPERIMENTS.values():
        assert lines.index(f"{one.name:15} {one.title}") + 1 == lines.index(one.claim)
    for arguments in (["nothing"], ["--quick", "--publish"]):
        with pytest.raises(SystemExit):
            command.main(arguments)
    errors = capsys.readouterr().err
    assert "unknown: nothing; there are approximation" in errors
    assert "the page shows full results only" in errors


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_page_shows_the_published_result(name):
    page = PAPER.page.read_text()
    shown = report.insert(page, name, report.page_part(EXPERIMENTS[name], PAPER))
    assert shown == page, "not what the JSON says: python -m bench.paper NAME --publish"
    assert all((PAPER.results / f"{name}.{suffix}").exists() for suffix in ("csv", "png"))
    result = json.loads((PAPER.results / f"{name}.json").read_text())
    assert result["provenance"]["mode"] == "full"
