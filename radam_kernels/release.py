"""Gradient release: each parameter is stepped during backward, and its gradient is freed."""

import gc
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .hyperparameters import draws
from .modules import cpu
from .repair import refuse_sharing
from .scaling import UNSCALED
from .sharding import belongs_to_fsdp1
from .step import take_step

if TYPE_CHECKING:
    from .optimizer import RAdam


class _Member:
    """A parameter that is stepped in backward."""

    __slots__ = ("group", "hook", "index", "param", "plan", "stepped")

    def __init__(self, param: Tensor, group: int, index: int) -> None:
        self.param = param
        self.group, self.index = group, index  # where it was last found in param_groups
        self.hook: RemovableHandle | None = None
        # For what step_parameter() of a plan can't do: it caches tables on a device.
        self.plan: cpu.Plan | None = None
        self.stepped = False  # since the last step()


class StepInBackward:
    """Steps each parameter of an optimizer as soon as its gradient is complete, until `remove()`.

    `RAdam.step_in_backward` makes it. The hooks of the parameters refer to the optimizer weakly.
    They are removed when it goes, so that gradients are then kept as usual.
    """

    def __init__(self, optimizer: "RAdam") -> None:
        if optimizer._in_backward is not None:
            raise RuntimeError(
                "step_in_backward() is on already; call remove() on the handle that it returned"
            )
        self._optimizer = weakref.ref(optimizer, lambda _: self._remove_hooks())
        self._members: dict[int, _Member] = {}  # by id of the parameter
        self._plans: list[cpu.Plan] = []  # that no thread uses
        self._ordinals: dict[int, int] | None = None  # by id of the parameter, for one step
        self.add_groups(optimizer)
        optimizer._in_backward = self

    def __reduce__(self) -> tuple[Callable[..., object], tuple["RAdam | None"]]:
        """A copy is the handle of a copy of the optimizer."""
        return _handle_of, (self._optimizer(),)

    def remove(self) -> None:
        """Ends it: gradients are kept for `step()` again. Calling it twice has no effect."""
        self._remove_hooks()
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._in_backward is self:
            optimizer._in_backward = None

    def _remove_hooks(self) -> None:
        for member in self._members.values():
            if member.hook is not None:
                member.hook.remove()
        self._members.clear()

    def add_groups(self, optimizer: "RAdam", first: int = 0) -> None:
        """Registers the hooks of the groups from `first`; frozen parameters can't have one."""
        added = [
            _Member(param, g, i)
            for g, group in enumerate(optimizer.param_groups[first:], first)
            for i, param in enumerate(group["params"])
            if _takes_hooks(param)
        ]
        current = {id(param) for group in optimizer.param_groups for param in group["params"]}
        for key in self._members.keys() - current:  # taken out of the optimizer
            if (hook := self._members.pop(key).hook) is not None:
                hook.remove()
        self._ordinals = None
        others = [member.param for member in self._members.values()]
        _check([member.param for member in added], others, optimizer._name)
        for member in added:
            self._register(member)

    def _register(self, member: _Member) -> None:
        """Registers the hook of a parameter, if it is not there already."""
        param = member.param
        if (hooks := param._post_accumulate_grad_hooks) is not None:
            # After swap_tensors() autograd sees neither these nor later ones. Setting the attribute
            # tells it.
            param._post_accumulate_grad_hooks = hooks
        if member.hook is None or member.hook.id not in (hooks or ()):
            member.hook = param.register_post_accumulate_grad_hook(partial(self._step, member))
        self._members[id(param)] = member

    def _step(self, member: _Member, param: Tensor) -> None:
        """The hook: steps one parameter, and frees its gradient.

        If it raises before memory is written, parameter, state and gradient are as before.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            return
        group = self._find_group(member, optimizer.param_groups)
        if group is None:  # it was taken out of the optimizer
            return
        if torch.is_grad_enabled():
            raise RuntimeError(
                "step_in_backward() frees each gradient, so it can't be differentiated: don't call "
                "backward(create_graph=True), or call remove() on the handle before"
            )
        if member.stepped:
            raise self._second_gradient(optimizer, param)
        member.stepped = True
        try:  # taken out, because autograd has a thread for each device
            plan = self._plans.pop()
        except IndexError:
            plan = cpu.Plan()
        try:
            done = (
                optimizer._backend in ("auto", "cpu")
                and not torch._C._len_torch_dispatch_stack()  # of FakeTensorMode, for example
                and "grad_scale" not in optimizer.__dict__
                and "found_inf" not in optimizer.__dict__
                and plan.step_parameter(
                    group,
                    param,
                    optimizer.state.get(param),
                    UNSCALED,
                    torch.get_num_threads(),
                    self._ordinal(optimizer, member, group),
                )
            )
        except BaseException:
            member.stepped = plan.begun
            raise
        finally:
            self._plans.append(plan)
        if not done:
            self._step_anywhere(optimizer, member, group)
        param.grad = None

    def _step_anywhere(self, optimizer: "RAdam", member: _Member, group: dict[str, Any]) -> None:
        """Steps as an ordinary step does.

        The plan is of this parameter alone: a walk over all groups and the whole state for each
        parameter would be quadratic.
        """
        if member.param.grad is None:  # another hook has taken it
            member.stepped = False
            return
        if member.plan is None:
            member.plan = cpu.Plan()
        plan, param = member.plan, member.param
        groups = [{**group, "params": (param,)}]
        state = {param: optimizer.state.get(param)}
        try:
            ordinal = self._ordinal(optimizer, member, group)
            take_step(optimizer, plan, groups, state, first_ordinal=ordinal)
        except BaseException:
            member.stepped = plan.begun
            raise
        finally:
            plan.release()

    def _ordinal(self, optimizer: "RAdam", member: _Member, group: dict[str, Any]) -> int:
        """The parameter's place among all, for its random bits; 0 if its group draws none."""
        if not draws(group):
            return 0
        if self._ordinals is None:
            params = (p for group in optimizer.param_groups for p in group["params"])
            self._ordinals = {id(param): i for i, param in enumerate(params)}
        return self._ordinals[id(member.param)]

    @staticmethod
    def _find_group(member: _Member, groups: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The group that the parameter is in now; load_state_dict() and users replace groups."""
        if member.group < len(groups):
            params = groups[member.group]["params"]
            if member.index < len(params) and params[member.index] is member.param:
                return groups[member.group]
        for g, group in enumerate(groups):
            for i, param in enumerate(group["params"]):
                if param is member.param:
                    member.group, member.index = g, i
                    return group
        return None

    def _second_gradient(self, optimizer: "RAdam", param: Tensor) -> RuntimeError:
        return RuntimeError(
            f"{optimizer._name(param)}: it was stepped in backward since the last step(), and has "
            "a gradient again. Either step() was not called after each backward, as for gradient "
            "accumulation, which needs gradients that are kept: call remove() on the handle of "
            "step_in_backward(). Or the parameter is used in several checkpointed parts: use "
            "checkpoint(..., use_reentrant=False). Or DistributedDataParallel or another hook "
            "gave it a gradient. zero_grad() and then step() end the step that backward began"
        )

    def begin_step(self, optimizer: "RAdam") -> bool:
        """Whether parameters were stepped in backward; raises if one has a gradient again."""
        stepped = [member.param for member in self._members.values() if member.stepped]
        for param in stepped:
            if param.grad is not None:
                raise self._second_gradient(optimizer, param)
        return bool(stepped)

    def end_step(self, stepped: Iterable[Tensor]) -> None:
        """Begins the next step; `stepped` are those that step() had to step.

        Their gradients are freed, too. They are hooked again: they lost their hook, or were frozen
        when it was to be registered.
        """
        self._ordinals = None
        for member in self._members.values():
            member.stepped = False
        for param in stepped:
            param.grad = None
            if _takes_hooks(param):
                self._register(self._members.get(id(param)) or _Member(param, 0, 0))


def _takes_hooks(param: Tensor) -> bool:
    return param.requires_grad and param.is_leaf


def _handle_of(optimizer: "RAdam | None") -> "StepInBackward | None":
    return None if optimizer is None else optimizer._in_backward


def _check(params: list[Tensor], others: list[Tensor], name_of: Callable[[Tensor], str]) -> None:
    """Raises for parameters that can't be stepped in backward, on their own or beside `others`."""
    for param in params:
        if belongs_to_fsdp1(param):
            raise RuntimeError(
                f"step_in_backward(): {name_of(param)} belongs to "
                "FullyShardedDataParallel (FSDP1), which reduces gradients after the hooks of "
                "parameters; use fully_shard (FSDP2)"
            )
        for hook in (param._post_accumulate_grad_hooks or {}).values():
            if isinstance(getattr(hook, "func", None), MethodType) and isinstance(
                hook.func.__self__, StepInBackward
            ):
                raise RuntimeError(
                    f"step_in_backward(): {name_of(param)} is stepped in backward by "
                    "another optimizer; leave it out of one"
                )
    from .fake import any_fake

    # An ordinary step compares all parameters. A step of a single one can't.
    if not any_fake([*others, *params]):
        refuse_sharing([*others, *params], name_of)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _refuse_ddp({id(param) for param in params}, name_of)


def _refuse_ddp(trained: set[int], name_of: Callable[[Tensor], str]) -> None:
    """DistributedDataParallel does not mark its parameters, so look for live modules."""
    ddp = torch.nn.parallel.DistributedDataParallel
    for module in gc.get_objects():
        if not issubclass(type(module), ddp):
            continue
        for param in module.parameters():
            if id(param) in trained:
                raise RuntimeError(
                    f"step_in_backward(): {name_of(param)} belongs to "
                    "DistributedDataParallel, which averages gradients after the hooks of "
                    "parameters; use fully_shard (FSDP2), or step without step_in_backward()"
                )
