"""The relative error of the first-order variance, and of r_t computed from it."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from radam_kernels.schedule import adaptive_variance as exact
from radam_kernels.schedule import adaptive_variance_first_order as first_order
from radam_kernels.schedule import rectification, rho

from ..harness import plots
from ..harness.experiment import Row, Run, Verdict
from .simulation import log_spaced_steps

TITLE = "The first-order variance"
CLAIM = (
    "The first-order form of Var[psi] is close to the exact one, and the closer the larger rho "
    "(section 4.2 and Fig. 8)."
)
RHOS = (5.0, 10.0, 100.0, 1999.0)  # in the verdict; 1999 is rho_inf of beta2 = 0.999
STEPS = (5, 6, 10, 20, 50, 100, 1000)
BETA2S = (0.9, 0.99, 0.999, 0.9999)
FORMS = ("exact", "first_order")
SMALL = 0.05  # a relative error that we call small


def variances(points: int) -> list[Row]:
    """Both forms of Var[psi] for tau = 1, over rho."""
    rhos = np.union1d(np.geomspace(4.1, 2e4, points), RHOS)
    return [
        {"of": "variance", "x": x, "exact": exact(x), "first_order": first_order(x)}
        for x in map(float, rhos)
    ]


def rectifications(beta2: float, points: int) -> list[Row]:
    """Both forms of r_t over the steps that the paper rectifies, those with rho_t > 4."""
    last = 10 / (1 - beta2)
    steps = {*STEPS, *log_spaced_steps(5, last, points)}
    rows = []
    for step in sorted(step for step in steps if step <= last):
        forms = {f: rectification(step, beta2, form=f, rho_threshold=4.0) for f in FORMS}
        rows.append({"of": f"r_t, beta2={beta2}", "x": step, "rho": rho(step, beta2), **forms})
    return rows


def runs(quick: bool) -> list[Run]:
    points = 60 if quick else 400
    by_beta2 = [Run(rectifications, {"beta2": beta2, "points": points}) for beta2 in BETA2S]
    return [Run(variances, {"points": points}), *by_beta2]


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    variance = rows[rows["of"] == "variance"].set_index("x")
    errors = variance["first_order"] / variance["exact"] - 1
    errors_text = ", ".join(f"{errors[value]:.2g} at rho = {value:.0f}" for value in RHOS)
    small_from = errors.index[errors < SMALL].min()
    r = rows[rows["of"] == "r_t, beta2=0.999"].set_index("x")
    ratio = r["first_order"] / r["exact"]
    ratio_text = ", ".join(f"{ratio[step]:.2f} at step {step}" for step in (5, 6, 10, 100))
    near_from = int(ratio.index[ratio > 1 - SMALL].min())
    return [
        Verdict(
            (np.diff(errors) < 0).all() and errors[1999.0] < 0.01,
            f"Close for large rho: the relative error is {errors_text}; it falls with rho and is "
            f"below {SMALL:.0%} from rho = {small_from:.0f} on.",
        ),
        Verdict(
            errors[5.0] < SMALL,
            "Close where rectification begins: at rho = 5 the first-order variance is "
            f"{1 + errors[5.0]:.1f} times the exact one.",
        ),
        Verdict(
            (ratio <= 1).all(),
            "On the safe side: first-order r_t is nowhere larger than exact r_t. At beta2 = 0.999 "
            f"their ratio is {ratio_text}, and within {SMALL:.0%} of 1 from step {near_from} on.",
        ),
    ]


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Both forms of r_t at a few steps."""
    r = rows[rows["of"].isin(("r_t, beta2=0.99", "r_t, beta2=0.999")) & rows["x"].isin(STEPS)]
    r = r.assign(beta2=r["of"].str.rpartition("=")[2], ratio=r["first_order"] / r["exact"])
    names = {"rho": "rho_t", "first_order": "r_t, first order", "exact": "r_t, exact"}
    return r.rename(columns={"x": "step", **names}).astype({"step": int})[
        ["beta2", "step", *names.values(), "ratio"]
    ]


def draw(rows: pd.DataFrame) -> Figure:
    figure, (left, right) = plots.panels(2)
    variance = rows[rows["of"] == "variance"]
    x, exact, first = (variance[name] for name in ("x", *FORMS))
    left.loglog(x, exact, color=plots.BLUE, label="exact")
    left.loglog(x, first, color=plots.ORANGE, ls="--", label="first order")
    left.loglog(x, first - exact, color=plots.BLACK, lw=1, label="difference")
    left.set(xlabel="rho", ylabel="Var[psi], tau = 1", title="Variance of the adaptive rate")
    left.legend()
    for beta2, color in zip(BETA2S, plots.CYCLE, strict=False):
        r = rows[rows["of"] == f"r_t, beta2={beta2}"]
        right.semilogx(r["x"], r["exact"], color=color, label=f"beta2 = {beta2}")
        right.semilogx(r["x"], r["first_order"], color=color, ls="--")
    right.set(xlabel="step t", ylabel="r_t", title="r_t: exact, and first order (dashed)")
    right.legend()
    return figure
