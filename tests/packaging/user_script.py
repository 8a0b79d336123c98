"""A user's script: the public API, which type checkers read and test_types.py runs."""

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from radam_kernels import RAdam, available_backends, flatten_, radam_, schedule


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().mean()
        loss.backward()
        return loss.item()

    closure()
    optimizer.step()
    return optimizer.step(closure)


def main() -> None:
    model = nn.Linear(4, 2)
    optimizer = RAdam(
        model.parameters(),
        lr=torch.tensor(1e-3),
        betas=(0.9, 0.99),
        weight_decay=0.01,
        decoupled_weight_decay=True,
        capturable=True,
        backend="cpu",
        flatten=True,
        rho_threshold=4.0,
        rectification="exact",
        state_dtype=torch.bfloat16,
    )
    assert_type(train(model, optimizer), float)
    assert_type(optimizer.step(lambda: 0.5), float)
    assert_type(optimizer.clip_grad_norm_(1.0), Tensor)
    assert_type(optimizer.step(), None)

    RAdam(model.named_parameters(), 1e-3)
    other = RAdam([{"params": model.parameters(), "lr": 1e-3}])
    other.load_state_dict(optimizer.state_dict())
    other.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
    options = RAdam.hyperparameters(other.param_groups[0])
    assert options["rectification"] == "exact"
    torch.optim.lr_scheduler.StepLR(other, 10)

    for name, reason in available_backends().items():
        assert_type(reason, str | None)
        if reason is None:
            RAdam([torch.zeros(2, requires_grad=True)], backend=name)
    for refused in (
        lambda: RAdam(model.parameters(), backend="gpu"),  # type: ignore[arg-type]  # refused
        lambda: RAdam(model.parameters(), rectification="second"),  # type: ignore[arg-type]  # too
    ):
        try:
            refused()
        except ValueError as error:
            print(error)
        else:
            raise AssertionError("accepted")

    param, grad, exp_avg, exp_avg_sq = (torch.ones(8) for _ in range(4))
    assert_type(flatten_([param]), list[Tensor])
    radam_(param, grad, exp_avg, exp_avg_sq, step=1, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8)
    radam_(
        [param],
        [grad],
        (exp_avg,),
        (exp_avg_sq,),
        step=2,
        lr=torch.tensor(0.1),
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        rectification="first_order",
        grad_scale=0.5,
        backend="auto",
    )

    assert_type(schedule.rho(10, 0.999), float)
    assert_type(schedule.rho_inf(0.999), float)
    assert_type(schedule.adaptive_variance(10.0), float)
    assert_type(schedule.adaptive_variance_first_order(10.0), float)
    for form in schedule.FORMS:
        assert_type(form, schedule.Form)
        schedule.check_rho_threshold(5.0, form)
        assert_type(schedule.rectification(10, 0.999, form=form), float | None)
    scalars = schedule.step_scalars(10, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8)
    assert_type(scalars, schedule.StepScalars)
    assert_type(scalars.step_size, float)
    assert schedule.Action(int(scalars.action)) is schedule.Action.RECTIFIED
    assert schedule.group_scalars({**optimizer.defaults, "lr": 0.1}, 10).eps == 1e-8


if __name__ == "__main__":
    main()
