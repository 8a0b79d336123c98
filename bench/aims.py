"""What the GPU kernels are meant to reach, and whether results say that they do."""

from collections.abc import Callable, Iterable
from typing import Any

from .cases import model_case, size_case
from .contenders import ADAM, CUDA
from .models import MODELS

LARGE = [size_case(power, "float32") for power in (26, 28, 30)]  # 64M and more
LISTS = [model_case(model, "float32") for model in MODELS]
Values = dict[str, float | None]  # of each case


def report(results: dict[str, Any]) -> list[str]:
    """A line for each aim: met, missed or not measured, for the handwritten kernel."""
    lines = [f"aims for {CUDA}" + (" (a dry run: these say nothing)" * results["dry_run"])]
    for title, aim, names, value in AIMS:
        values: Values = {name: value(results, name) for name in names}
        lines.append(f"  {title} {aim:.2f}: {verdict(values, aim)}")
    return lines


def verdict(values: Values, aim: float) -> str:
    """Whether the worst of the measured cases reaches the aim, and which were not measured."""
    measured = {name: value for name, value in values.items() if value is not None}
    if not measured:
        return "not measured"
    worst = min(measured, key=measured.__getitem__)
    word = "missed" if measured[worst] < aim else "met" if len(measured) == len(values) else "open"
    left = [name for name in values if name not in measured]
    return f"{word}, {measured[worst]:.3f} at {worst}" + (
        f"; not measured: {', '.join(left)}" if left else ""
    )


def ratio(key: str) -> Callable[[dict[str, Any], str], float | None]:
    """Reads a ratio from the row of our kernel."""
    return lambda results, name: _row(results, name, CUDA).get(key)


def host_ratio(key: str) -> Callable[[dict[str, Any], str], float | None]:
    """How many times our host time goes into that of torch's Adam(fused)."""

    def value(results: dict[str, Any], name: str) -> float | None:
        ours, theirs = (_row(results, name, peer).get(key) for peer in (CUDA, ADAM))
        return theirs["median"] / ours["median"] if ours and theirs else None

    return value


def _row(results: dict[str, Any], case: str, name: str) -> dict[str, Any]:
    return results["cases"].get(case, {}).get("rows", {}).get(name, {})


AIMS: Iterable[tuple[str, float, list[str], Callable[[dict[str, Any], str], float | None]]] = (
    ("64M and more, share of a copy of 28 bytes, at least", 0.95, LARGE, ratio("copy_share")),
    ("64M and more, times torch RAdam(foreach), at least", 2.8, LARGE, ratio("vs_radam_foreach")),
    ("64M and more, times torch Adam(fused), at least", 1.0, LARGE, ratio("vs_adam_fused")),
    ("models, times torch Adam(fused), at least", 1.1, LISTS, ratio("vs_adam_fused")),
    ("models, host, times torch Adam(fused), at least", 5.0, LISTS, host_ratio("host_us")),
    ("models, host, gradients new, at least", 5.0, LISTS, host_ratio("host_new_us")),
)
