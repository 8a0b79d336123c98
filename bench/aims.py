"""What the kernels are meant to reach, and whether results say that they do."""

from collections.abc import Callable, Iterator
from typing import Any

from .cases import COLD, NEW, POWERS, list_case, model_case, size_case
from .contenders import ADAM, CPU, CPU16, CUDA, copy_name, on
from .models import MODELS

LARGE = [size_case(power, "float32") for power in (26, 28, 30)]  # 64M and more
SIZES = [size_case(power, "float32") for power in POWERS]
HALF = [size_case(26, "bfloat16")]
RESNET = [model_case("ResNet-50", "float32")]
SMALL = list_case(1000, "float32")
LISTS = [model_case(model, "float32") for model in MODELS]
Values = dict[str, float | None]  # of each case
Value = Callable[[dict[str, Any], str], float | None]


def report(results: dict[str, Any], whose: str) -> list[str]:
    """A line for each aim of our kernel of that name: met, missed or not measured."""
    dry = results.get("dry_run", False)
    lines = [f"aims for {whose}" + " (a dry run: these say nothing)" * dry]
    return [*lines, *(f"  {title}: {said}" for title, said in verdicts(results, whose))]


def verdicts(results: dict[str, Any], whose: str) -> Iterator[tuple[str, str]]:
    """Each aim, and what came of it."""
    for title, aim, names, value in AIMS[whose]:
        values: Values = {name: value(results, name) for name in names}
        limits: Values = {name: LIMITS[value](results, name) for name in names if value in LIMITS}
        yield f"{title} {aim:.2f}", verdict(values, aim, limits)


def verdict(values: Values, aim: float, limits: Values | None = None) -> str:
    """Whether the worst of the measured cases reaches the aim, and which were not measured.

    Args:
        limits: what memory alone allows, in those cases where that is known.
    """
    measured = {name: value for name, value in values.items() if value is not None}
    if not measured:
        return "not measured"
    worst = min(measured, key=measured.__getitem__)
    word = "missed" if measured[worst] < aim else "met" if len(measured) == len(values) else "open"
    left = [name for name in values if name not in measured]
    limit = (limits or {}).get(worst)
    return (
        f"{word}, {measured[worst]:.3f} at {worst}"
        + (f"; memory allows {limit:.3f}" if limit and limit < aim else "")
        + (f"; not measured: {', '.join(left)}" if left else "")
    )


def ratio(key: str, name: str = CUDA) -> Value:
    """Reads a ratio from the row of our kernel."""
    return lambda results, case: _row(results, case, name).get(key)


def host_ratio(key: str) -> Value:
    """How many times our host time goes into that of torch's Adam(fused)."""

    def value(results: dict[str, Any], name: str) -> float | None:
        ours, theirs = (_row(results, name, peer).get(key) for peer in (CUDA, ADAM))
        return theirs["median"] / ours["median"] if ours and theirs else None

    return value


def _row(results: dict[str, Any], case: str, name: str) -> dict[str, Any]:
    return results["cases"].get(case, {}).get("rows", {}).get(name, {})


GPU_OF_ADAM, GPU_OF_RADAM = ratio("vs_adam_fused"), ratio("vs_radam_foreach")
OF_STREAM, OF_STREAM16 = ratio("share_of_limit", CPU), ratio("share_of_limit", CPU16)
OF_ADAM, OF_RADAM = ratio("vs_adam_fused", CPU), ratio("vs_radam_foreach", CPU)
_STREAMED = on(copy_name(28), "cpu")
# What a loop that does nothing but stream the same bytes reaches.
LIMITS: dict[Value, Value] = {
    OF_ADAM: ratio("vs_adam_fused", _STREAMED),
    OF_RADAM: ratio("vs_radam_foreach", _STREAMED),
}
AIMS: dict[str, list[tuple[str, float, list[str], Value]]] = {
    CUDA: [
        ("64M and more, share of a copy of 28 bytes, at least", 0.95, LARGE, ratio("copy_share")),
        ("64M and more, times torch RAdam(foreach), at least", 2.8, LARGE, GPU_OF_RADAM),
        ("64M and more, times torch Adam(fused), at least", 1.0, LARGE, GPU_OF_ADAM),
        ("models, times torch Adam(fused), at least", 1.1, LISTS, GPU_OF_ADAM),
        ("models, host, times torch Adam(fused), at least", 5.0, LISTS, host_ratio("host_us")),
        ("models, host, gradients new, at least", 5.0, LISTS, host_ratio("host_new_us")),
    ],
    CPU: [
        ("float32 from 2^26, share of the streaming limit, at least", 0.95, SIZES[8:], OF_STREAM),
        ("float32, any size, times torch Adam(fused), at least", 0.97, SIZES, OF_ADAM),
        ("float32 to 2^12, times torch Adam(fused), at least", 2.5, SIZES[:2], OF_ADAM),
        ("float32, 2^14 and 2^16, times torch Adam(fused), at least", 2.0, SIZES[2:4], OF_ADAM),
        ("bfloat16, share of the limit for 22 bytes, at least", 0.93, HALF, OF_STREAM),
        ("bfloat16 moments too, share of their limit, at least", 0.90, HALF, OF_STREAM16),
        ("ResNet-50, times torch Adam(fused), at least", 1.1, RESNET, OF_ADAM),
        ("ResNet-50, times torch RAdam(foreach), at least", 5.0, RESNET, OF_RADAM),
        ("1,000 tensors of 64, gradients new, at least", 4.8, [SMALL + NEW], OF_ADAM),
        ("1,000 tensors of 64, caches cold, at least", 3.3, [SMALL + NEW + COLD], OF_ADAM),
    ],
}
