"""The paper's training experiments: what they train, measure, and make of it."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("sklearn", reason="the experiments' data: pip install 'radam_kernels[paper]'")

from bench.paper import controls, distortion, frame, language, robustness, search
from bench.paper.optimizers import MAKE

SIZE = {"layers": 2, "width": 32, "context": 8, "batch": 2}


def first(optimizer: str, seed: int = 0, steps: int = 1) -> language.Moment:
    made = language.training(
        lambda params: MAKE[optimizer](params, 1e-3, steps), seed=seed, steps=steps, **SIZE
    )
    return list(made)[-1]


def test_what_leaves_each_block_is_normalized():
    model = language.PostNormModel(layers=3, width=32, context=8)
    x = 10 + 5 * torch.randn(2, 8, 32)
    for block in model.blocks:
        x = block(x)
        torch.testing.assert_close(x.mean(-1), torch.zeros(2, 8), rtol=0, atol=1e-5)
        torch.testing.assert_close(x.std(-1, correction=0), torch.ones(2, 8), rtol=0, atol=1e-3)


def test_a_seed_gives_every_optimizer_the_same_model_and_batches():
    same = {first(name).loss for name in ("Adam", "RAdam", "SGD with momentum")}
    assert len(same) == 1
    assert first("Adam", seed=1).loss not in same


def test_a_training_that_diverged_counts_as_a_guess():
    moment = first("Adam", steps=20)
    assert moment.held_out_loss() < math.log(256)
    with torch.no_grad():
        moment.model.head.weight.fill_(math.nan)
    assert moment.held_out_loss() == math.log(256)


def test_histograms_show_the_fused_optimizers_psi_and_leave_out_what_had_no_gradient():
    fused = first("RAdam", steps=7)
    frames = list(
        language.training(lambda params: frame.RAdam(params, 1e-3), seed=0, steps=7, **SIZE)
    )[-1]
    g, psi = distortion.logarithms(fused)
    parameters = sum(p.numel() for p in fused.model.parameters())
    assert len(g) <= len(psi) < parameters
    np.testing.assert_allclose(psi, distortion.logarithms(frames)[1], atol=1e-3)


@pytest.mark.parametrize(
    ("accuracies", "decades"),
    [
        ([0.90, 0.99, 0.99, 0.99, 0.90], 2 + 2 / 9),  # a ninth of a decade beyond, on either side
        ([0.10, 0.90, 0.91, 0.10, 0.10], 1 + 1 / 81),
        ([0.99, 0.99, 0.98, 0.97, 0.99], 2.0),  # to the end of the grid; not beyond a gap
        ([0.50, 0.90, 0.50, 0.50, 0.50], 0.05),
    ],
)
def test_width_is_the_range_around_the_best_that_is_within_a_hundredth(accuracies, decades):
    found = robustness.width(np.logspace(-4, 0, 5), np.array(accuracies))
    assert found == pytest.approx(decades, abs=1e-9)


@pytest.mark.parametrize(
    ("shift", "scale", "says"),
    [(-0.5, 1, True), (0.5, 1, False), (0.0, 1, False), (-0.5, 100, None)],
)
def test_controls_are_judged_by_pairs_of_one_seed(shift, scale, says):
    ours = pd.Series([3.0, 2.0, 1.0, 4.0, 5.0, 6.0])
    noise = scale * pd.Series([0.01, -0.01, 0.02, -0.02, 0.03, -0.02])
    verdict = controls.compare(ours + shift + noise, ours, "it helps", "RAdam", "Adam")
    assert verdict.supported is says
    assert f"{shift + noise.mean():+.3f}" in verdict.words


def test_the_search_finds_a_setting_only_where_warmup_is_good():
    def rows(adam: float, warm: float, other: float) -> pd.DataFrame:
        losses = {("Adam", 0.01): adam, ("Adam with warmup", 0.01): warm}
        losses |= {("Adam", 0.001): other, ("Adam with warmup", 0.001): other}
        return pd.DataFrame(
            {"layers": 8, "optimizer": name, "lr": lr, "seed": seed, "held_out": loss}
            for (name, lr), loss in losses.items()
            for seed in range(2)
        )

    assert search.judge(rows(3.3, 2.2, 2.2), False)[0].supported is True
    assert search.judge(rows(3.3, 2.6, 2.2), False)[0].supported is False  # no useful rate
    assert search.judge(rows(2.4, 2.2, 2.2), False)[0].supported is False  # no trouble
