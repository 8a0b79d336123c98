"""bench/gpu_report.sh and the table in the README, as far as they can be tried without a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import aims, gpu_table, missing_imports
from bench.cases import DTYPES
from bench.contenders import ADAM, CUDA, CUDA16, GRAPH, RADAM, TRITON, contenders, copy_name
from bench.markers import README, insert
from bench.models import ALL_MODELS, bert, count, gpt2, llama, resnet50, vit
from bench.turns import OUT_OF_TIME
from radam_kernels.fingerprint import fingerprint, measured_fingerprint

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["build", "test", "sanitize", "time", "ncu", "nsys"]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def report(*words: object, path: Path | None = None) -> subprocess.CompletedProcess:
    """Runs the script; the tools in `path` come before all others."""
    search = os.pathsep.join([*([str(path)] if path else []), os.environ["PATH"]])
    command = ["bash", str(ROOT / "bench" / "gpu_report.sh"), *map(str, words)]
    environment = {**os.environ, "PATH": search, "PYTHON": sys.executable}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def stages(folder: Path) -> dict[str, list[str]]:
    """By name: status, seconds, reason."""
    lines = (folder / "report.txt").read_text().splitlines()
    return {name: rest for name, *rest in (line.split("\t") for line in lines)}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return report("--dry-run", "--out", folder), folder


@pytest.fixture
def results(dry_run):
    """As if they had been measured on a GPU."""
    found = json.loads((dry_run[1] / "gpu.json").read_text())
    assert found["dry_run"] is True
    device = {"name": "NVIDIA H200", "driver": "580.1"}
    return {**found, "dry_run": False, "device": device, "sources": "0123456789ab"}


def test_a_dry_run_goes_through_every_stage(dry_run):
    run, folder = dry_run
    assert run.returncode == 0, run.stdout + run.stderr
    found = stages(folder)
    assert list(found) == STAGES
    for name, (status, seconds, reason) in found.items():
        assert status == ("skipped" if name in ("sanitize", "ncu", "nsys") else "ok"), reason
        assert seconds.endswith(" s")
        assert reason
        assert (folder / f"{name}.log").exists()
    assert "collected" in found["test"][2]


def test_the_results_say_what_they_were_measured_on(dry_run):
    found = json.loads((dry_run[1] / "gpu.json").read_text())
    assert found["schema"] == 1
    assert found["sources"] == measured_fingerprint(ROOT)
    assert found["versions"]["torch"] == torch.__version__
    assert {"device", "date", "commit", "clock", "cases"} <= found.keys()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_optimizer_has_a_row_and_ratios_follow_from_times(dry_run, dtype):
    case = json.loads((dry_run[1] / "gpu.json").read_text())["cases"][f"2^26 {dtype}"]
    rows = case["rows"]
    assert list(rows) == [c.name for c in contenders(DTYPES[dtype], "cpu")]
    half = dtype == "bfloat16"
    assert rows[CUDA]["bytes_per_element"] == (22 if half else 28)
    assert rows[ADAM]["bytes_per_element"] == (14 if half else 28)
    assert not half or rows[CUDA16]["bytes_per_element"] == 14
    assert "not_measured" in rows[GRAPH]  # CUDA graphs need a GPU
    for name, row in rows.items():
        if name == GRAPH:
            continue
        time = row["device_ms"]
        assert time["p20"] <= time["median"] <= time["p80"]
        assert time["count"] >= 3
        moved = row["bytes_per_element"] * case["elements"]
        assert row["gb_s"] == pytest.approx(moved / time["median"] / 1e6)
        for key, peer in (
            ("vs_adam_fused", ADAM),
            ("vs_radam_foreach", RADAM),
            ("copy_share", copy_name(row["bytes_per_element"])),
        ):
            theirs = rows[peer]["device_ms"]["median"]
            assert row[key] == pytest.approx(theirs / time["median"]), key


def test_lists_have_the_host_time_with_new_gradients_too(dry_run):
    rows = json.loads((dry_run[1] / "gpu.json").read_text())["cases"]["GPT-2 124M float32"]["rows"]
    for name in (CUDA, TRITON, ADAM, RADAM):
        assert rows[name]["host_us"]["median"] > 0
        assert rows[name]["host_new_us"]["median"] > 0


@pytest.mark.parametrize(
    ("said", "status", "exit_status", "expected"),
    [
        (
            "tests/test_gpu.py::x PASSED\n2 passed\n===== ERROR SUMMARY: 0 errors",
            "ok",
            0,
            "2 passed",
        ),
        ("2 passed\n===== ERROR SUMMARY: 3 errors", "failed", 86, "3 errors"),
        ("========= Error: Device not supported", "skipped", 1, "Device not supported"),
        ("no tests ran\n===== ERROR SUMMARY: 0 errors", "skipped", 5, "no test is named"),
        ("1 failed\n===== ERROR SUMMARY: 0 errors", "failed", 1, "exit status 1"),
    ],
)
def test_the_sanitizer_counts_only_where_it_answers(tmp_path, said, status, exit_status, expected):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\ncat <<'E'\n{said}\nE\nexit {exit_status}\n")
    tool.chmod(0o755)
    run = report("--stage", "sanitize", "--out", tmp_path / "out", path=tmp_path)
    found = stages(tmp_path / "out")["sanitize"]
    assert found[0] == status, found
    assert expected in found[2]
    assert run.returncode == (status == "failed")


def test_a_profiler_that_is_refused_is_no_failure(tmp_path):
    tool = tmp_path / "ncu"
    tool.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM: no permission'\nexit 1\n")
    tool.chmod(0o755)
    run = report("--stage", "ncu", "--out", tmp_path / "out", path=tmp_path)
    assert run.returncode == 0
    assert stages(tmp_path / "out")["ncu"][::2] == [
        "skipped", "==ERROR== ERR_NVGPUCTRPERM: no permission"
    ]  # fmt: skip


def test_a_stage_replaces_only_its_own_line(tmp_path):
    (tmp_path / "report.txt").write_text("build\tok\t9 s\tas before\nnsys\tfailed\t1 s\told\n")
    assert report("--dry-run", "--stage", "nsys", "--out", tmp_path).returncode == 0
    found = stages(tmp_path)
    assert found["build"] == ["ok", "9 s", "as before"]
    assert found["nsys"][0] == "skipped"


@pytest.mark.parametrize("words", [["--stage", "paint"], ["--frobnicate"]])
def test_mistakes_are_named(words):
    run = report(*words)
    assert run.returncode == 2
    assert words[-1] in run.stderr


def test_tests_that_lack_a_package_are_found(tmp_path):
    file = tmp_path / "test_x.py"
    file.write_text("import os\nfrom no_such_package.inner import y\n")
    assert missing_imports.missing(file) == "no_such_package"
    file.write_text("import os\nfrom . import y\nif 0:\n    import no_such_package\n")
    assert missing_imports.missing(file) is None


@pytest.mark.parametrize("name", ALL_MODELS)
def test_models_have_the_parameters_that_are_published(name):
    model = ALL_MODELS[name]
    assert len(model.shapes()) == model.tensors
    assert count(model.shapes()) == model.parameters


def test_models_have_the_shapes_of_their_layers():
    assert resnet50()["layer2.0.downsample.0.weight"] == (512, 256, 1, 1)
    assert list(resnet50())[:2] == ["conv1.weight", "bn1.weight"]
    assert gpt2()["h.11.attn.c_attn.weight"] == (768, 2304)
    assert llama()["layers.15.self_attn.k_proj.weight"] == (512, 2048)
    assert vit()["encoder.pos_embedding"] == (1, 197, 768)
    assert vit()["encoder.layers.encoder_layer_11.mlp.3.weight"] == (768, 3072)
    assert bert()["encoder.layer.11.intermediate.dense.weight"] == (3072, 768)
    assert count(llama(tied=False)) - count(llama()) == 128256 * 2048


def test_the_readme_holds_what_the_command_makes():
    text = README.read_text()
    assert insert(text, gpu_table.NAME, gpu_table.table()) == text, (
        "run `python -m bench.gpu_table --write`"
    )


def test_without_results_the_table_says_so():
    assert "No number on a GPU has been measured yet" in gpu_table.render([], "0123456789ab")


def test_dry_runs_do_not_reach_the_table(tmp_path, results):
    for name, dry in (("nvidia-h200", False), ("cpu", True)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "gpu.json").write_text(json.dumps({**results, "dry_run": dry}))
    assert [found["dry_run"] for found in gpu_table.read(tmp_path)] == [False]


def test_a_table_shows_times_shares_and_ratios(results):
    rows = results["cases"]["2^28 float32"]["rows"]
    for name, median in ((CUDA, 1.75), (RADAM, 7.0), (ADAM, 2.0)):
        rows[name]["device_ms"]["median"] = median
    rows[CUDA]["copy_share"] = 0.97
    rows[TRITON] = {"wrong": "param of tensor 0 is off"}
    rows[ADAM]["host_bound"] = True
    table = gpu_table.render([results], "0123456789ab")
    assert "| 2^28 | 1.75 ms, 97% | **wrong** | 7 ms, 4.00x | 2 ms*, 1.14x |" in table
    assert "NVIDIA H200" in table
    assert "| GPT-2 124M | " in table
    assert "stale" not in table


def test_a_table_of_other_sources_is_stale(results):
    stale = "**stale**: measured on sources 0123456789ab, these are ba9876543210"
    assert stale in gpu_table.render([results], "ba9876543210")


def test_the_fingerprint_of_a_measurement_sees_every_source_of_a_step(tmp_path):
    for name in ("csrc/a.cu", "radam_kernels/train.py", "radam_kernels/backends/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1;")
    before, compiled = measured_fingerprint(tmp_path), fingerprint(tmp_path)
    (tmp_path / "radam_kernels/train.py").write_text("2")
    assert measured_fingerprint(tmp_path) == before
    (tmp_path / "radam_kernels/backends/c.py").write_text("2")
    assert measured_fingerprint(tmp_path) != before
    assert fingerprint(tmp_path) == compiled


@pytest.mark.parametrize(
    ("name", "text", "same", "others"),
    [
        (
            "csrc/a.cu",
            'f("//", 1);',
            '/* a */ f("//",\n  1);  // b\n',
            ['f("//b", 1);', 'f("//", 2);'],
        ),
        (
            "radam_kernels/a.py",
            "def f(x):\n    return x, '#'",
            '"""A."""\ndef f(x):  # b\n\n    """C."""\n    return (x, "#")\n',
            ["def f(x):\n    return x, '# b'", "def f(x):\n    return '#', x"],
        ),
    ],
    ids=["C++", "Python"],
)
def test_a_fingerprint_ignores_comments_docstrings_and_layout(tmp_path, name, text, same, others):
    def of(text: str) -> str | None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return measured_fingerprint(tmp_path)

    assert of(same) == of(text)
    assert len({of(other) for other in (text, *others)}) == 1 + len(others)


def test_aims_are_met_missed_or_open(results):
    assert aims.verdict({"a": None}, 1.0) == "not measured"
    assert aims.verdict({"a": 1.2, "b": 1.0}, 1.0) == "met, 1.000 at b"
    assert aims.verdict({"a": 1.2, "b": 0.9}, 1.0) == "missed, 0.900 at b"
    missed = "missed, 0.900 at b; memory allows 0.950"
    assert aims.verdict({"a": 1.2, "b": 0.9}, 1.0, {"a": 2.0, "b": 0.95}) == missed
    assert aims.verdict({"a": 1.2, "b": 0.9}, 1.0, {"b": 1.1}) == "missed, 0.900 at b"
    assert aims.verdict({"a": 1.2, "b": None}, 1.0) == "open, 1.200 at a; not measured: b"
    rows = results["cases"]["GPT-2 124M float32"]["rows"]
    rows[CUDA]["host_us"]["median"], rows[ADAM]["host_us"]["median"] = 10.0, 60.0
    lines = aims.report(results, CUDA)
    assert any("host, times" in line and "6.000 at GPT-2" in line for line in lines)
    rows[CUDA] = {"not_measured": OUT_OF_TIME}
    lines = aims.report(results, CUDA)
    assert any("host, times" in line and "not measured" in line for line in lines)
