"""Loads the compiled modules; refuses to run if they are missing or stale, or without the GIL."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch  # before _cpu, which uses the OpenMP runtime that torch loads

from .fingerprint import fingerprint

_HERE = Path(__file__).resolve().parent


def load_optional(name: str) -> ModuleType | None:
    """The compiled module `name`, or None if it was not built; see `load`."""
    return load(name) if find_spec(f"{__package__}.{name}") else None


def load(name: str) -> ModuleType:
    """The compiled module `name`; raises ImportError, with a remedy, if it can't be used."""
    in_tree = fingerprint(_HERE.parent)
    remedy = (
        f"run `pip install -e .` in {_HERE.parent}"
        if in_tree
        else "install radam_kernels again, from its source tree (it is not on PyPI): "
        "`pip install --force-reinstall --no-deps PATH_OF_THE_TREE`"
    )
    try:
        module = import_module(f"{__package__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.{name}":
            raise
        raise ImportError(
            f"radam_kernels has no compiled module {name} in {_HERE}: "
            f"{'this source tree is not built' if in_tree else 'it was not installed'}; {remedy}"
        ) from None
    _require_gil()
    if in_tree and module.fingerprint != in_tree:
        raise ImportError(
            f"radam_kernels: {module.__file__} was built from other sources "
            f"({module.fingerprint}) than those in {_HERE.parent / 'csrc'} ({in_tree}); {remedy}"
        )
    return module


def _require_gil() -> None:
    """Raises ImportError if Python runs without the GIL although a compiled module was loaded.

    The modules do not declare Py_MOD_GIL_NOT_USED, so free-threaded Python has enabled the GIL to
    load them, for good, unless it was told not to.
    """
    if getattr(sys, "_is_gil_enabled", lambda: True)():  # there since Python 3.13
        return
    raise ImportError(
        "radam_kernels can't run without the GIL: a step reads parameter groups, state and tensors "
        "through C references that only the GIL protects from other threads. Unset PYTHON_GIL and "
        "leave out `-X gil=0`, so that free-threaded Python enables the GIL for this package; or "
        "use an ordinary build of Python"
    )


if TYPE_CHECKING:
    from . import _cpu as cpu
else:
    cpu = load("_cpu")

# The dtypes of the kernels, in the order of their codes.
DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in cpu.dtypes)

# The names of dtypes and of the formats for low memory, in the order of their codes.
FORMAT_NAMES: tuple[str, ...] = (*cpu.dtypes, *cpu.formats)
