"""bench.paper keeps runs and does none twice, names what fails, and has a page that is true."""

import importlib
import json
import re
import sys

import pytest

pytest.importorskip("scipy", reason="bench/paper needs scipy: pip install -e '.[paper]'")
pytest.importorskip("sklearn", reason="bench/paper needs sklearn: pip install -e '.[paper]'")
pytest.importorskip("pandas", reason="bench/paper needs pandas: pip install -e '.[paper]'")
import pandas as pd
from matplotlib.figure import Figure

from bench.paper import __main__ as cli
from bench.paper import page, reach, report, runner, style
from bench.paper.experiment import Experiment, Run, Verdict
from bench.paper.experiments import EXPERIMENTS

SCRIPT = """
import os, signal, time
from pathlib import Path
from _paper_parts import FACTOR

def count(at, times):
    with open(at, "a") as log:
        log.write("run\\n")
    return [{"value": FACTOR * times}]

def threads():
    import torch

    return [{"value": 0, "threads": torch.get_num_threads()}]

def fail_unless(there):
    if not Path(there).exists():
        raise OSError(f"{there} is missing")
    return [{"value": 0}]

def interrupt(after):
    while not Path(after).exists():
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(600)

def die(after):
    while not Path(after).exists():
        time.sleep(0.01)
    os._exit(7)

def draw():
    return "a figure"
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A module of runs, and one that it imports; `toy.edit` changes them and reloads them."""
    folder = tmp_path / "code" / "_paper"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(folder.parent))
    names = ("_paper._paper_toy", "_paper._paper_parts")
    (folder / "__init__.py").write_text("")
    (folder / "_paper_toy.py").write_text(SCRIPT.replace("from _paper", "from ._paper"))
    (folder / "_paper_parts.py").write_text("FACTOR = 2\n")

    def edit(file, old, new):
        text = (folder / file).read_text()
        assert text.count(old) == 1
        (folder / file).write_text(text.replace(old, new))
        return load()

    def load():
        for name in names:
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        module = importlib.import_module(names[0])
        module.edit = edit
        return module

    yield load()
    for name in (*names, "_paper"):
        sys.modules.pop(name, None)


def experiment(*runs):
    return Experiment(
        name="toy",
        title="A toy",
        claim="Two is twice one.",
        runs=lambda quick: list(runs),
        judge=lambda rows, quick: [Verdict(True, f"the sum is {rows['value'].sum()}")],
        draw=lambda rows: Figure(figsize=(1, 1)),
    )


def do(toys, folder, jobs=1):
    return runner.do_missing([toys], folder, quick=True, jobs=jobs)


# the runner


def test_what_is_done_is_kept_and_what_failed_is_named_and_done_again(toy, tmp_path, capsys):
    log, there, kept = tmp_path / "log", tmp_path / "there", tmp_path / "kept"
    toys = experiment(
        Run("bad", toy.fail_unless, {"there": str(there)}),
        Run("one", toy.count, {"at": str(log), "times": 1}),
        Run("two", toy.count, {"at": str(log), "times": 2}),
        Run("threads", toy.threads, {}),
    )
    failed = do(toys, kept)
    assert list(failed) == ["toy"]
    assert list(failed["toy"]) == ["bad"]
    assert "failed: toy bad: OSError" in (told := capsys.readouterr().out)
    assert "in fail_unless" in told
    assert log.read_text() == "run\nrun\n"

    there.touch()
    assert do(toys, kept) == {}
    assert log.read_text() == "run\nrun\n"
    verdicts = report.report(toys, kept, tmp_path / "out", quick=True)
    assert verdicts == [Verdict(True, "the sum is 6")]

    table = (tmp_path / "out" / "toy.csv").read_text()
    assert re.search(r"^# mode: quick\n# runs: 4\n", table, re.MULTILINE)
    assert re.search(r"^# commit: \S+\n# sources: \w{12}\n# torch: ", table, re.MULTILINE)
    rows = pd.read_csv(tmp_path / "out" / "toy.csv", comment="#")
    assert list(rows["value"]) == [0, 2, 4, 0]
    assert rows["threads"].max() == 1, "more than one thread to a process"


def test_a_run_of_other_arguments_or_other_code_is_stale(toy, tmp_path):
    def kept(module, times):
        run = Run("one", module.count, {"at": "log", "times": times})
        return runner.read_kept(tmp_path, experiment(run), run)

    run = Run("one", toy.count, {"at": "log", "times": 1})
    made = runner.Kept(runner.digest(run), [{"value": 2}], 0.1, {})
    runner.keep(runner.kept_file(tmp_path, experiment(run), run), made)
    assert kept(toy, 1) == made
    assert kept(toy, 2) is None
    assert kept(toy.edit("_paper_toy.py", "a figure", "another"), 1) == made
    assert kept(toy.edit("_paper_toy.py", "def count", "# why\ndef count"), 1) == made
    assert kept(toy.edit("_paper_parts.py", "FACTOR = 2", "FACTOR = 3"), 1) is None
    assert kept(toy.edit("_paper_parts.py", "FACTOR = 3", "FACTOR = 2"), 1) == made
    assert kept(toy.edit("_paper_toy.py", "FACTOR * times", "FACTOR + times"), 1) is None


