"""RAdam as a drop-in for torch.optim.RAdam: hyperparameters, state, and the call of the kernels."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .backends import check_name
from .capture import is_capturing
from .flat import flatten_
from .launch import launch
from .modules import cpu
from .options import check_options
from .scaling import UNSCALED, Scaling
from .shield import shield_state, unshield
from .stages import listen
from .staging import (
    MOMENTS,
    Staged,
    as_step,
    check_state,
    find_sharing,
    fits,
    flat_moments,
    is_step,
    local,
    moment_dtype,
    real,
    stage,
    step_device,
)


class RAdam(Optimizer):
    r"""Rectified Adam in one pass over memory; same arguments, state and results as torch's.

    Arguments that `torch.optim.RAdam` has mean what they mean there. `foreach` is accepted and has
    no effect: all tensors of one device and dtype set are stepped in one launch anyway.

    Args:
        params: parameters, named parameters or dicts that define groups. float32, float64,
            bfloat16, float16 and complex, of any shape and strides, mixed at will.
        lr: learning rate, a float or a tensor of one element (read at every step).
        betas: coefficients of the running averages of the gradient and of its square.
        eps: added to the square root of `exp_avg_sq`, before bias correction as in torch.
        weight_decay: L2 penalty, or decay of the parameter itself if `decoupled_weight_decay`.
        maximize: maximize the objective instead.
        capturable: keep the step counts beside the parameters and advance them there, so that
            nothing waits for the GPU: for CUDA graphs, and for `torch.amp.GradScaler` without its
            synchronisation. A learning rate in a tensor on that device is read there, at every
            step or replay; other hyperparameters are part of the graph. Works on the CPU, too.
        differentiable: only False is supported.
        backend: "auto" (the fastest for each device), "cuda", "triton", "cpu" or "reference".
        flatten: move the parameters into one flat buffer for each dtype and device (`flatten_`).
        rho_threshold: rectify where rho_t is above it. 5.0 is torch's, 4.0 the paper's Algorithm 2.
        degenerated_to_sgd: below the threshold, step along the momentum (torch); False leaves the
            parameter as it is (the authors' code).
        rectification: "first_order" (the paper's r_t, torch's), or "exact", with the variance
            itself instead of its first-order approximation.
        state_dtype: dtype of the moments of parameters of up to 32 bits; None for float32.
            `torch.bfloat16` with bfloat16 parameters gives torch's memory and torch's trouble: at
            beta2 = 0.999 a 16-bit second moment stalls. float64 parameters keep float64 moments.

    The state of a parameter is torch's: `step` (float32, so it stops counting at 2**24 as torch's
    does; on the CPU unless `capturable`), `exp_avg` and `exp_avg_sq`. Checkpoints go to and from
    `torch.optim.RAdam`. Whatever is edited between steps (hyperparameters, state, gradients,
    `p.data`) is picked up.

    Where all groups are `capturable`, `GradScaler.step` hands over its scale and verdict: the
    gradients are unscaled on the way through the kernel and stay scaled in memory (torch's fused
    optimizers write them back unscaled), and a step that is skipped is not counted. FSDP1's
    `ShardedGradScaler` tells its ranks of each other's verdict in `unscale_` only: call that first.

    Raises:
        ValueError: a hyperparameter out of range. At a step: tensors that can't be stepped or that
            share memory; nothing has been changed then.
        RuntimeError: a backend that does not work here; at a step: sparse gradients, or the capture
            of a CUDA graph without `capturable` or before a first step has made the state.
        NotImplementedError: differentiable.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        backend: str = "auto",
        flatten: bool = False,
        rho_threshold: float = 5.0,
        degenerated_to_sgd: bool = True,
        rectification: str = "first_order",
        state_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "differentiable": differentiable,
            "rho_threshold": rho_threshold,
            "degenerated_to_sgd": degenerated_to_sgd,
            "rectification": rectification,
            "state_dtype": state_dtype,
        }
        check_options(defaults)
        check_name(backend)
        self._backend = backend
        self._flatten = False  # not while the groups come in: all of them share one buffer
        super().__init__(params, defaults)
        if flatten:
            flatten_(p for group in self.param_groups for p in group["params"])
        self._flatten = flatten

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves unscaling and the decision to skip to the step."""
        return all(group["capturable"] for group in self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch does; with `flatten`, its parameters move into a buffer too."""
        if isinstance(param_group, dict):
            check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if self._flatten:
            try:
                flatten_(self.param_groups[-1]["params"])
            except ValueError:
                self.param_groups.pop()
                raise

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one step; `closure` reevaluates the model and returns the loss."""
        if torch.compiler.is_compiling():
            # A traced step would count just once. As a decorator this costs 20 us at every step.
            return torch.compiler.disable(self._step)(closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        made: list[Tensor] = []
        staged: list[Staged] = []
        groups = self.param_groups
        # Taken out, so that a step in another thread, or within this one, has a table of its own.
        table = self.__dict__.pop("_table", None) or cpu.Table()
        stages = listen()
        try:
            if stages:
                stages.enter("collect")
            if pending := table.collect(groups, self.state):
                staged = self._attend(table, pending, made)
            launch(
                table,
                groups,
                self._backend,
                lambda i: str(_Name(table.owners[i], groups)),
                self._scaling(),
                stages,
            )
        except BaseException:
            for owner in made:
                del self.state[owner]
            table.release()
            # GradScaler deletes these after a step, and would multiply its next scale by the old.
            for name in Scaling._fields:
                self.__dict__.pop(name, None)
            raise
        finally:
            self._table = table
            if stages:
                stages.enter(None)
        for item in staged:
            if item.copied:
                with torch.no_grad():
                    local(item.owner).copy_(item.param)
        return loss

    def _scaling(self) -> Scaling:
        """What GradScaler has left here for this step."""
        found = self.__dict__
        if "found_inf" not in found and "grad_scale" not in found:
            return UNSCALED
        if not self._step_supports_amp_scaling:
            raise RuntimeError(
                "grad_scale and found_inf are set on the optimizer, and only capturable=True "
                "heeds them; construct RAdam with it, or delete them and call GradScaler.unscale_"
            )
        return Scaling(found.get("grad_scale"), found.get("found_inf"))

    @torch.no_grad()
    def _attend(self, table, pending: list[tuple], made: list[Tensor]) -> list[Staged]:
        """Puts into the table what collect() left aside. Checks all of it before it changes any.

        `made` receives the parameters whose state is made here.
        """
        staged = []
        for _, owner, grad in pending:
            name = _Name(owner, self.param_groups)
            staged.append(stage(owner, grad, name))
            if self.state.get(owner):
                check_state(self.state[owner], owner, name)
        if any(item.copied for item in staged):
            owners = [*table.owners, *(item.owner for item in staged)]
            if pair := find_sharing(owners):
                name, other = (str(_Name(owners[i], self.param_groups)) for i in pair)
                raise ValueError(
                    f"{name} shares memory with {'itself' if name == other else other}, and a step "
                    "writes to it: clone one of them, make it contiguous, or leave one out"
                )
        self._make_moments(pending, staged, made)
        for (index, owner, _), item in zip(pending, staged, strict=True):
            state = self.state[owner]
            try:
                table.add(
                    real(item.param),
                    real(item.grad),
                    *(real(local(state[key])) for key in MOMENTS),
                    state["step"],
                    index,
                    owner,
                    self.param_groups[index]["capturable"],
                )
            except ValueError as error:
                raise ValueError(f"{_Name(owner, self.param_groups)}: {error}") from None
        return staged

    def _make_moments(self, pending: list[tuple], staged: list[Staged], made: list[Tensor]) -> None:
        """New moments for parameters without state, and for state that its parameter outgrew."""
        owners, dtypes = [], []
        for (index, owner, _), item in zip(pending, staged, strict=True):
            group, state = self.param_groups[index], self.state.get(owner)
            dtype = moment_dtype(owner, group["state_dtype"])
            fitting = state and all(fits(local(state[k]), item.param, dtype) for k in MOMENTS)
            if not fitting:
                owners.append(owner)
                dtypes.append(dtype)
            counted = fitting and is_step(state["step"], step_device(owner, group))
            if not counted and is_capturing(item.param.device):
                raise RuntimeError(
                    f"{_Name(owner, self.param_groups)} has no state that fits it, and what is "
                    "made while a CUDA graph is captured is made anew at each replay: step once "
                    "before the capture"
                )
        for index, owner, _ in pending:
            state = self.state[owner]
            if not state:
                made.append(owner)
            # First, as in torch's state; the walk over the state counts on this order.
            device = step_device(owner, self.param_groups[index])
            state["step"] = as_step(state.get("step", 0), device)
        for owner, moments in zip(owners, flat_moments(owners, dtypes), strict=True):
            state = self.state[owner]
            for key, moment in moments.items():
                if key in state:
                    local(moment).copy_(local(state[key]))
            state.update(moments)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class or of torch's, bit for bit, into flat buffers.

        torch's own loading casts moments to the dtype of their parameter; this one keeps them.

        Raises:
            ValueError: groups or shapes that do not match. Nothing is changed.
        """
        # Last among the hooks, so that it sees what the others made of the state.
        hook = self.register_load_state_dict_pre_hook(shield_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_backend": self._backend, "_flatten": self._flatten}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_backend", "auto")
        self.__dict__.setdefault("_flatten", False)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            if group["differentiable"]:
                warnings.warn(
                    "radam_kernels.RAdam goes on with differentiable=False; the loaded state was "
                    "made with it True",
                    stacklevel=3,
                )
                group["differentiable"] = False
        self._gather()

    @torch.no_grad()
    def _gather(self) -> None:
        """Moves all moments, as loaded or unpickled, into flat buffers; copies the step counts."""
        owners, dtypes = [], []
        for group in self.param_groups:
            for owner in group["params"]:
                if state := self.state.get(owner):
                    owners.append(owner)
                    dtypes.append(moment_dtype(owner, group["state_dtype"]))
                    step = unshield(state["step"])
                    state["step"] = as_step(step, step_device(owner, group)).clone()
        for owner, moments in zip(owners, flat_moments(owners, dtypes), strict=True):
            state = self.state[owner]
            for key, moment in moments.items():
                local(moment).copy_(local(unshield(state[key])))
            state.update(moments)


class _Name:
    """What errors call a parameter; looked up only when one is raised."""

    def __init__(self, owner: Tensor, groups: list[dict[str, Any]]) -> None:
        self.owner = owner
        self.groups = groups

    def __str__(self) -> str:
        for index, group in enumerate(self.groups):
            for i, param in enumerate(group["params"]):
                if param is self.owner:
                    name = f"param {i} of group {index}"
                    names = group.get("param_names", ())
                    return f'{name} ("{names[i]}")' if i < len(names) else name
        return "a parameter"
