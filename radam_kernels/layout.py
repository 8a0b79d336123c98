"""The tensors of a parameter's state in each format: which there are, new ones, and conversions."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from . import formats
from .flat import is_dense, zeros_like
from .modules import FORMAT_NAMES, cpu
from .sharding import is_sharded, local, same_placement, wrap_local

MOMENTS = ("exp_avg", "exp_avg_sq")
REMAINDER = "param_remainder"
EXPONENTS = {key: f"{key}_exponent" for key in MOMENTS}
EXTRAS = (REMAINDER, *EXPONENTS.values())  # what torch.optim.RAdam lacks

COMPLEX = {
    torch.float16: torch.complex32,
    torch.float32: torch.complex64,
    torch.float64: torch.complex128,
}
REAL = {c: r for r, c in COMPLEX.items()}

_CHUNK = 1 << 16  # elements that are encoded at a time, a multiple of a block: fit into caches
_BLOCK8 = torch.uint8


class Layout(NamedTuple):
    """The dtypes of the tensors that a parameter's state has."""

    moments: torch.dtype  # uint8 for the codes of block8
    remainder: torch.dtype | None  # int8 or int16, below a bfloat16 weight

    @property
    def block8(self) -> bool:
        return self.moments == _BLOCK8


def formats_of(param: Tensor, group: dict[str, Any]) -> tuple[int, int]:
    """The codes of a parameter's format and of its moments' under the options of its group."""
    return cpu.formats_of(
        cpu.dtype_code(REAL.get(param.dtype, param.dtype)),
        param.is_complex(),
        cpu.format_code(group.get("state_dtype")),
        int(group.get("master_weights") or 0),
        bool(group.get("stochastic_rounding")),
    )


def layout_of(param: Tensor, group: dict[str, Any]) -> Layout:
    """The layout of a parameter's state under the options of its group."""
    weight, moments = (FORMAT_NAMES[code] for code in formats_of(param, group))
    remainder = {"master24": torch.int8, "master32": torch.int16}.get(weight)
    if moments == "block8":
        return Layout(_BLOCK8, remainder)
    dtype = torch.bfloat16 if moments == "bfloat16_stochastic" else getattr(torch, moments)
    return Layout(COMPLEX[dtype] if param.is_complex() else dtype, remainder)


def template(param: Tensor) -> Tensor:
    """A tensor with the layout that is stepped: a local parameter's, or that of a contiguous copy
    if it is not dense."""
    return param if is_dense(param) else torch.empty(param.shape, device="meta")


def laid_out_like(tensor: Tensor, param: Tensor) -> bool:
    """Whether a tensor of the parameter's shape has its strides, and is no lazily negated or
    conjugated view."""
    strides = zip(param.shape, param.stride(), tensor.stride(), strict=True)
    same = all(n == 1 or a == b for n, a, b in strides)
    return same and is_dense(tensor) and not tensor.is_conj() and not tensor.is_neg()


def fits(state: dict[str, Any], owner: Tensor, layout: Layout) -> bool:
    """Whether a kernel can step with these tensors without a copy."""
    wanted: dict[str, torch.dtype] = dict.fromkeys(MOMENTS, layout.moments)
    if layout.remainder is not None:
        wanted[REMAINDER] = layout.remainder
    return all(_fits(state.get(key), owner, dtype) for key, dtype in wanted.items()) and (
        not layout.block8 or all(is_block8(state, key) for key in MOMENTS)
    )


def _fits(tensor: Any, owner: Tensor, dtype: torch.dtype) -> bool:
    if not isinstance(tensor, Tensor) or not same_placement(tensor, owner):
        return False
    tensor, param = local(tensor), local(owner)
    return (
        tensor.dtype == dtype
        and tensor.device == param.device
        and tensor.shape == param.shape
        and laid_out_like(tensor, template(param))
    )


def is_block8(state: dict[str, Any], key: str) -> bool:
    """Whether a moment in a state is block8: codes, and exponents that fit them."""
    codes, exponents = state.get(key), state.get(EXPONENTS[key])
    if not (isinstance(codes, Tensor) and isinstance(exponents, Tensor)):
        return False
    codes = local(codes)
    return (
        codes.dtype == exponents.dtype == _BLOCK8
        and codes.device == exponents.device
        and exponents.shape == (formats.blocks(codes.numel()),)
        and exponents.is_contiguous()
        and is_dense(codes)
    )


def is_remainder(value: Any) -> TypeGuard[Tensor]:
    """Whether it is a remainder, of either width, or one of int16 in a state dict, as int32."""
    return isinstance(value, Tensor) and value.dtype in (*formats.REMAINDERS.values(), torch.int32)


def collective(remainder: Tensor) -> Tensor:
    """A remainder in a dtype that collectives can send: neither gloo nor NCCL knows int16."""
    if is_sharded(remainder) and remainder.dtype == torch.int16:
        return wrap_local(local(remainder).to(torch.int32), remainder)
    return remainder


