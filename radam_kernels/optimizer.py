"""RAdam, a drop-in replacement for torch.optim.RAdam."""

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .backends import BackendChoice, check_name
from .clipping import Clipping
from .flat import flatten_, trained_params
from .hyperparameters import DEFAULTS, OPTIONAL, check, compact, complete, refuse_float16
from .layout import master_weight, portable
from .masters import export_masters, import_masters
from .modules import cpu
from .release import StepInBackward
from .schedule import Form
from .stages import listen
from .state import Loaded, prepare_load, remainder_of
from .step import take_step
from .watch import Watch

_SAVING = threading.RLock()  # torch iterates over the hooks that state_dict() changes


class RAdam(Optimizer):
    r"""Rectified Adam in one pass over memory; same arguments, state and results as torch's.

    Arguments of `torch.optim.RAdam` have the same meaning here.

    Args:
        params: parameters, named parameters or dicts that define groups. float32, float64,
            bfloat16, float16 and complex, of any shape and strides, in any mixture.
        lr: learning rate, a float or a tensor of one element (read at every step).
        betas: coefficients of the running averages of the gradient and of its square.
        eps: added to the square root of `exp_avg_sq`, before bias correction as in torch.
        weight_decay: L2 penalty, or decay of the parameter itself if `decoupled_weight_decay`.
        decoupled_weight_decay: multiply parameters by `1 - weight_decay * lr` instead of adding
            `weight_decay` times the parameter to the gradient.
        foreach: accepted, and without effect: all tensors of one device and dtype set are stepped
            in one launch anyway.
        maximize: maximize the objective instead.
        capturable: store and advance the step counts on the parameters' device, so that the host
            never synchronizes with the GPU: for CUDA graphs, and for `torch.amp.GradScaler`
            without its synchronization. A learning rate in a tensor on that device is read there,
            at every step or replay; other hyperparameters are part of the graph. Works on the CPU,
            too.
        differentiable: only False is supported.
        backend: "auto" (the fastest for each device), "cuda", "triton", "cpu" or "reference".
        flatten: keep parameters that need a gradient, and their moments, in flat buffers, one for
            each dtype and device; see `flatten_` for benefits and costs. Frozen parameters stay
            where they are; sharded ones are refused.
        amp_scaling: with `capturable`, take `grad_scale` and `found_inf` from GradScaler inside the
            step. False: GradScaler unscales before the step and waits for the GPU, as for
            torch.optim.RAdam; for Lightning's `gradient_clip_val`.
        rho_threshold: rectify if rho_t is above it. torch has 5.0, the paper's Algorithm 2 has 4.0.
        degenerated_to_sgd: below the threshold, step along the momentum (torch); False leaves the
            parameter unchanged (the authors' code).
        rectification: "first_order" (the r_t of the paper and of torch), or "exact", which uses the
            exact variance instead of its first-order approximation.
        state_dtype: dtype of the moments of parameters of up to 32 bits, or its name; None for
            float32; "block8" for 8-bit block floats, always rounded stochastically, in 2.02 bytes a
            parameter. 16-bit moments that are rounded to nearest, as torch's are, stall at
            beta2 = 0.999: give `stochastic_rounding`. float64 and complex parameters have no 8-bit
            moments, and the former no others than float64.
        decouple_lr: with `decoupled_weight_decay`, multiply parameters by
            `1 - weight_decay * lr / initial_lr`, so that `weight_decay` is the decay of a step
            whatever the learning rate (a usual value is 1e-5, where it was 1e-2 at lr=1e-3).
            `initial_lr` is the group's key of that name, which schedulers share: the lr at
            construction unless the group has one. OneCycleLR sets it to max_lr / div_factor.
        master_weights: 32 keeps, for each bfloat16 parameter, the int16 that completes it to a
            float32 weight (`param_remainder` in its state): with the same gradients, steps are
            those of float32 parameters bit for bit. 24 keeps an int8, rounded stochastically. No
            effect on other parameters, but float16 ones are refused. See `master_params` and
            `master_state_dict`.
        stochastic_rounding: round bfloat16 moments, and bfloat16 parameters without master weights,
            up or down at random, so that they are right on average and small updates are not lost.
            float16 is refused.
        seed: of the random bits, a whole number in `[0, 2**32)`. They are a hash of it and of the
            step, the parameter's place in `param_groups` and the element: the same on every
            backend, on all replicas, after a resume, and for parameters that are sharded by
            FSDP2, HSDP or Shard(0). With other shards (FSDP1, ZeRO, other placements) elements are
            counted in the shard. Where a float32 step count stops, at `2**24`, so do the bits.

    The state of a parameter is the same as in torch: `step` (in the default dtype; a float32 count
    stops at `2**24`, as in torch; on the CPU unless `capturable`), `exp_avg` and `exp_avg_sq`; and
    `param_remainder` with `master_weights`. "block8" adds `exp_avg_exponent` and
    `exp_avg_sq_exponent`, which `state_dict()` leaves out: it has the moments as bfloat16 tensors,
    without loss. Checkpoints can be exchanged with `torch.optim.RAdam`. Changes between steps
    (hyperparameters, state, gradients, `p.data`) take effect at the next step. As in torch, a
    loaded moment that fits is used without a copy: deepcopy a state dict to load it into two
    optimizers.

    Options that torch lacks are in `defaults`, in a group and in a checkpoint only if they differ
    from the defaults above, so that checkpoints have the keys of torch's. A group without one has
    that default, wherever it came from; `RAdam.hyperparameters(group)` returns all values.
    `state_dtype`, `master_weights` and `stochastic_rounding` of a checkpoint have no effect: an
    optimizer keeps its own and converts what it loads. `seed` is loaded, and is in every group that
    draws random bits.

    `backend`, `flatten` and `amp_scaling` belong to the optimizer and not to a group: they are not
    in `defaults`, which torch copies into every group and checkpoint. So
    `type(opt)(params, **opt.defaults)` makes an optimizer with backend="auto", flatten=False and
    amp_scaling=True.

    If all groups are `capturable`, `GradScaler.step` passes `grad_scale` and `found_inf` to the
    step, unless `amp_scaling` is False: the kernel unscales the gradients as it reads them and
    leaves them scaled in memory (torch's fused optimizers write them back unscaled), and a skipped
    step is not counted. FSDP1's `ShardedGradScaler` exchanges `found_inf` between ranks in
    `unscale_` only: call that first.

    Raises:
        ValueError: a hyperparameter out of range. At a step: tensors that can't be stepped or that
            share memory; nothing has been changed then.
        RuntimeError: a backend that does not work here. At a step: sparse gradients, or the capture
            of a CUDA graph without `capturable` or before a first step has made the state.
        NotImplementedError: differentiable=True.
    """

    _in_backward: StepInBackward | None = None  # while step_in_backward() is on

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
        backend: BackendChoice = "auto",
        flatten: bool = False,
        amp_scaling: bool = True,
        rho_threshold: float = DEFAULTS["rho_threshold"],
        degenerated_to_sgd: bool = DEFAULTS["degenerated_to_sgd"],
        rectification: Form = DEFAULTS["rectification"],
        state_dtype: torch.dtype | str | None = DEFAULTS["state_dtype"],
        decouple_lr: bool = DEFAULTS["decouple_lr"],
        master_weights: Literal[24, 32] | None = DEFAULTS["master_weights"],
        stochastic_rounding: bool = DEFAULTS["stochastic_rounding"],
        seed: int = DEFAULTS["seed"],
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
            "decouple_lr": decouple_lr,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        check(defaults)
        compact(defaults)
        check_name(backend)
        self._backend: BackendChoice = backend
        self._amp_scaling = amp_scaling
        self._flatten = False  # until all groups are added: they share one buffer
        self._watch = Watch([])
        super().__init__(params, defaults)
        if flatten:
            flatten_(trained_params(self.param_groups))
        self._flatten = flatten

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether the step unscales and skips by itself; GradScaler asks."""
        return self._amp_scaling and all(group["capturable"] for group in self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch does; with `flatten`, its parameters move into a buffer too."""
        if isinstance(param_group, dict):
            check({**DEFAULTS, **self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        compact(group, self.defaults)
        if group.get("decouple_lr"):
            group.setdefault("initial_lr", float(group["lr"]))
        try:
            for param in group["params"]:
                refuse_float16(param, group, self._name)
            if self._flatten:
                flatten_(trained_params([group]))
            if self._in_backward is not None:
                self._in_backward.add_groups(self, len(self.param_groups) - 1)
        except BaseException:
            self.param_groups.pop()
            raise
        if not self._watch.is_over():
            self._watch.sizes.append(len(self.param_groups[-1]["params"]))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one step; `closure` reevaluates the model and returns the loss."""
        if torch.compiler.is_compiling():
            # A traced step would count only once. A decorator would cost 20 us at every step.
            from .uncompiled import call

            return call(self._step, closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        loss = None
        in_backward = self._in_backward
        if closure is not None:
            if in_backward is not None:
                raise RuntimeError(
                    "step(closure) can't reevaluate the model while step_in_backward() is on: its "
                    "backward steps; call backward() and then step(), or remove() on the handle"
                )
            with torch.enable_grad():
                loss = closure()
        # Taken out, so that a step in another thread, or within this one, makes its own plan.
        plan = self.__dict__.pop("_plan", None) or cpu.Plan()
        stages = listen()
        try:
            if stages:
                stages.enter("plan")
            trained = in_backward is not None and in_backward.begin_step(self)
            groups = self.param_groups
            take_step(self, plan, groups, self.state, stages, watched=True, trained=trained)
            if in_backward is not None:
                in_backward.end_step(plan.owners)
        except BaseException:
            # GradScaler deletes these only after a step that succeeds, and would multiply its next
            # scale by the old one.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise
        finally:
            if plan.begun:
                self._drop_clipping()
            plan.release()
            self._plan = plan
            if stages:
                stages.enter(None)
        return loss

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Clips the norm of all gradients of this optimizer together, in the next step().

        As `torch.nn.utils.clip_grad_norm_`, but for the gradients in memory, which stay as they
        are: the next `step()` multiplies them by `min(1, max_norm / (norm + 1e-6))` as it reads
        them. The norm is computed in float64 on the CPU. Call it last before `step()`, after
        `GradScaler.unscale_`, on every rank if gradients are DTensors.

        That factor is used once. `step()`, `zero_grad()` and another call drop it, and so does a
        backward that makes new gradients after the old ones were set to None. A change in place is
        noticed if torch's version counters count it: those of `GradScaler.unscale_`, of collectives
        and of `grad.data` are not.

        Args:
            max_norm: the largest norm; inf only measures finite gradients.
            norm_type: the order of the norm, above 0: 2, 1 and inf are computed in one read of the
                gradients, others by torch operations.
            error_if_nonfinite: raise if the norm is inf or NaN, which synchronizes with a GPU.
                Otherwise gradients become 0 or NaN, as in torch.

        Returns:
            The norm before clipping: a tensor of shape () on the device of the first gradient;
            float64 if a gradient is float64, else float32. A plain tensor for DTensors, too.

        Raises:
            ValueError: max_norm or norm_type out of range, or a gradient that can't be stepped.
            RuntimeError: a norm that is not finite, with `error_if_nonfinite`; sparse gradients;
                parameters of FSDP1; `step_in_backward()` is on. At the step: gradients that were
                changed in place, or partly replaced, since.
        """
        if torch.compiler.is_compiling():
            from .uncompiled import call

            return call(self._clip, max_norm, norm_type, error_if_nonfinite)
        return self._clip(max_norm, norm_type, error_if_nonfinite)

    def _clip(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
        if self._in_backward is not None:
            raise RuntimeError(
                "clip_grad_norm_() has no gradients while step_in_backward() is on: each is freed "
                "before the next is known; call remove() on the handle to clip"
            )
        # Taken out, as the plan of a step is.
        clipping = self.__dict__.pop("_clipping", None) or Clipping()
        stages = listen()
        if stages:
            stages.enter("norm")
        try:
            return clipping.measure(
                self.param_groups,
                float(max_norm),
                float(norm_type),
                error_if_nonfinite,
                self._backend,
                self._name,
            )
        finally:
            self._clipping = clipping
            if stages:
                stages.enter(None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients, and forgets what `clip_grad_norm_` has found."""
        self._drop_clipping()
        super().zero_grad(set_to_none)

    def _drop_clipping(self) -> None:
        if clipping := self.__dict__.get("_clipping"):
            clipping.factor = None

    def step_in_backward(self) -> StepInBackward:
        """Steps each parameter in backward, as soon as its gradient is complete, and frees it.

        So not all gradients are in memory at once. Go on calling `step()` after each backward, and
        `zero_grad()` if you like: `step()` steps parameters that still have a gradient (unfrozen
        since, or without their hook), and ends the step. State, checkpoints and results are those
        of ordinary steps. A copied or unpickled optimizer goes on with its own parameters.

        Each backward steps with what it has, so there is no gradient accumulation, no closure and
        no clipping or unscaling of all gradients: `max_grad_norm` of a Trainer, a GradScaler and
        torch's `clip_grad_norm_` find none, which can't be seen beforehand. Hooks of
        `register_step_pre_hook`, and those registered on a parameter later, see none either. A
        shallow copy (copy.copy) is refused. With FSDP2 memory is freed for one FSDP group at
        a time, and gradients may accumulate under `set_requires_gradient_sync(False)`. Compiled
        autograd can't trace these steps.

        If backward fails midway, some parameters have been stepped. To go on, call `zero_grad()`
        and `step()`, which ends that step; another backward first raises.

        Returns:
            A handle, whose `remove()` ends it: gradients are kept for `step()` again.

        Raises:
            RuntimeError: it is on already, or for another optimizer of the same parameters;
                parameters of DistributedDataParallel or FSDP1. In backward: create_graph=True, or
                a second gradient since the last `step()`. In `step()`: a closure, `grad_scale` or
                `found_inf`, or a parameter that was stepped and has a gradient again. In
                `clip_grad_norm_()`: always.
            ValueError: parameters share memory. In backward: whatever a step raises.
        """
        handle = StepInBackward(self)
        self._drop_clipping()
        return handle

    def _name(self, owner: Tensor) -> str:
        """The name of a parameter in error messages."""
        for index, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if param is owner:
                    name = f"param {i} of group {index}"
                    names = group.get("param_names") or ()
                    return f'{name} ("{names[i]}")' if i < len(names) else name
        return "a parameter"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of torch.optim.RAdam, bit for bit.

        torch's `load_state_dict` casts moments to the dtype of their parameter; this one keeps them
        in `state_dtype`. Formats (`state_dtype`, `master_weights`, `stochastic_rounding`) are the
        optimizer's, not the checkpoint's. A moment that fits is used without a copy, as in torch;
        one that belongs in "block8" is encoded by the next step.

        Raises:
            ValueError: groups, shapes or values that do not match. Nothing is changed.
        """

        def prepare(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            return prepare_load(self, state_dict, self._flatten)

        had = [{*group} for group in self.param_groups]
        # The last hook, so that it sees what the others return.
        hook = self.register_load_state_dict_pre_hook(prepare)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        self._warn_of_options_that_ranks_may_lack(had)

    def _warn_of_options_that_ranks_may_lack(self, had: list[set[str]]) -> None:
        """torch's broadcast_from_rank0 gives other ranks only the keys that they have."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        loaded = {
            name: group[name]
            for group, before in zip(self.param_groups, had, strict=True)
            for name in OPTIONAL
            if name in group and name not in before
        }
        if loaded and torch.distributed.get_world_size() > 1:
            warnings.warn(
                f"radam_kernels.RAdam: {loaded} came from the checkpoint. Construct the optimizer "
                "with it on every rank: where torch.distributed.checkpoint loads with "
                "broadcast_from_rank0, the other ranks do not get it and train differently",
                stacklevel=3,
            )

    @staticmethod
    def hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
        """All hyperparameters of one of `param_groups`, those that are absent there included.

        Those that torch.optim.RAdam lacks are in a group only if they differ from their default.
        """
        options = {key: value for key, value in group.items() if key in DEFAULTS}
        compact(options)
        return complete(options)

    def state_dict(self) -> dict[str, Any]:
        """The state as torch.optim.RAdam saves it, with the options that differ from its.

        Moments of "block8" are copies in bfloat16. To load in place
        (`torch.distributed.checkpoint.load`), pass the result on to `load_state_dict`, as
        `set_optimizer_state_dict` does: they are not the optimizer's memory.
        """
        for group in self.param_groups:  # edited since
            compact(group, self.defaults)

        def prepare(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            states = {key: portable(state) for key, state in state_dict["state"].items()}
            return {**state_dict, "state": states}

        with _SAVING:
            # The first hook, so that the others see what is saved.
            hook = self.register_state_dict_post_hook(prepare, prepend=True)
            try:
                return super().state_dict()
            finally:
                hook.remove()

    def master_params(self) -> Iterator[Tensor]:
        """A copy of each parameter in float32 (float64 and complex ones in their dtype), in order.

        With `master_weights` that is the weight which is trained, of which the bfloat16 parameter
        shows the upper half. DTensors for DTensors.
        """
        for g, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                name = f"param {i} of group {g}"
                remainder = remainder_of(self.state.get(param), param, name)
                yield master_weight(param, remainder)

    def master_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """The model's state dict with its parameters in float32, as `master_params` gives them.

        Args:
            model: has parameters of this optimizer. Others stay as they are.

        Raises:
            ValueError: a model without a parameter of this optimizer.
        """
        return export_masters(self, model)

    def load_master_state_dict(
        self, model: torch.nn.Module, state_dict: dict[str, Any], strict: bool = True
    ) -> None:
        """Loads a float32 state dict into the model, and with `master_weights` what a bfloat16
        lacks into `param_remainder`.

        Args:
            model: has parameters of this optimizer. Others are loaded as they are.
            strict: as for `torch.nn.Module.load_state_dict`.

        Raises:
            ValueError: a tensor of another shape than its parameter, or a model without a parameter
                of this optimizer. Nothing is changed.
            RuntimeError: missing or unexpected keys, as `torch.nn.Module.load_state_dict`.
        """
        import_masters(self, model, state_dict, strict)

    def __repr__(self) -> str:
        groups = super().__repr__().removesuffix(")")
        return (
            f"{groups}backend: {self._backend}\nflatten: {self._flatten}\n"
            f"amp_scaling: {self._amp_scaling}\n)"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_backend": self._backend,
            "_flatten": self._flatten,
            "_amp_scaling": self._amp_scaling,
            "_steps_in_backward": self._in_backward is not None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled, copied or loaded optimizer without copying its tensors."""
        super().__setstate__(state)
        steps_in_backward = self.__dict__.pop("_steps_in_backward", False)
        self.__dict__.setdefault("_backend", "auto")
        self.__dict__.setdefault("_flatten", False)
        self.__dict__.setdefault("_amp_scaling", True)
        self.__dict__.setdefault("_watch", Watch(self.param_groups))
        for own in self.state.values():
            for key, value in own.items() if isinstance(own, dict) else ():
                if isinstance(value, Loaded):
                    own[key] = value.value
        compact(self.defaults)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key not in OPTIONAL:
                    group.setdefault(key, value)
            compact(group, self.defaults)
            if group["differentiable"]:
                warnings.warn(
                    "radam_kernels.RAdam goes on with differentiable=False; the loaded state was "
                    "made with it True",
                    stacklevel=3,
                )
                group["differentiable"] = False
        if steps_in_backward:
            self.step_in_backward()
