"""bench.report from end to end, and the pages and verdicts made of its rows."""

import json
from unittest.mock import Mock

import pandas as pd
import pytest
import torch

from bench import goals, growth, pages, report, results, tables
from bench.cases import NEW, model, size, small
from bench.optimizers import ADAM, BY_NAME, CPU, CUDA, RADAM
from bench.results import FILE, frame
from bench.timing import OUT_OF_TIME, compare
from radam_kernels import available_backends

FEW = [BY_NAME[name] for name in (CPU, CUDA, ADAM, RADAM)]
HEAD = {
    "schema": results.SCHEMA,
    "set": "quick",
    "dry_run": False,
    "interrupted": False,
    **results.facts(torch.device("cpu")),
}


def read(folder):
    return json.loads((folder / FILE).read_text())


def made(times):
    """Results of these milliseconds, by case and optimizer; a text is why there are none."""
    rows = []
    for case, by_optimizer in times.items():
        facts = {"case": case, "kind": "step", "dtype": case.split()[-1], "gradients": "held"}
        tensors = 1000 if "tensors" in case else 1
        elements = 1 << int(case[2:].split()[0]) if case.startswith("2^") else 64_000
        facts |= {"elements": elements, "tensors": tensors, "bytes": 28 * elements}
        found = []
        for name, ms in by_optimizer.items():
            measured = {"status": "measured", "reason": "", "ms": ms, "gb_s": 1.0}
            absent = {"status": "wrong", "reason": ms}
            row = absent if isinstance(ms, str) else measured
            found.append({**facts, "optimizer": name, **row})
        rows += compare(found)
    return {**HEAD, "rows": rows}


@pytest.fixture
def few(monkeypatch, one_thread):
    real = report.select
    monkeypatch.setattr(report, "select", lambda *a, **k: [r for r in real(*a, **k) if r in FEW])


