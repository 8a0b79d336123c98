"""One StepScalars and one Segment, in Python and in C++: the same fields, and the same bits."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radam_kernels import schedule
from radam_kernels.modules import DTYPES, cpu
from radam_kernels.scaling import UNSCALED
from radam_kernels.schedule import StepScalars


def test_the_structs_have_the_same_fields_in_both_languages():
    assert tuple(cpu.step_scalars_fields) == StepScalars._fields
    assert cpu.segment_fields == ["param", "exp_avg", "exp_avg_sq", "numel", "scalars"]
    assert cpu.low_memory_fields == [
        "remainder",
        "exp_avg_exponent",
        "exp_avg_sq_exponent",
        "first_index",
        "key",
    ]
    assert cpu.dtypes == [str(t).removeprefix("torch.") for t in DTYPES]


def cpp_scalars(group: dict, steps: Sequence[float]) -> np.ndarray:
    """Rows of a bucket whose parameters have counted one less each."""
    state = {}
    for t in steps:
        p, m, v = (torch.zeros(1) for _ in range(3))
        p.grad = torch.zeros(1)
        step = torch.tensor(t - 1.0, dtype=torch.float64)
        state[p] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
    plan = cpu.Plan()
    assert plan.refresh([{**group, "params": list(state)}], state, {}, UNSCALED) == []
    [bucket] = plan.buckets
    return np.frombuffer(bucket.scalar_rows).reshape(-1, len(StepScalars._fields))


def assert_same_scalars(group: dict, steps: Sequence[float]) -> None:
    for t, row in zip(steps, cpp_scalars(group, steps), strict=True):
        want = schedule.group_scalars(group, t)
        assert row.tobytes() == np.array(want).tobytes(), (t, group, row, want)


def group_of(**changes) -> dict:
    group = dict(
        lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled_weight_decay=False,
        maximize=False, rho_threshold=5.0, degenerated_to_sgd=True, rectification="first_order",
    )  # fmt: skip
    return {**group, **changes}


def test_options_that_a_group_lacks_have_the_same_defaults_in_both_languages():
    group = group_of()
    for name in ("rho_threshold", "degenerated_to_sgd", "rectification"):
        del group[name]
    assert_same_scalars(group, range(1, 9))


STEPS = (*range(1, 31), 1000, 10**6, 2**24, 10**9, 2**53)
BETAS = (0.0, 1e-300, 0.1, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.99999, 0.999999)


@pytest.mark.parametrize("rectification", schedule.FORMS)
@pytest.mark.parametrize("beta2", BETAS)
def test_scalars_are_the_same_in_both_languages(rectification, beta2):
    lower = (2.0, 3.0) if rectification == "exact" else ()
    for beta1, rho_threshold in product(BETAS, (*lower, 4.0, 4.5, 5.0, 6.0, float("inf"))):
        group = dict(rectification=rectification, rho_threshold=rho_threshold, lr=0.3)
        assert_same_scalars(group_of(**group, betas=(beta1, beta2)), STEPS)


number = st.floats(allow_nan=False, allow_infinity=False)
beta = st.floats(0, 1, exclude_max=True) | st.sampled_from(BETAS)


@settings(max_examples=400, deadline=None)
@given(
    group=st.fixed_dictionaries(
        dict(
            lr=number | number.map(lambda x: torch.tensor(x, dtype=torch.float64)),
            betas=st.tuples(beta, beta),
            eps=st.floats(min_value=0),
            weight_decay=number,
            decoupled_weight_decay=st.booleans(),
            maximize=st.booleans(),
            rho_threshold=st.floats(min_value=4) | st.just(4.0) | st.just(5.0),
            degenerated_to_sgd=st.booleans(),
            rectification=st.sampled_from(schedule.FORMS),
        ),
        optional=dict(
            grad_scale=number,
            seed=st.integers(0, 2**32 - 1),
            initial_lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        ),
    ),
    steps=st.lists(
        st.integers(1, 2**53) | st.integers(1, 100), min_size=1, max_size=5, unique=True
    ),
)
def test_scalars_are_the_same_for_any_hyperparameters(group, steps):
    if "initial_lr" in group and group["decoupled_weight_decay"]:
        group["decouple_lr"] = True
    assert_same_scalars(group, steps)


@pytest.mark.parametrize(
    ("changes", "step_count"),
    [
        ({}, 0),
        ({}, 1.5),
        ({}, float("nan")),
        (dict(betas=(1.0, 0.999)), 1),
        (dict(betas=(0.9, 1.0)), 1),
        (dict(betas=(-0.1, 0.999)), 1),
        (dict(betas=(0.9, float("nan"))), 1),
        (dict(betas=(0.9, 0.99, 0.999)), 1),
        (dict(eps=-1e-8), 1),
        (dict(eps=float("nan")), 1),
        (dict(rho_threshold=3.9), 1),
        (dict(rho_threshold=1.9, rectification="exact"), 1),
        (dict(rho_threshold=float("nan")), 1),
        (dict(rectification="none"), 1),
        (dict(seed=-1), 1),
        (dict(seed=2**32), 1),
        (dict(seed=0.5), 1),
        (dict(decouple_lr=True, initial_lr=0.1), 1),
        (dict(decouple_lr=True, decoupled_weight_decay=True), 1),
        (dict(decouple_lr=True, decoupled_weight_decay=True, initial_lr=0.0), 1),
        (dict(decouple_lr=True, decoupled_weight_decay=True, initial_lr=-0.1), 1),
        (dict(decouple_lr=True, decoupled_weight_decay=True, initial_lr=float("nan")), 1),
    ],
    ids=str,
)
def test_hyperparameters_out_of_range_are_refused_in_both_languages(changes, step_count):
    group = group_of(**changes)
    with pytest.raises(ValueError, match=r".+"):
        schedule.group_scalars(group, step_count)
    with pytest.raises(ValueError, match=r".+"):
        cpp_scalars(group, [step_count])
