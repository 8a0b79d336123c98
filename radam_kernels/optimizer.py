"""RAdam as a drop-in for torch.optim.RAdam: hyperparameters, state, and the call of the kernels."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .backends import check_name
from .flat import flatten_
from .hyperparameters import DEFAULTS, check
from .launch import explain, launch
from .modules import cpu
from .repair import Repairs, repair
from .scaling import UNSCALED, Scaling
from .stages import listen
from .state import MOMENTS, Loaded, fits, is_new, moment_dtype, new_moments, prepare_load


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
        flatten: keep parameters that need a gradient, and their moments, in one flat buffer each
            for a dtype and device; `flatten_` says what that is good for, and what it costs.
            Frozen parameters stay where they are; sharded ones are refused.
        rho_threshold: rectify where rho_t is above it. 5.0 is torch's, 4.0 the paper's Algorithm 2.
        degenerated_to_sgd: below the threshold, step along the momentum (torch); False leaves the
            parameter as it is (the authors' code).
        rectification: "first_order" (the paper's r_t, torch's), or "exact", with the variance
            itself instead of its first-order approximation.
        state_dtype: dtype of the moments of parameters of up to 32 bits; None for float32.
            `torch.bfloat16` with bfloat16 parameters gives torch's memory and torch's trouble: at
            beta2 = 0.999 a 16-bit second moment stalls. float64 parameters keep float64 moments.

    The state of a parameter is torch's: `step` (of the default dtype: a float32 stops counting at
    2**24, as torch's does; on the CPU unless `capturable`), `exp_avg` and `exp_avg_sq`. Checkpoints
    go to and from `torch.optim.RAdam`. Whatever is edited between steps (hyperparameters, state,
    gradients, `p.data`) is picked up. As in torch, a loaded moment that fits is used without a
    copy: deepcopy a state dict to load it into two optimizers.

    `backend` and `flatten` belong to the optimizer and not to a group: they are not in `defaults`,
    which torch copies into every group and checkpoint. So `type(opt)(params, **opt.defaults)` makes
    an optimizer with backend="auto" and flatten=False.

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
        lr: float | Tensor = DEFAULTS["lr"],
        betas: tuple[float, float] = DEFAULTS["betas"],
        eps: float = DEFAULTS["eps"],
        weight_decay: float = DEFAULTS["weight_decay"],
        decoupled_weight_decay: bool = DEFAULTS["decoupled_weight_decay"],
        *,
        foreach: bool | None = DEFAULTS["foreach"],
        maximize: bool = DEFAULTS["maximize"],
        capturable: bool = DEFAULTS["capturable"],
        differentiable: bool = DEFAULTS["differentiable"],
        backend: str = "auto",
        flatten: bool = False,
        rho_threshold: float = DEFAULTS["rho_threshold"],
        degenerated_to_sgd: bool = DEFAULTS["degenerated_to_sgd"],
        rectification: str = DEFAULTS["rectification"],
        state_dtype: torch.dtype | None = DEFAULTS["state_dtype"],
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
        check(defaults)
        check_name(backend)
        self._backend = backend
        self._flatten = False  # not while the groups come in: all of them share one buffer
        super().__init__(params, defaults)
        if flatten:
            flatten_(_trained(self.param_groups))
        self._flatten = flatten

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves unscaling and the decision to skip to the step."""
        return all(group["capturable"] for group in self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch does; with `flatten`, its parameters move into a buffer too."""
        if isinstance(param_group, dict):
            check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if self._flatten:
            try:
                flatten_(_trained(self.param_groups[-1:]))
            except BaseException:
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
        repairs = Repairs()
        # Taken out, so that a step in another thread, or within this one, has a plan of its own.
        plan = self.__dict__.pop("_plan", None) or cpu.Plan()
        stages = listen()
        try:
            if stages:
                stages.enter("plan")
            if self._refresh(plan, repairs):
                launch(plan, self._backend, repairs.write_backs, stages)
        except BaseException:
            # Once memory has been written, the state that goes with it stays.
            if not plan.begun:
                repairs.undo(self.state)
            # GradScaler deletes these after a step, and would multiply its next scale by the old.
            for name in Scaling._fields:
                self.__dict__.pop(name, None)
            raise
        finally:
            plan.release()
            self._plan = plan
            if stages:
                stages.enter(None)
        return loss

    def _refresh(self, plan, repairs: Repairs) -> bool:
        """Plans the step; False where the tensors are fake, and the step is done."""
        groups, state, scaling = self.param_groups, self.state, self._scaling()
        if torch._C._len_torch_dispatch_stack():
            from . import fake

            if fake.is_active():
                fake.step(groups, state)
                return False
        try:
            # Once, or twice where something is repaired; more often only if somebody else edits
            # the state of other parameters meanwhile.
            while pending := plan.refresh(groups, state, repairs.replacements, scaling):
                from . import fake

                if fake.any_fake([owner for _, owner, _, _ in pending]):
                    fake.step(groups, state)
                    return False
                for _, owner, _, reason in pending:
                    if id(owner) in repairs.replacements:
                        raise ValueError(f"{self._name(owner)}: {reason}")
                repair(repairs, pending, plan, state, self._name, self._moments)
        except (cpu.Refusal, cpu.InvalidGroup) as error:
            raise explain(error, plan, self._name) from None
        return True

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

    def _moments(self, fresh: list[tuple[Tensor, torch.dtype]]) -> list[dict[str, Tensor]]:
        """New moments, zero, for each (parameter, dtype)."""
        if not self._flatten:
            return new_moments([owner for owner, _ in fresh], [dtype for _, dtype in fresh])
        # One buffer for all that train, those too that have no gradient yet.
        reserved = self.__dict__.setdefault("_reserved", {})

        def is_reserved(owner: Tensor, dtype: torch.dtype) -> bool:
            return owner in reserved and all(
                fits(reserved[owner][k], owner, dtype) for k in MOMENTS
            )

        if not all(is_reserved(owner, dtype) for owner, dtype in fresh):
            wanted = {
                owner: moment_dtype(owner, group["state_dtype"])
                for group in self.param_groups
                for owner in _trained([group])
                if is_new(self.state.get(owner))
            } | dict(fresh)
            made = new_moments(list(wanted), list(wanted.values()), flatten=True)
            reserved.clear()
            reserved.update(zip(wanted, made, strict=True))
        return [reserved.pop(owner) for owner, _ in fresh]

    def _name(self, owner: Tensor) -> str:
        """What errors call a parameter."""
        for index, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if param is owner:
                    name = f"param {i} of group {index}"
                    names = group.get("param_names") or ()
                    return f'{name} ("{names[i]}")' if i < len(names) else name
        return "a parameter"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class or of torch's, bit for bit.

        torch's own loading casts moments to the dtype of their parameter; this one keeps them, in
        `state_dtype`. A moment that fits is used without a copy, as in torch.

        Raises:
            ValueError: groups, shapes or values that do not match. Nothing is changed.
        """

        def prepare(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            return prepare_load(self, state_dict, self._flatten)

        # Last among the hooks, so that it sees what the others made of the state.
        hook = self.register_load_state_dict_pre_hook(prepare)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __repr__(self) -> str:
        groups = super().__repr__().removesuffix(")")
        return f"{groups}backend: {self._backend}\nflatten: {self._flatten}\n)"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_backend": self._backend, "_flatten": self._flatten}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of unpickling, copying and loading; tensors stay the tensors that they are."""
        super().__setstate__(state)
        self.__dict__.setdefault("_backend", "auto")
        self.__dict__.setdefault("_flatten", False)
        for own in self.state.values():
            for key, value in own.items() if isinstance(own, dict) else ():
                if isinstance(value, Loaded):
                    own[key] = value.value
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


def _trained(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [param for group in groups for param in group["params"] if param.requires_grad]
