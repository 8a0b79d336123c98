"""Hooks around steps, saves and loads run as they do with torch's class."""

import torch
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from radam_kernels import RAdam
from tests.helpers import params_of, take_steps, twin


def test_step_hooks_run_before_and_after():
    seen = []
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = RAdam([p], lr=0.5)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", p[0].item())))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", p[0].item())))
    optimizer.step()
    assert seen == [("pre", 1.0), ("post", 0.5)]


def test_global_step_hooks_run():
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append("pre")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("post")),
    ]
    try:
        take_steps(RAdam([Parameter(torch.ones(3))]))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["pre", "post"]


def test_a_step_hook_may_edit_the_gradient():
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = RAdam([p], lr=0.5)

    def negate(optimizer, args, kwargs):
        p.grad = -p.grad

    optimizer.register_step_pre_hook(negate)
    optimizer.step()
    assert (p == 1.5).all()


def test_state_dict_and_load_hooks_run():
    seen = []
    a = RAdam([Parameter(torch.ones(3))])
    take_steps(a)
    a.register_state_dict_pre_hook(lambda o: seen.append("save"))
    a.register_state_dict_post_hook(lambda o, d: {**d, "mine": 1})
    checkpoint = a.state_dict()
    assert checkpoint.pop("mine") == 1

    def rename(optimizer, state_dict):
        seen.append("load")
        state = {k: {**s, "exp_avg": 2 * s["exp_avg"]} for k, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    b = twin(a)
    b.register_load_state_dict_pre_hook(rename)
    b.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    for _ in range(2):
        b.load_state_dict(checkpoint)
    assert seen == ["save", "load", "loaded", "load", "loaded"]
    p, q = params_of(a)[0], params_of(b)[0]
    assert torch.equal(b.state[q]["exp_avg"], 2 * a.state[p]["exp_avg"])
