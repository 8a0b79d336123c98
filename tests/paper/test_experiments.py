"""The experiments of bench/paper: what the trainings measure, and quick runs of all of them."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("sklearn", reason="bench/paper needs pip install -e '.[paper]'")

from bench.paper import __main__ as command
from bench.paper.experiments import EXPERIMENTS, controls, distortion, robustness, search
from bench.paper.harness import language, optimizers, plots

SIZE = {"layers": 2, "width": 32, "context": 8, "batch": 2}


def last_step(optimizer: str, seed: int = 0, steps: int = 1) -> language.TrainingStep:
    return list(language.training(optimizer, 1e-3, steps, seed=seed, **SIZE))[-1]


def test_the_output_of_each_block_is_normalized():
    model = language.PostNormModel(layers=3, width=32, context=8)
    x = 10 + 5 * torch.randn(2, 8, 32)
    for block in model.blocks:
        x = block(x)
        torch.testing.assert_close(x, F.layer_norm(x, (32,)), rtol=0, atol=1e-3)


def test_a_seed_gives_every_optimizer_the_same_model_and_batches():
    same = {last_step(name).loss for name in ("Adam", "RAdam", "SGD with momentum")}
    assert len(same) == 1
    assert last_step("Adam", seed=1).loss not in same


def test_a_diverged_training_has_the_loss_of_uniform_predictions():
    last = last_step("Adam", steps=20)
    assert last.held_out_loss() < math.log(256)
    with torch.no_grad():
        last.model.head.weight.fill_(math.nan)
    assert last.held_out_loss() == math.log(256)


def test_histograms_show_the_fused_optimizers_psi_where_there_were_gradients(monkeypatch):
    readable = lambda params, lr, steps: optimizers.RAdam(params, lr)  # noqa: E731
    monkeypatch.setitem(optimizers.MAKE, "readable", readable)
    fused = last_step("RAdam", steps=7)
    g, psi = distortion.logarithms(fused)
    assert len(g) <= len(psi) < sum(p.numel() for p in fused.model.parameters())
    expected = distortion.logarithms(last_step("readable", steps=7))[1]
    np.testing.assert_allclose(psi, expected, atol=1e-3)


def test_width_is_the_range_around_the_best_that_is_within_a_hundredth():
    for accuracies, decades in (
        ([0.90, 0.99, 0.99, 0.99, 0.90], 2 + 2 / 9),  # a ninth of a decade beyond, on either side
        ([0.10, 0.90, 0.91, 0.10, 0.10], 1 + 1 / 81),
        ([0.99, 0.99, 0.98, 0.97, 0.99], 2.0),  # to the end of the grid; not beyond a gap
        ([0.50, 0.90, 0.50, 0.50, 0.50], 0.05),
    ):
        found = robustness.width(np.logspace(-4, 0, 5), np.array(accuracies))
        assert found == pytest.approx(decades, abs=1e-9), accuracies


@pytest.mark.parametrize(
    ("shift", "scale", "supported"),
    [(-0.5, 1, True), (0.5, 1, False), (0.0, 1, False), (-0.5, 100, None)],
)
def test_controls_are_judged_in_pairs_of_the_same_seed(shift, scale, supported):
    adam = pd.Series([3.0, 2.0, 1.0, 4.0, 5.0, 6.0], name="Adam")
    noise = scale * pd.Series([0.01, -0.01, 0.02, -0.02, 0.03, -0.02])
    verdict = controls.compare((adam + shift + noise).rename("RAdam"), adam, "it helps")
    assert verdict.supported is supported
    assert f"RAdam minus Adam is {shift + noise.mean():+.3f}" in verdict.words


@pytest.mark.parametrize(
    ("adam", "warm", "supported"),
    [(3.3, 2.2, True), (3.3, 2.6, False), (2.4, 2.2, False)],  # 2.6 is not near the best loss
)
def test_the_search_finds_a_setting_only_where_warmup_is_good(adam, warm, supported):
    losses = {("Adam", 0.01): adam, ("Adam with warmup", 0.01): warm}
    losses |= {("Adam", 0.001): 2.2, ("Adam with warmup", 0.001): 2.2}
    rows = pd.DataFrame(
        {"layers": 8, "optimizer": name, "lr": lr, "seed": seed, "held_out": loss}
        for (name, lr), loss in losses.items()
        for seed in range(2)
    )
    assert search.judge(rows, False)[0].supported is supported


@pytest.fixture(autouse=True)
def one_thread():
    """Threads would only compete with other tests: these tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_quick_runs_leave_results_and_support_what_theory_settles(tmp_path, monkeypatch):
    monkeypatch.setitem(plots.STYLE, "figure.dpi", 40)  # drawing takes most of the time
    assert command.main(["all", "--quick", "--out", str(tmp_path)]) == 0
    settled = {"approximation": (0, 2), "variance": (0, 3), "noise": (0, 1), "travel": (0, 1)}
    settled["counterexample"] = (0,)
    for name in EXPERIMENTS:
        file = tmp_path / "quick" / name
        assert not pd.read_csv(f"{file}.csv", comment="#").isna().all().any(), name
        assert Path(f"{file}.png").exists()
        result = json.loads(Path(f"{file}.json").read_text())
        assert result["provenance"]["mode"] == "quick"
        for index in settled.get(name, ()):
            assert result["verdicts"][index]["supported"] is True, result["verdicts"][index]