def test_an_interrupt_loses_only_what_is_not_finished(toy, tmp_path):
    one = Run("one", toy.count, {"at": str(tmp_path / "log"), "times": 1})
    file = runner.kept_file(tmp_path, experiment(one), one)
    toys = experiment(one, Run("stop", toy.interrupt, {"after": str(file)}))
    with pytest.raises(KeyboardInterrupt):
        do(toys, tmp_path, jobs=2)
    assert runner.read_kept(tmp_path, toys, one).rows[0]["value"] == 2


def test_a_process_that_dies_is_named_and_finished_runs_are_kept(toy, tmp_path):
    one = Run("one", toy.count, {"at": str(tmp_path / "log"), "times": 1})
    file = runner.kept_file(tmp_path, experiment(one), one)
    toys = experiment(one, Run("dies", toy.die, {"after": str(file)}))
    assert list(do(toys, tmp_path, jobs=2)["toy"]) == ["dies"]
    assert file.exists()


def test_keys_are_file_names_and_unique(toy, tmp_path):
    one = Run("one", toy.count, {"at": "", "times": 1})
    with pytest.raises(ValueError, match=r"twice: \{'one'\}"):
        do(experiment(one, one), tmp_path)
    with pytest.raises(ValueError, match="got 'a/b'"):
        do(experiment(one._replace(key="a/b")), tmp_path)


def test_code_is_followed_through_modules_and_classes():
    from bench.paper import noise

    first = reach.code_digest(noise.losses)
    assert re.fullmatch(r"[0-9a-f]{12}", first)
    assert first == reach.code_digest(noise.losses)
    assert first != reach.code_digest(noise.runs)


# the command line


def test_without_a_name_the_experiments_are_listed(capsys):
    assert cli.main([]) == 0
    told = capsys.readouterr().out
    for one in EXPERIMENTS.values():
        assert re.search(rf"^{one.name} +{re.escape(one.title)}$", told, re.MULTILINE)
        assert one.claim in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "unknown: nothing; there are approximation"),
        (["--quick", "--publish"], "full"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_choices(arguments, said, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert said in capsys.readouterr().err


def test_a_failed_experiment_has_no_result_and_the_exit_says_so(toy, tmp_path, monkeypatch, capsys):
    bad = experiment(Run("bad", toy.fail_unless, {"there": str(tmp_path / "nowhere")}))
    monkeypatch.setattr(cli, "EXPERIMENTS", {"toy": bad})
    assert cli.main(["toy", "--quick", "--out", str(tmp_path)]) == 1
    assert "no result: 1 runs failed: bad" in capsys.readouterr().out
    assert not (tmp_path / "quick" / "toy.csv").exists()


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The quick mode of everything, done once."""
    out = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "DPI", 40)  # most of the time goes into drawing
        assert cli.main(["all", "--quick", "--out", str(out)]) == 0
    return out / "quick"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_runs_quickly_and_leaves_a_table_a_figure_and_a_verdict(quick, name):
    rows = pd.read_csv(quick / f"{name}.csv", comment="#")
    assert len(rows) > 0
    assert not rows.isna().all().any()
    assert (quick / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    said = json.loads((quick / f"{name}.json").read_text())
    assert said["provenance"]["mode"] == "quick"
    assert said["verdicts"]
    for verdict in said["verdicts"]:
        assert verdict["supported"] in (True, False, None)
        assert re.search(r"\d", verdict["words"])


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("approximation", 0),
        ("approximation", 2),
        ("variance", 0),
        ("variance", 3),
        ("noise", 0),
        ("noise", 1),
        ("travel", 0),
        ("travel", 1),
        ("counterexample", 0),
    ],
)
def test_what_theory_settles_is_supported_in_quick_mode_too(quick, name, index):
    verdict = json.loads((quick / f"{name}.json").read_text())["verdicts"][index]
    assert verdict["supported"] is True, verdict["words"]


# the page


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_page_shows_the_committed_result_of_each_experiment(name):
    part = page.part(EXPERIMENTS[name])
    assert part in page.PAGE.read_text(), "stale: python -m bench.paper NAME --publish"
    assert EXPERIMENTS[name].claim in part
    for suffix in ("csv", "png"):
        assert (page.RESULTS / f"{name}.{suffix}").exists()
    said = json.loads((page.RESULTS / f"{name}.json").read_text())
    assert said["provenance"]["mode"] == "full"
    assert all(verdict["words"] in part for verdict in said["verdicts"])
