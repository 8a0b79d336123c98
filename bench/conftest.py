"""pytest's options for bench/, and what a file of --benchmark-json says beside the times."""

from typing import Any

import pytest
import torch

from bench import machine
from bench.contenders import ADAM, RADAM
from bench.others import DISTURBED

ROWS = pytest.StashKey[list[dict[str, Any]]]()  # what the tests found out, for the last table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", help="every case and optimizer of bench/: takes long"
    )


def pytest_report_header(config: pytest.Config) -> str:
    everything = config.getoption("all", False)
    which = "every case" if everything else "a quick selection; --all takes every case"
    return f"bench: {which}; -k selects, as in -k 'float32 and one_1M'"


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info["radam_kernels"] = machine.facts(device)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Ratios to torch's optimizers in the same case."""
    rows = output_json["benchmarks"]
    medians = {(r["group"], r["params"]["contender"]): r["stats"]["median"] for r in rows}
    for row in rows:
        for key, peer in {"vs_adam_fused": ADAM, "vs_radam_foreach": RADAM}.items():
            theirs = medians.get((row["group"], peer))
            row["extra_info"][key] = theirs and theirs / row["stats"]["median"]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def found(pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    """Where a test puts its row."""
    return pytestconfig.stash[ROWS]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """What pytest-benchmark's tables have no column for."""
    if not (rows := config.stash[ROWS]):
        return
    say = terminalreporter.write_line
    terminalreporter.section("bandwidth, and the share of the limit in the same run")
    for name in dict.fromkeys(row["group"] for row in rows):
        say(name)
        for row in (row for row in rows if row["group"] == name):
            share = f"{row['share_of_limit']:7.1%} of " if "share_of_limit" in row else ""
            say(
                f"  {row['name']:36}{1e3 * row['median']:11.4f} ms{row['gb_s']:9.2f} GB/s "
                f"{share:>12}{row['limit']}" + "  (!)" * _disturbed(row)
            )
    if any(map(_disturbed, rows)):
        say("(!) other processes were at work while this was timed: measure it again")


def _disturbed(row: dict[str, Any]) -> bool:
    return (row["cores_of_others"] or 0) > DISTURBED
