"""bench.report: what it measures and refuses, its files, and the README's section made of them."""

import contextlib
import csv
import io
import json
import re
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tqdm", reason="the report needs tqdm: pip install 'radam_kernels[bench]'")
pytest.importorskip("matplotlib", reason="the report needs matplotlib")
from PIL import Image

from bench import aims, contenders, cpu_table, markers, memory, peak, report, report_lines, rounds
from bench.cases import NEW, Case, Setting, all_cases, list_case, size_case
from bench.contenders import (
    ADAM,
    COMPILED,
    CPU,
    CPU16,
    OPTIMI,
    RADAM,
    RADAM_LOOP,
    Contender,
    Started,
    everyone,
    torchs,
)
from bench.growth import fit, growth
from bench.markers import README, insert
from bench.report_files import KEY, PICTURES, digest, draw
from radam_kernels.fingerprint import measured_fingerprint

ROOT = Path(__file__).resolve().parent.parent
TINY = Case("tiny float32", torch.float32, [(300,), (5, 7)])
NAMED = {c.name: c for c in everyone(torch.float32, "cpu")}


def results_of(times, **facts):
    """A report of these milliseconds, by case and optimizer."""
    cases = {}
    for name, row in times.items():
        elements, tensors = 1 << 30, 1
        if found := re.match(r"2\^(\d+) ", name):
            elements = 1 << int(found[1])
        elif found := re.match(r"([\d,]+) tensors?", name):
            tensors = int(found[1].replace(",", ""))
            elements = 64 * tensors
        rows = {
            optimizer: {"ms": dict.fromkeys(("p20", "median", "p80"), ms), "gb_s": 1.0}
            for optimizer, ms in row.items()
        }
        rounds._compare(rows)
        cases[name] = {"elements": elements, "tensors": tensors, "cores_of_others": 0, "rows": rows}
    head = {
        "cpu": {"name": "Some CPU", "threads": 3, "instruction_set": "baseline"},
        "versions": {"torch": "9.9", "torch-optimi": None, "pytorch_optimizer": "8"},
        "date": "2026-01-02T03:04:05Z",
        "commit": "abc",
        "sources": "0123456789ab",
    }
    return {**head, "interrupted": False, "cases": cases, "memory": {}, **facts}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small part of a report, in full: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("report")
    everybody, few = report.competitors, {CPU, CPU16, ADAM, RADAM}
    said, threads = io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)  # small steps on more wait long for each other on a busy machine
    words = ["--out", str(folder), "--only", "^2.10 float32|^10 tensors", "--seconds", "0"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(rounds, "TURN", 0.0)
        patch.setattr(
            report,
            "competitors",
            lambda *of: [c for c in everybody(*of) if not c.make or c.name in few],
        )
        assert report.main(words) == 0
    torch.set_num_threads(threads)
    return folder, said.getvalue()


def test_a_report_has_every_row_with_its_ratios_and_what_it_was_made_on(tiny):
    folder, _ = tiny
    found = json.loads((folder / report.FILE).read_text())
    assert found["sources"] == measured_fingerprint(ROOT)
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["threads"] == 1
    assert {"name", "instruction_set"} <= found["cpu"].keys()
    assert list(found["cases"]) == [size_case(10, "float32"), list_case(10, "float32")]
    rows = found["cases"][size_case(10, "float32")]["rows"]
    for name in (CPU, ADAM, RADAM):
        row = rows[name]
        assert row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        assert row["ms"]["count"] >= 2 * rounds.ROUNDS
        assert row["gb_s"] == pytest.approx((28 << 10) / row["ms"]["median"] / 1e6)
        for key, peer in {"vs_adam_fused": ADAM, "vs_radam_foreach": RADAM}.items():
            assert row[key] == pytest.approx(rows[peer]["ms"]["median"] / row["ms"]["median"])
        if "limit_gb_s" in row:  # there is a compiler
            assert row["share_of_limit"] == pytest.approx(row["gb_s"] / row["limit_gb_s"])


def test_csv_and_table_say_what_the_json_says(tiny):
    folder, said = tiny
    found = json.loads((folder / report.FILE).read_text())
    with (folder / "report.csv").open(newline="") as file:
        lines = {(line["case"], line["optimizer"]): line for line in csv.DictReader(file)}
    assert len(lines) == sum(len(case["rows"]) for case in found["cases"].values())
    for name, case in found["cases"].items():
        assert name in said
        for optimizer, row in case["rows"].items():
            line = lines[name, optimizer]
            assert line["tensors"] == str(case["tensors"])
            assert line.get("not_measured", "") == row.get("not_measured", "")
            if "ms" in row:
                assert float(line["ms_median"]) == row["ms"]["median"]
                assert report_lines.duration(row["ms"]["median"] / 1e3) in said


def test_pictures_carry_the_digest_of_what_they_show(tiny):
    folder, _ = tiny
    found = json.loads((folder / report.FILE).read_text())
    assert not (folder / "models.png").exists()  # no model was measured
    for name in ("bandwidth", "tensors"):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.text[KEY] == digest(found)
            assert picture.width == 1700
    found["cases"][size_case(10, "float32")]["rows"][CPU]["ms"]["median"] *= 2
    assert picture.text[KEY] != digest(found)


def test_drawing_again_measures_nothing(tiny, monkeypatch):
    folder, _ = tiny
    before = (folder / report.FILE).read_bytes()
    (folder / "tensors.png").unlink()
    monkeypatch.setattr(report, "measure", None)
    assert report.main(["--draw", "--out", str(folder)]) == 0
    assert (folder / "tensors.png").exists()
    assert (folder / report.FILE).read_bytes() == before


def test_an_interruption_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    calls = count()

    def measure(setting, *_):
        if next(calls):
            raise KeyboardInterrupt
        return results_of({setting.name: {CPU: 1.0}})["cases"][setting.name]

    monkeypatch.setattr(report, "measure", measure)
    monkeypatch.setattr(report, "faults", lambda *_: {})
    assert report.main(["--out", str(tmp_path)]) == 130
    found = json.loads((tmp_path / report.FILE).read_text())
    assert list(found["cases"]) == [size_case(10, "float32")]
    assert "interrupted" in capsys.readouterr().out


def test_a_quick_report_is_part_of_a_full_one_and_has_what_the_aims_ask_for():
    quick, full = ({s.name: s for s in report.settings(whole)} for whole in (False, True))
    assert quick.items() <= full.items()
    asked = {name for _, _, names, _ in aims.AIMS[CPU] for name in names}
    assert asked - quick.keys() == {size_case(28, "float32")}
    assert asked <= full.keys()
    for dtype in (torch.float32, torch.bfloat16):
        names = [{c.name for c in report.competitors(dtype, whole)} for whole in (False, True)]
        assert names[0] < names[1]
        assert {CPU, ADAM, RADAM} <= names[0]


def test_what_would_take_minutes_is_left_out_with_a_word():
    large, small, lists = (all_cases("float32")[key] for key in ("one_64M", "one_1M", "10_of_64"))
    assert report.too_slow(NAMED[RADAM], large) is None
    assert report.too_slow(NAMED[RADAM_LOOP], small) is None
    assert "up to 32M" in report.too_slow(NAMED[RADAM_LOOP], large)
    assert report.too_slow(NAMED[COMPILED], small) is None
    assert "one tensor" in report.too_slow(NAMED[COMPILED], lists)


def test_a_wrong_result_has_no_speed():
    wrong = Contender("wrong", 28, torchs(torch.optim.Adam), radam=True)
    assert "param of tensor" in report.faults([NAMED[CPU], wrong], torch.float32)["wrong"]["wrong"]
    rows = rounds.measure(Setting(TINY), [NAMED[CPU], wrong], {}, 0)["rows"]
    assert "param of tensor" in rows["wrong"]["wrong"]
    assert "ms" not in rows["wrong"]
    assert rows[CPU]["ms"]["median"] > 0
    results = results_of({TINY.name: {}})
    results["cases"][TINY.name]["rows"] = rows
    assert "WRONG: param of tensor" in "\n".join(report_lines.table(results))


def test_what_is_left_out_gets_a_word(monkeypatch):
    monkeypatch.setattr(contenders, "find_spec", lambda package: None)
    peers = {c.name: c for c in everyone(torch.float32, "cpu")}
    chosen = [peers[CPU], peers[OPTIMI], peers[RADAM]]
    rows = rounds.measure(Setting(TINY), chosen, {RADAM: {"not_measured": "time"}}, 0)["rows"]
    assert rows[OPTIMI] == {"not_measured": "optimi is not installed"}
    assert rows[RADAM] == {"not_measured": "time"}
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    none = rounds.measure(Setting(TINY), chosen, {}, 0)
    assert none["rounds"] == 0
    assert "memory: tiny float32 needs" in none["rows"][CPU]["not_measured"]
    results = results_of({}) | {"cases": {"a": {**none, "rows": rows}, "b": none}}
    lines = report_lines.left_out(results)
    assert f"{OPTIMI}: optimi is not installed" in lines
    assert f"{RADAM}: time (a)" in lines
    reason = none["rows"][CPU]["not_measured"]
    results["cases"]["a"] = none
    assert f"{CPU}, {RADAM}: {reason}" in report_lines.left_out(results)


def test_all_take_turns_and_the_judged_have_five_rounds_whatever_they_take(monkeypatch):
    turns = []

    def turn(player, *_):
        turns.append(player.contender.name)
        player.seconds.append(1.0)

    monkeypatch.setattr(rounds, "_turn", turn)
    names = [CPU, ADAM, "some other"]
    players = [Contender(name, 28, torchs(torch.optim.SGD)) for name in names]
    assert rounds.measure(Setting(TINY), players, {}, 0)["rounds"] == rounds.ROUNDS == 5
    assert turns == names * rounds.LEAST + names[:2] * (rounds.ROUNDS - rounds.LEAST)


def test_the_first_step_of_a_turn_is_not_counted(monkeypatch):
    monkeypatch.setattr(rounds, "TURN", 60.0)
    ticks = count(1)
    clock = SimpleNamespace(sample=lambda step, lead: SimpleNamespace(host=next(ticks)))
    player = rounds._Player(NAMED[CPU], [], Started(None, None), [])
    rounds._turn(player, Setting(TINY), clock)
    assert player.seconds == list(range(2, 2 + rounds.STEPS[1]))
    monkeypatch.setattr(rounds, "TURN", 0.0)
    player.seconds.clear()
    rounds._turn(player, Setting(TINY), clock)
    assert len(player.seconds) == rounds.STEPS[0]


def test_gradients_are_new_and_caches_swept_where_that_is_asked_for(monkeypatch):
    seen = []
    params = TINY.make(rounds.DEVICE)
    real = rounds.HostClock.sample

    def sample(self, step, lead):
        seen.append((params[0].grad, self._sweep.nbytes))
        return real(self, step, lead)

    monkeypatch.setattr(rounds.HostClock, "sample", sample)
    monkeypatch.setattr(Case, "make", lambda self, device: params)
    held, sweep = params[0].grad, rounds.SWEEP
    rounds.measure(Setting(TINY), [NAMED[CPU]], {}, 0)
    assert all(grad is held and size < sweep for grad, size in seen)
    seen.clear()
    found = rounds.measure(Setting(TINY, new_gradients=True, cold=True), [NAMED[CPU]], {}, 0)
    assert (found["gradients"], found["caches"]) == ("new", "cold")
    assert len({id(grad) for grad, _ in seen}) == len(seen)
    assert {size for _, size in seen} == {sweep}
    assert torch.equal(params[0].grad, held)


def test_a_fit_finds_the_cost_of_a_step_and_of_each_tensor():
    work = [1, 10, 100, 1000, 10_000]
    line = fit(work, [5e-6 + 2e-7 * n for n in work])
    assert line == pytest.approx((5e-6, 2e-7, 0), rel=1e-9, abs=1e-9)
    # A large point that is off by a tenth must not hide the cost of a step.
    off = fit(work, [5.2e-6, 7e-6, 25e-6, 205e-6, 1.1 * 2005e-6])
    assert off.fixed == pytest.approx(5e-6, rel=0.1)
    assert 0.02 < off.off < 0.1


def test_growth_is_taken_from_large_sizes_small_tensors_and_memory():
    small = list_case(1000, "float32")
    times = {size_case(power, "float32"): 7e-7 * (1 << power) for power in (22, 24, 26)}
    times |= {list_case(n, "float32"): 0.01 + 0.002 * n for n in (1, 10, 1000)}
    for other in (size_case(10, "float32"), size_case(24, "bfloat16"), f"{small}, gradients new"):
        times[other] = 99.0
    points = [{"elements": n, "tensors": 1, "extra_bytes": 500 + 4 * n} for n in (1000, 9000)]
    points += [{"elements": 64, "tensors": n, "extra_bytes": 300 * n} for n in (1000, 9000)]
    results = results_of({name: {CPU: ms} for name, ms in times.items()}, memory={CPU: points})
    found = growth(results, CPU)
    assert found.seconds_by_elements.each == pytest.approx(7e-10)
    assert found.seconds_by_tensors[:2] == pytest.approx((1e-5, 2e-6))
    assert found.bytes_by_elements.each == pytest.approx(4)
    assert found.bytes_by_tensors.each == pytest.approx(300)
    assert growth(results, RADAM) == (None, None, None, None)
    assert report_lines.growth_rows(results) == {
        CPU: ["700 ps", "10.0 us", "2.00 us", "0%", "4.0 B", "300 B"]
    }


def test_aims_are_met_missed_or_not_measured():
    results = results_of(
        {
            size_case(10, "float32"): {CPU: 1.0, ADAM: 2.4},
            list_case(1000, "float32") + NEW: {CPU: 1.0, ADAM: 12.0},
        }
    )
    said = dict(aims.verdicts(results, CPU))
    small = said["1,000 tensors of 64, gradients new, at least 4.80"]
    assert small.startswith("met, 12.0")
    assert said["float32 to 2^12, times torch Adam(fused), at least 2.50"].startswith("missed, 2.4")
    assert said["bfloat16, share of the limit for 22 bytes, at least 0.93"] == "not measured"
    assert len(said) == 10


@pytest.mark.skipif(not peak.STATUS.exists(), reason="reads /proc")
def test_memory_beyond_the_moments_is_measured_in_processes_of_their_own():
    size = 1 << 24
    points = [peak.Point(name, size, 1) for name in (CPU, RADAM)]
    ours, torchs_own = peak.extra_bytes(points)
    assert ours / size == pytest.approx(0, abs=0.1)
    assert torchs_own / size == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.3, "12.3 s"), (0.0451, "45.1 ms"), (1e-3, "1.00 ms"), (7.214e-6, "7.21 us"),
     (0.2454, "245 ms"), (6.7e-10, "670 ps"), (0.0, "0.00 ps"), (-2e-6, "-2.00 us")],
)  # fmt: skip
def test_durations_have_three_digits_and_a_unit(seconds, text):
    assert report_lines.duration(seconds) == text