@pytest.mark.usefixtures("few")
def test_a_report_from_end_to_end_resumes_and_its_page_equals_it(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "machine"
    words = ["--out", str(folder), "--only", r"^2.10 float32|^10 tensors|transformer"]
    assert report.main([*words, "--seconds", "0"]) == 0
    found = read(folder)
    assert {row["status"] for row in found["rows"]} == {"measured"}
    assert frame(found).case.nunique() == 3
    said = capsys.readouterr().out
    assert "**10 tensors of 64 float32" in said
    assert "not measured" in said  # of the goals
    table = pd.read_csv(folder / "results.csv")
    pd.testing.assert_series_equal(table.ms, frame(found).ms.astype(float))
    assert (folder / "bandwidth.png").exists()
    assert not (folder / "models.png").exists()

    page = tmp_path / "project.md"
    page.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    monkeypatch.setattr(pages, "README", page)
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    check = ["--check"]
    assert pages.main(check) == 1
    assert pages.main([]) == 0
    assert pages.main(check) == 0
    assert page.read_text().startswith("before\n<!-- bench:begin -->\n| step of")
    assert page.read_text().endswith("<!-- bench:end -->\nafter\n")
    found["rows"][0]["ms"] *= 2
    results.write(folder / FILE, found)
    assert pages.main(check) == 1

    lacking = next(row for row in found["rows"] if row["case"] == size(10))
    lacking |= {"status": "not measured", "reason": OUT_OF_TIME}
    results.write(folder / FILE, found)
    spy = Mock(side_effect=report.KINDS["step"])
    monkeypatch.setitem(report.KINDS, "step", spy)
    assert report.main([*words, "--seconds", "0", "--resume"]) == 0
    assert [call.args[0].name for call in spy.call_args_list] == [size(10)]
    now = {**HEAD, **results.facts(torch.device("cpu"))}
    assert results.kept(folder / FILE, now)
    assert not results.kept(folder / FILE, {**now, "sources": "others"})


@pytest.mark.usefixtures("few")
def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    measured = made({size(10): {CPU: 1.0}})["rows"]
    monkeypatch.setitem(report.KINDS, "step", Mock(side_effect=[measured, KeyboardInterrupt]))
    assert report.main(["--out", str(tmp_path), "--only", "^2.1"]) == 130
    found = read(tmp_path)
    assert [row["case"] for row in found["rows"]] == [size(10)]
    assert found["interrupted"]
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.usefixtures("few")
def test_a_dry_run_goes_the_way_of_a_gpu(tmp_path, capsys, monkeypatch):
    if reason := available_backends()["triton"]:
        pytest.skip(reason)
    words = ["--dry-run", "--seconds", "0", "--out", str(tmp_path), "--only", "^2.2[68]|^1,000"]
    assert report.main(words) == 0
    found = read(tmp_path)
    assert {"copy of 28 B", "copy of 22 B", CUDA} <= {row["optimizer"] for row in found["rows"]}
    assert {row["elements"] for row in found["rows"]} == {40, 120}
    assert "a dry run: these say nothing" in capsys.readouterr().out
    monkeypatch.setattr(report.Case, "make", None)  # no case may cost anything when time is up
    assert report.main([*words, "--minutes", "0"]) == 0
    found = read(tmp_path)
    assert {row["reason"] for row in found["rows"]} == {OUT_OF_TIME}
    assert tables.left_out(frame(found)).count("\n") == 0
    assert pages.readme_part({tmp_path: found}) == pages.NOTHING
    monkeypatch.undo()
    assert report.main(["--dry-run", "--once", size(10)]) == 0
    assert f"one step of {CUDA}, 1120 bytes" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert report.main(["--device", "cuda"]) == 2


def test_goals_are_met_missed_open_or_not_measured():
    times = {size(10): {CPU: 1.0, ADAM: 2.4}, small(1000) + NEW: {CPU: 1.0, ADAM: 12.0}}
    times[model("ResNet-50")] = {CPU: 1.0, RADAM: 4.0, "stream of 28 B": 0.9}
    times[size(26)] = {CUDA: 1.0, "copy of 28 B": 0.96}
    table = frame(made(times))
    lines = goals.lines(table, "cpu").splitlines()
    said = dict(line[2:].split(": ", 1) for line in lines)
    assert len(said) == 17
    assert said["1,000 tensors of 64, gradients new, at least 4.80"].startswith("met, 12.0")
    assert said[f"float32 to 2^12, times {ADAM}, at least 2.50"].startswith("missed, 2.400")
    assert said["bfloat16, share of the limit for 22 bytes, at least 0.93"] == "not measured"
    resnet = said[f"ResNet-50, times {RADAM}, at least 5.00"]
    assert resnet == "missed, 4.000 at ResNet-50 float32; memory allows 4.444"
    assert "open, 0.960 at 2^26 float32; not measured: 2^28" in goals.lines(table, "cuda")


def test_a_page_shows_shares_ratios_and_what_is_wrong():
    times = {CPU: 45.2, RADAM: 245.0, ADAM: "param is off", "stream of 28 B": 45.0}
    found = made({size(26): times})
    found["rows"][0]["cores_of_others"] = 1.5
    text = tables.comparison(frame(found), [size(26)], [CPU, RADAM, ADAM])
    assert "2^26  (!)" in text
    assert "45.2 ms, 100%" in text
    assert "245 ms, 5.42x" in text
    every = pd.concat([frame(made({f"{n} cases": {CPU: 1.0, ADAM: "off"}})) for n in range(9)])
    every.loc[(every.case == "8 cases") & (every.optimizer == ADAM), "status"] = "measured"
    assert tables.left_out(every) == f"- {ADAM}: WRONG: off (8 of 9 cases)"
    late = {CPU: OUT_OF_TIME, ADAM: OUT_OF_TIME}
    found["rows"] += made({size(10): late, size(12): late})["rows"]
    page = pages.page({**found, "interrupted": True})
    assert "- torch Adam(fused): WRONG: param is off (every case)\n- every optimizer: " in page
    assert page.endswith(f"{OUT_OF_TIME} (2^10 float32; 2^12 float32)\n")
    assert "some cases are missing" in page
    gpu = {"set": "gpu", "device": {"name": "A GPU", "driver": "1"}}
    assert pages.page({**made({size(26): {CUDA: 1.0}}), **gpu}).startswith("# A GPU\n")
    part = pages.readme_part({pages.ROOT / "bench/results/a": found})
    assert "(bench/results/a/README.md)" in part


def test_costs_grow_with_elements_and_tensors():
    times = {size(power): {CPU: 7e-7 * (1 << power)} for power in (22, 24, 26)}
    found = made({**times, size(10): {CPU: 99.0}})
    for n in (1, 10, 1000):
        lists = {"elements": 64 * n, "tensors": n, "case": small(n), "ms": 0.01 + 0.002 * n}
        found["rows"].append({**found["rows"][0], **lists})
        memory = {"kind": "memory", "ms": None, "extra_bytes": 300 * n}
        found["rows"].append({**found["rows"][-1], **memory})
    lines = growth.growth(frame(found), CPU)
    assert lines["ms", "elements"].each == pytest.approx(7e-7)
    assert lines["ms", "tensors"][:2] == pytest.approx((0.01, 0.002))
    assert lines["extra_bytes", "tensors"].each == pytest.approx(300)
    assert lines["extra_bytes", "elements"] is None
    assert growth.growth(frame(found), RADAM) == dict.fromkeys(lines)


def test_published_pages_equal_their_results():
    assert pages.main(["--check"]) == 0
