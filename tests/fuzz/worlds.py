"""What the machine compares: all that an optimizer has, one with each backend, and torch's step."""

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from radam_kernels import RAdam
from radam_kernels.layout import portable
from tests.fuzz import edits
from tests.helpers import MOMENTS, TorchRAdam, params_of


def pickled_copy(optimizer: RAdam) -> RAdam:
    file = io.BytesIO()
    torch.save(optimizer, file)  # because pickle alone can't load tensors of complex32
    file.seek(0)
    return torch.load(file, weights_only=False)


def image(value: Any) -> Any:
    """What a value is, to the bit, in a form that can be compared; all NaNs are one."""
    if isinstance(value, Tensor):
        return type(value), value.dtype, tuple(value.shape), _bits(value.detach())
    if isinstance(value, dict):
        return {key: image(item) for key, item in value.items()}
    return value if isinstance(value, str | None) else repr(value)


def _bits(t: Tensor) -> bytes | None:
    if t.is_meta or t.layout != torch.strided:
        return None
    if t.numel() and not t._is_zerotensor():
        last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        if t.untyped_storage().nbytes() < (t.storage_offset() + last + 1) * t.element_size():
            return None
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    t = t.clone(memory_format=torch.contiguous_format).view(-1)
    if t.is_floating_point():
        t.masked_fill_(t.isnan(), math.nan)
    return t.view(torch.uint8).numpy().tobytes()


def image_of(optimizer: RAdam, of_state: Callable[[Any], Any] = image) -> dict[str, Any]:
    """All that a step may change, with the options of groups."""
    found: dict[str, Any] = {}
    for g, group in enumerate(optimizer.param_groups):
        found[f"group {g}"] = {k: image(value) for k, value in group.items() if k != "params"}
        for i, p in enumerate(group["params"]):
            name = f"of param {i} of group {g}"
            found |= {f"value {name}": image(p), f"gradient {name}": image(p.grad)}
            found |= {f"state {name}": of_state(optimizer.state.get(p))}
    return found


@contextmanager
def errors_change_nothing(optimizer: RAdam) -> Iterator[None]:
    before = image_of(optimizer)
    try:
        yield
    except Exception:
        assert image_of(optimizer) == before, "a call that raised has changed something"
        raise


class World:
    """An optimizer with one backend, and what was saved of it."""

    def __init__(self, backend: str, groups: list[dict], options: dict) -> None:
        self.backend = backend
        try:
            self.optimizer = RAdam(groups, **options, backend=backend)
        except ValueError:  # flatten refuses some parameters
            self.optimizer = RAdam(groups, **{**options, "flatten": False}, backend=backend)
        self.saved: list[dict] = []

    @property
    def params(self) -> list[Tensor]:
        return params_of(self.optimizer)

    def image(self) -> dict[str, Any]:
        return image_of(self.optimizer, lambda state: image(portable(state)))

    def step(self, closure: Callable | None = None) -> object:
        if self.backend == "reference":
            vars(self.optimizer).pop("_plan", None)
        rng = torch.get_rng_state()
        versions = [(p, p._version) for p in self.params if p.grad is not None]
        with errors_change_nothing(self.optimizer):
            result = self.optimizer.step(closure)
        assert torch.equal(rng, torch.get_rng_state()), "the step drew from torch's generator"
        assert all(p._version > version for p, version in versions), "a version was not bumped"
        return result


class TorchStep:
    """A step of torch.optim.RAdam from a copy of what an optimizer has, where both can do it."""

    def __init__(self, optimizer: RAdam) -> None:
        self.ours = optimizer
        self.steps: list[tuple[Tensor, Tensor, TorchRAdam]] = []
        for group in optimizer.param_groups:
            if any(group.get(name, usual) != usual for name, usual in edits.OURS.items()):
                continue
            options = {name: group[name] for name in edits.THEIRS} | {"lr": float(group["lr"])}
            for p in group["params"]:
                if self.can(p, state := optimizer.state.get(p)):
                    theirs = TorchRAdam([q := Parameter(p.detach().clone())], **options)
                    q.grad = p.grad.detach().clone()
                    if state:
                        moments = {key: state[key].detach().clone() for key in MOMENTS}
                        step = torch.tensor(float(state["step"]))
                        theirs.state[q] = {"step": step, **moments}
                    self.steps.append((p, q, theirs))

    @staticmethod
    def can(p: Tensor, state: Any) -> bool:
        if p.grad is None or p.dtype not in (torch.float32, torch.float64):
            return False
        tensors = [p, p.grad]
        if state:
            tensors += [state.get(key) for key in MOMENTS]
            if not 0 <= float(state.get("step", -1)) < 2**23:
                return False
        if not all(isinstance(t, Tensor) and t.dtype == p.dtype for t in tensors):
            return False
        sizes = [t.detach().abs() for t in tensors]
        return all(((t == 0) | ((t > 1e-12) & (t < 1e12))).all() for t in sizes)

    def compare(self) -> int:
        """Compares ours, which have been stepped; returns how many."""
        for p, q, theirs in self.steps:
            before = q.detach().clone()
            theirs.step()
            ours, expected = self.ours.state[p], theirs.state[q]
            assert float(ours["step"]) == float(expected["step"])
            moved = q.detach() - before
            for mine, right, scale in [
                (p.detach(), q.detach(), moved),
                *((ours[key], expected[key], expected[key]) for key in MOMENTS),
            ]:
                most = float(scale.abs().nan_to_num(0.0, 0.0).amax()) if scale.numel() else 0.0
                torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-4 * most, equal_nan=True)
        return len(self.steps)