def test_the_readme_holds_what_the_command_makes():
    text = README.read_text()
    assert insert(text, cpu_table.NAME, cpu_table.section()) == text, (
        "run `python -m bench.cpu_table --write`"
    )


def test_a_command_writes_its_part_and_nothing_else(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n")
    monkeypatch.setattr(markers, "README", page)
    assert markers.command("", "a", lambda: "new", []) == 0
    assert capsys.readouterr().out == "new\n"
    assert "old" in page.read_text()
    assert markers.command("", "a", lambda: "new", ["--write"]) == 0
    assert page.read_text() == "before\n<!-- a:begin -->\nnew\n<!-- a:end -->\nafter\n"
    with pytest.raises(ValueError, match="<!-- b:begin --> and <!-- b:end -->"):
        markers.command("", "b", lambda: "new", ["--write"])


def test_the_readmes_pictures_were_drawn_from_the_committed_results():
    reports = cpu_table.read(cpu_table.RESULTS)
    assert reports
    for folder, results in reports.items():
        for name in PICTURES:
            with Image.open(folder / f"{name}.png") as picture:
                assert picture.text[KEY] == digest(results), f"run bench.report --draw on {folder}"


def test_the_section_shows_shares_ratios_and_what_was_disturbed(tmp_path):
    half = size_case(26, "bfloat16")
    results = results_of(
        {
            size_case(26, "float32"): {CPU: 45.2, RADAM: 245.0, ADAM: 43.0},
            half: {CPU: 40.0, CPU16: 30.0, ADAM: 60.0},
        }
    )
    results["cases"][half]["rows"][CPU]["share_of_limit"] = 0.931
    results["cases"][half]["rows"][RADAM] = {"wrong": "param is off"}
    results["cases"][half]["cores_of_others"] = 1.5
    section = cpu_table.render({tmp_path: results}, "0123456789ab")
    assert "| 2^26 | 45.2 ms | 245 ms, 5.42x | 43.0 ms, 0.95x |" in section
    assert (
        "| 2^26 bfloat16 (!), float32 moments | 40.0 ms, 93% | **wrong** | 60.0 ms, 1.50x |"
        in section
    )
    assert "| 2^26 bfloat16 (!), 16-bit moments | 30.0 ms | **wrong** | 60.0 ms, 2.00x |" in section
    assert cpu_table.DISTURBED in section
    assert "stale" not in section
    assert "**stale**: measured on sources 0123456789ab, these are ba98" in cpu_table.render(
        {tmp_path: results}, "ba98"
    )
    assert list(draw(results, tmp_path)) == [tmp_path / "bandwidth.png"]


def test_without_results_the_section_says_so(tmp_path):
    assert cpu_table.render(cpu_table.read(tmp_path), "x") == cpu_table.NOTHING
