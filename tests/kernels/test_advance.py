"""Step counts that torch's operations advance on their device, for Triton."""

from itertools import product

import pytest
import torch
from torch import Tensor

from radam_kernels import schedule
from radam_kernels.backends.advance import advance
from radam_kernels.hyperparameters import DEFAULTS
from radam_kernels.modules import cpu
from radam_kernels.scaling import UNSCALED, Scaling
from tests.helpers import every_device

COUNTS = [*range(9), 20, 1000, 10**5, 2**24]
ACTION = schedule.StepScalars._fields.index("action")
KEY = slice(schedule.StepScalars._fields.index("key_low"), None)
FORMS = [*(("first_order", x) for x in (4.0, 4.5, 5.0)), *(("exact", x) for x in (2, 3, 4, 5.0))]


def plan_of(groups: list[dict], steps: list[Tensor], scaling: Scaling):
    """A plan of a parameter for each group and step count, in one bucket."""
    state = {}
    for group, step in product(groups, steps):
        p, exp_avg, exp_avg_sq = (torch.zeros(1, device=step.device) for _ in range(3))
        p.grad = torch.zeros_like(p)
        state[p] = {"step": step.clone(), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        group.setdefault("params", []).append(p)
    plan = cpu.Plan()
    assert plan.refresh(groups, state, {}, scaling) == []
    assert len(plan.buckets) == 1
    return plan


def counts_of(bucket) -> list[float]:
    return [step.item() for step, _ in bucket.steps]


def capturable_group(device: str, **options) -> dict:
    """The options of a parameter group; tensors among them move to the device."""
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    return {**DEFAULTS, "capturable": True, **moved}


@every_device
@pytest.mark.parametrize(
    ("beta2", "scale"), [(0.0, None), (0.9, None), (0.999, None), (0.999, 1024.0), (0.999999, None)]
)
@pytest.mark.parametrize(("rectification", "rho_threshold"), FORMS)
def test_torchs_operations_make_the_scalars_of_the_schedule(
    device, rectification, rho_threshold, beta2, scale
):
    lrs = [0.3, torch.tensor(0.3), torch.tensor([0.3], dtype=torch.float64)]
    lrs += [torch.tensor(0.3, dtype=torch.bfloat16)]
    flags = ("maximize", "decoupled_weight_decay", "degenerated_to_sgd")
    groups = [
        capturable_group(
            device, lr=lr, betas=(beta1, beta2), weight_decay=0.1, rectification=rectification,
            rho_threshold=rho_threshold, **dict(zip(flags, values, strict=True)),
            decouple_lr=values[1], initial_lr=0.7,
        )
        for i, values in enumerate(product((False, True), repeat=3))
        for lr, beta1 in zip(lrs, (0.9, 0.0) * 2, strict=True)
    ]  # fmt: skip
    steps = [
        torch.tensor(n, dtype=dtype, device=device)
        for n, dtype in product(COUNTS, (torch.float32, torch.float64))
    ]
    found_inf = None if scale is None else torch.tensor(0.0, device=device)
    scaling = Scaling(None if scale is None else torch.tensor(scale, device=device), found_inf)
    plan = plan_of(groups, steps, scaling)
    [bucket] = plan.buckets
    wanted = [(step + 1).item() for _, step in product(groups, steps)]
    rows = advance(bucket)
    assert rows.dtype == torch.float64
    assert counts_of(bucket) == wanted
    truth = [
        schedule.group_scalars({**groups[group], "grad_scale": 1.0 / (scale or 1.0)}, t)
        for t, (_, group) in zip(wanted, bucket.steps, strict=True)
    ]
    truth = torch.tensor(truth, dtype=torch.float64)
    actions = rows[:, ACTION].cpu()
    assert torch.equal(actions, truth[:, ACTION]), "the threshold is crossed elsewhere"
    torch.testing.assert_close(rows.cpu(), truth, rtol=1e-10, atol=0)


@every_device
def test_torchs_operations_make_the_keys_of_random_bits(device):
    seeds = [0, 1, 12345, 2**31, 2**32 - 1]
    groups = [capturable_group(device, seed=seed) for seed in seeds]
    counts = [*COUNTS, 2**31, 2**32 - 2, 2**32, 2**40 + 7, 2**53 - 2, 2**53 - 1]
    steps = [torch.tensor(n, dtype=torch.float64, device=device) for n in counts]
    plan = plan_of(groups, steps, UNSCALED)
    [bucket] = plan.buckets
    keys = advance(bucket)[:, KEY].cpu()
    truth = [
        schedule.group_scalars(group, float(n + 1))[KEY] for group, n in product(groups, counts)
    ]
    assert torch.equal(keys, torch.tensor(truth, dtype=torch.float64))


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("found_inf", [1.0, 2.0, float("nan"), float("inf")])
def test_torchs_operations_skip_and_do_not_count_where_a_gradient_is_infinite(
    device, found_inf, dtype
):
    groups = [capturable_group(device), capturable_group(device, betas=(0.5, 0.9))]
    steps = [torch.tensor(n, dtype=dtype, device=device) for n in COUNTS]
    scale, verdict = torch.tensor(8.0, device=device), torch.tensor(found_inf, device=device)
    plan = plan_of(groups, steps, Scaling(scale, verdict))
    [bucket] = plan.buckets
    rows = advance(bucket)
    assert torch.equal(rows, torch.zeros_like(rows))
    assert counts_of(bucket) == 2 * [float(n) for n in COUNTS]


@every_device
def test_torchs_operations_skip_invalid_counts_and_no_other(device):
    none = [-5.0, -1.0, 0.5, float("inf"), float("nan")]
    steps = [torch.tensor(n, dtype=torch.float64, device=device) for n in (7.0, *none, 8.0)]
    plan = plan_of([capturable_group(device)], steps, UNSCALED)
    [bucket] = plan.buckets
    rows = advance(bucket)
    assert (rows[1:-1] == 0).all()
    assert (rows[[0, -1], ACTION] == schedule.Action.RECTIFIED).all()
    after = torch.tensor(counts_of(bucket), dtype=torch.float64)
    expected = torch.tensor([8.0, *none, 9.0], dtype=torch.float64)
    torch.testing.assert_close(after, expected, rtol=0, atol=0, equal_nan=True)
