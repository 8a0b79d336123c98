"""step_in_backward() with sharded parameters; DDP and FSDP1 are refused."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from radam_kernels import RAdam
from radam_kernels.sharding import local
from tests.distributed.test_fsdp2 import BF16, FSDP2, HSDP
from tests.distributed.training import (
    Net,
    Training,
    Wrapper,
    assert_follows_torch,
    assert_same_locally,
    train,
)
from tests.helpers import params_of


class InBackward(Wrapper):
    """Mixed into a wrapper: our optimizers step in backward."""

    def optimizer(self, cls: type[Optimizer], model: nn.Module, how: Training) -> Optimizer:
        optimizer = super().optimizer(cls, model, how)
        if cls is RAdam:
            handle = optimizer.step_in_backward()
            optimizer.register_step_pre_hook(lambda *_: self.check(optimizer, handle))
        return optimizer

    def check(self, optimizer: Optimizer, handle: object) -> None:
        assert all(p.grad is None for p in params_of(optimizer)), "a gradient was kept"


class FSDP2InBackward(InBackward, FSDP2):
    pass


class HSDPInBackward(InBackward, HSDP):
    pass


TRAININGS = {
    "nested": ({}, Training()),
    "not nested, tied": ({"nested": False}, Training(tied=True)),
    "accumulation without sync": ({"reshard_after_forward": False}, Training(parts=2)),
    "frozen": ({}, Training(frozen=True)),
    "CPU offload": ({"offload_policy": CPUOffloadPolicy(pin_memory=False)}, Training()),
    "two groups, schedule": ({}, Training(two_groups=True, schedule=True)),
    "unused parameters": ({}, Training(unused=True)),
    "capturable": ({}, Training(ours={"capturable": True})),
}


@pytest.mark.distributed(2)
@pytest.mark.parametrize(("arguments", "how"), TRAININGS.values(), ids=TRAININGS)
def test_fsdp2_trains_as_torch_does(arguments, how):
    assert_follows_torch(FSDP2InBackward(**arguments), how)


@pytest.mark.distributed(4)
def test_hsdp_trains_as_torch_does():
    assert_follows_torch(HSDPInBackward(), Training(parts=2))


@pytest.mark.distributed(2)
@pytest.mark.parametrize("arguments", [{}, {"mp_policy": BF16}], ids=["float64", "bfloat16"])
def test_fsdp2_trains_as_ordinary_steps_do(arguments):
    _, ours = train(FSDP2(**arguments), RAdam, Training())
    _, stepped = train(FSDP2InBackward(**arguments), RAdam, Training())
    assert_same_locally(stepped, ours, rtol=0, atol=0)


@pytest.mark.distributed(2)
def test_fsdp2_resumes_from_a_distributed_checkpoint():
    wrapper, how = FSDP2InBackward(), Training()
    model, optimizer = train(wrapper, RAdam, how)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    again = wrapper.wrap(how.net())
    resumed = wrapper.optimizer(RAdam, again, how)
    again.load_state_dict(model.state_dict())
    resumed._optimizer_step_pre_hooks.clear()  # DCP makes the state by a step with zeros
    dcp.set_optimizer_state_dict(again, resumed, saved)
    for step in (9, 10):
        for net, each in ((model, optimizer), (again, resumed)):
            how.loss(net(how.batch(step))).backward()
            assert all(p.grad is None for p in params_of(each))
            each.step()
    assert_same_locally(resumed, optimizer, rtol=0, atol=0)


@pytest.mark.distributed(2)
def test_parameters_of_ddp_are_refused():
    net = Net()
    optimizer = RAdam([nn.Parameter(torch.ones(1)), *net.parameters()])
    model = DistributedDataParallel(net)
    with pytest.raises(RuntimeError, match=r"param 1 of group 0 belongs to Distri"):
        optimizer.step_in_backward()
    del model


@pytest.mark.distributed(2)
def test_step_refuses_what_a_later_ddp_hands_out():
    net = Net()
    optimizer = RAdam(net.parameters())
    optimizer.step_in_backward()
    model = DistributedDataParallel(net)
    model(Training(dtype=torch.float32).batch(0)).sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=r"param \d of group 0: .*DistributedDataParallel"):
        optimizer.step()
    assert all(map(torch.equal, before, net.parameters()))


@pytest.mark.distributed(2)
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_parameters_of_fsdp1_are_refused(use_orig_params):
    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(Net(), device_id=cpu, use_orig_params=use_orig_params)
    optimizer = RAdam(model.parameters())
    with pytest.raises(RuntimeError, match=r"param 0 of group 0 belongs to .*FSDP1"):
        optimizer.step_in_backward()


def test_dtensors_without_a_wrapper(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    made = []
    for _ in range(2):
        param = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        made.append((param, RAdam([param], lr=0.1)))
    (p, ours), (q, stepped) = made
    stepped.step_in_backward()
    for _ in range(7):
        for param, optimizer in made:
            param.square().sum().backward()
            assert (param.grad is None) == (param is q)
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(local(p), local(q))
    assert_same_locally(stepped, ours, rtol=0, atol=0)
