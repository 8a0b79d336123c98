"""bench.precision: emulated formats, statistics, verdicts on good and bad formats, and the page."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("sklearn", reason="bench/precision needs pip install -e '.[paper]'")

from bench.paper.harness.provenance import insert
from bench.paper.harness.report import page_part
from bench.precision import __main__ as command
from bench.precision import contenders, emulations, fidelity, memory, stall, trainings
from bench.precision.contenders import BY_NAME, EXACT, FORMATS, NEAREST
from bench.precision.tasks import TASKS

pytestmark = pytest.mark.usefixtures("one_thread")
# The largest relative error of a value, and a share of its group's largest that may be lost.
CODECS = {
    "float32": (emulations.Float32(), 0, 0),
    "bf16": (emulations.BFloat16(), 2**-8, 0),
    "bf16 SR": (emulations.BFloat16Random(), 2**-7, 0),
    "exact": (emulations.Exact(), 0, 0),
    "kahan": (emulations.Kahan(), 2**-16, 0),
    "error int8": (emulations.ErrorInt8(), 2**-15, 0),
    "softsign int8": (emulations.SoftsignInt8(), 2**-7, 2**-8),
    "dynamic": (emulations.Dynamic8(signed=True), 0, 0.0071),
    "float8": (emulations.Float8(), 2**-4, 2**-17),
}
UNSIGNED = {
    "root uint8": (emulations.RootUint8(), 2**-7, 2**-8),
    "dynamic": (emulations.Dynamic8(signed=False), 0, 0.0036),
}


def values(signed):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 512, generator=generator) * 10 ** (
        3 * torch.rand(3, 512, generator=generator) - 3
    )
    x[:, ::7] = 0
    return x if signed else x.abs()


@pytest.mark.parametrize(
    ("signed", "codec", "relative", "lost"),
    [(True, *row) for row in CODECS.values()] + [(False, *row) for row in UNSIGNED.values()],
    ids=[*CODECS, *(f"unsigned {name}" for name in UNSIGNED)],
)
def test_a_codec_gives_back_what_it_stores(signed, codec, relative, lost):
    x = values(signed)
    back = codec.decode(*codec.encode(x))
    assert ((back - x).abs() <= relative * x.abs() + lost * x.abs().amax()).all()
    assert (back[:, ::7] == 0).all()
    if relative or lost:
        assert not torch.equal(back, x)
    zeros = torch.zeros(2, 256)
    assert torch.equal(codec.decode(*codec.encode(zeros)), zeros)


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_values_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    expected = functional.create_dynamic_map(signed)
    assert torch.equal(emulations.dynamic_values(signed=signed), expected)


def test_an_emulation_of_the_exact_format_equals_the_product_to_the_bit(monkeypatch):
    for name, task in TASKS.items():
        monkeypatch.setitem(TASKS, name, task._replace(steps=12))
    make = contenders._emulated(emulations.Exact(), emulations.FLOAT32)
    emulated = contenders.Format("emulated", contenders.EMULATION, 12, make)
    monkeypatch.setitem(BY_NAME, "emulated", emulated)
    for name in TASKS:
        losses, same = (
            [row["loss"] for row in trainings.train(name, 0.999, of, 2)]
            for of in (EXACT, "emulated")
        )
        assert losses == same
        assert losses[0] != losses[1]


def made(**off):
    """Rows of trainings whose losses are `off` that of exact masters, by format."""
    random = np.random.default_rng(0)
    rows = []
    for training in ("bytes", "zipf"):
        for beta2 in trainings.BETAS:
            for seed in range(trainings.SEEDS):
                exact, noise = 2 + random.random(), 1e-4 * random.standard_normal()
                for name in (EXACT, *trainings.QUICK[1:]):
                    loss = exact + (name != EXACT) * (off.get(name, 0.0) + noise)
                    facts = {"training": training, "beta2": beta2, "format": name}
                    rows.append({**facts, "seed": seed, "loss": loss})
    return pd.DataFrame(rows).sample(frac=1, random_state=0)  # no order is assumed


def supported(rows):
    return [verdict.supported for verdict in trainings.judge(rows, False)]


def test_deviations_are_paired_by_seed_and_bad_formats_lie_outside():
    good = made(**{NEAREST: 3e-3})
    assert supported(good)[:3] == [True, True, True]
    cell = trainings.cells(good)[NEAREST]["zipf", 0.95]
    assert cell.interval.mean == pytest.approx(3e-3, abs=1e-4)
    assert cell.interval.half == pytest.approx(1e-4 * 2.09 / 20**0.5, rel=0.5)
    assert cell.worst == pytest.approx(3e-3, abs=4e-4)
    assert supported(made(**{NEAREST: 3e-3, "32, bf16 SR": 0.97e-3}))[0] is False
    assert supported(made(**{NEAREST: 0.5e-3}))[1] is False
    assert supported(made(**{NEAREST: 3e-3, "24, block8": -11e-3}))[2] is False
    diverged = made(**{NEAREST: 3e-3, "24, block8": np.nan})
    assert supported(diverged)[2] is False
    assert "20 diverged" in trainings.table(diverged).to_markdown()


def test_rounding_to_nearest_stalls_and_stochastic_rounding_does_not():
    ours, nearest = (stall.stall(name, 1000) for name in ("32, bf16 SR", NEAREST))
    block8 = stall.stall("32, block8", 1000)
    verdicts = stall.judge(pd.DataFrame(ours + nearest + block8), False)
    assert [verdict.supported for verdict in verdicts] == [True, True]
    swapped = [{**ours[0], "format": NEAREST}, {**nearest[0], "format": "32, bf16 SR"}]
    verdicts = stall.judge(pd.DataFrame(swapped + block8), False)
    assert [verdict.supported for verdict in verdicts] == [False, False]


def test_steps_of_float32_are_those_of_float64_and_others_differ():
    size = {"elements": 256, "steps": 120, "first": 61}
    rms = {
        name: max(row["rms"] for row in fidelity.fidelity(name, 0.95, **size))
        for name in (EXACT, "32, bf16 SR", "32, block8")
    }
    assert rms[EXACT] < 1e-5
    assert 1e-3 < rms["32, bf16 SR"] < 0.03 < rms["32, block8"] < 1


def test_the_bytes_of_all_tensors_are_those_of_the_shapes():
    (row,) = memory.memory("24, block8", "ResNet-50")
    assert row["tensors"] == row["expected"]
    assert row["peak"] == pytest.approx(row["tensors"], rel=0.2)


def test_stored_bytes_are_those_of_the_state():
    for tier, (*_, each) in memory.TIERS.items():
        name = "bf16, float32 moments" if tier.startswith("bf16") else tier
        assert BY_NAME[name].stored - 2 * ("block8" in tier) / 128 == each - 2


def test_runs_have_names_of_their_own_and_refer_to_formats():
    for quick in (True, False):
        for experiment in command.EXPERIMENTS.values():
            keys = [run.key for run in experiment.runs(quick)]
            assert len(set(keys)) == len(keys)
    assert all({row.alike or EXACT, row.against} <= {*BY_NAME} for row in FORMATS)


@pytest.mark.parametrize("name", command.EXPERIMENTS)
def test_the_page_shows_the_published_result(name):
    experiment, site = command.EXPERIMENTS[name], command.SITE
    page = site.page.read_text()
    assert insert(page, name, page_part(experiment, site)) == page
    assert all((site.results / f"{name}.{suffix}").exists() for suffix in ("csv", "png"))
    result = json.loads((site.results / f"{name}.json").read_text())
    assert result["provenance"]["mode"] == "full"
    rows = pd.read_csv(site.results / f"{name}.csv", comment="#")
    said = [verdict.supported for verdict in experiment.judge(rows, False)]
    assert said == [verdict["supported"] for verdict in result["verdicts"]]


def test_the_summary_is_that_of_the_published_trainings():
    text = command.SITE.page.read_text()
    assert insert(text, command.MARKER, command.summary()) == text
    text = command.PROJECT.read_text()
    assert insert(text, command.MARKER, command.summary()) == text