def new_tensors(
    params: Sequence[Tensor], layouts: Sequence[Layout], *, flatten: bool = False
) -> list[dict[str, Tensor]]:
    """New tensors of zeros for each parameter's state, but for its step.

    Args:
        params: the parameters as the user has them (DTensors, for example).
        flatten: allocate one buffer for each key, dtype and device, and return views into these.
    """
    made: list[dict[str, Tensor]] = [{} for _ in params]

    def add(
        key: str, members: list[int], templates: list[Tensor], dtypes: list[torch.dtype]
    ) -> None:
        devices = [local(params[i]).device for i in members]
        if flatten:
            tensors = zeros_like(templates, dtypes, devices)
        else:
            kinds = zip(templates, dtypes, devices, strict=True)
            tensors = [torch.zeros_like(t, dtype=d, device=device) for t, d, device in kinds]
        for i, tensor in zip(members, tensors, strict=True):
            whole = key in EXPONENTS.values()
            made[i][key] = tensor if whole else wrap_local(tensor, params[i])

    templates = [template(local(p)) for p in params]
    everyone = list(range(len(params)))
    for key in MOMENTS:
        add(key, everyone, templates, [layout.moments for layout in layouts])
    with_remainder = [i for i in everyone if layouts[i].remainder is not None]
    add(
        REMAINDER,
        with_remainder,
        [templates[i] for i in with_remainder],
        [dtype for layout in layouts if (dtype := layout.remainder) is not None],
    )
    blocked = [i for i in everyone if layouts[i].block8]
    rows = [torch.empty(formats.blocks(templates[i].numel()), device="meta") for i in blocked]
    for moment, key in EXPONENTS.items():
        add(key, blocked, rows, [_BLOCK8] * len(blocked))
        for i in blocked:
            made[i][key].fill_(formats.LEAST_EXPONENT[moment])
    return made


@torch.no_grad()
def fill(new: dict[str, Tensor], old: dict[str, Tensor]) -> None:
    """Copies the values of a state into new tensors, in their formats.

    Args:
        old: moments and remainder of any format, placed as the parameter is; those that are
            missing are zeros.
    """
    for key in MOMENTS:
        if key not in old:
            continue
        values, target = local(decoded(old, key)), local(new[key])
        if new[key].dtype == _BLOCK8:
            _encode_(target, new[EXPONENTS[key]], values, key)
        else:
            target.copy_(values)
    if REMAINDER in new and REMAINDER in old:
        target = local(new[REMAINDER])
        target.copy_(formats.convert_remainder(local(old[REMAINDER]), target.dtype))


def _encode_(codes: Tensor, exponents: Tensor, values: Tensor, key: str) -> None:
    """Rounds to nearest: once does no harm. Values that were block8 come back as they were."""
    if not laid_out_like(values, codes):
        values = torch.empty_like(codes, dtype=values.dtype).copy_(values)
    words = torch.full((), formats.NEAREST_WORD, device=codes.device)
    flat, source = formats.in_memory_order(codes), formats.in_memory_order(values)
    for at in range(0, len(flat), _CHUNK):
        some = source[at : at + _CHUNK].float()
        block = at // formats.BLOCK
        formats.encode_moment_(
            flat[at : at + _CHUNK],
            exponents[block : block + formats.blocks(len(some))],
            some,
            key,
            "block8",
            words,
        )


@torch.no_grad()
def decoded(state: dict[str, Any], key: str) -> Tensor:
    """A moment of a state as a tensor of floats: bfloat16, which is exact, if it is block8."""
    moment = state[key]
    if not is_block8(state, key):
        return moment
    codes, exponents = local(moment), state[EXPONENTS[key]]
    values = torch.empty_like(codes, dtype=torch.bfloat16)
    flat, target = formats.in_memory_order(codes), formats.in_memory_order(values)
    for at in range(0, len(flat), _CHUNK):
        some = flat[at : at + _CHUNK]
        block = at // formats.BLOCK
        rows = exponents[block : block + formats.blocks(len(some))]
        target[at : at + _CHUNK] = formats.decode_block8(some, rows, key)
    return wrap_local(values, moment)


def portable(state: Any) -> Any:
    """A parameter's state as checkpoints have it: a new dict, whose moments are floats.

    Any version of this class, torch.optim.RAdam and torch.distributed.checkpoint can load it, and
    reshard it at any boundary. Values are the same: those of block8 are bfloat16.
    """
    if not isinstance(state, dict):
        return state
    plain = {key: value for key, value in state.items() if key not in EXPONENTS.values()}
    plain |= {key: decoded(state, key) for key in MOMENTS if key in state}
    if is_remainder(state.get(REMAINDER)):
        plain[REMAINDER] = collective(state[REMAINDER])
    return plain


@torch.no_grad()
def master_weight(param: Tensor, remainder: Tensor | None) -> Tensor:
    """A copy of a weight, in float32 at least, with its remainder, on any device.

    A weight that has become float32 has the remainder that the next step adds.
    """
    weight = local(param.detach())
    if remainder is not None and weight.dtype in (torch.bfloat16, torch.float32):
        join = folded if weight.dtype == torch.float32 else formats.join_weight
        value = join(weight, local(remainder).to(weight.device))
    else:
        value = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    return wrap_local(value, param.detach())


@torch.no_grad()
def folded(param: Tensor, remainder: Tensor) -> Tensor:
    """A copy of a weight that was bfloat16 and is float32 now, with its remainder added.

    An element that has more bits than a bfloat16 has been changed since, and keeps its value.
    """
    narrow = (formats.bits_of(param) & 0xFFFF) == 0
    joined = formats.join_weight(param.bfloat16(), remainder)
    return torch.empty_like(param).copy_(torch.where(narrow, joined, param))
