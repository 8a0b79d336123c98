"""What type checkers read of the package: the stubs say what the compiled modules have."""

import ast
import re
import runpy
from pathlib import Path

import pytest

import radam_kernels
from radam_kernels.modules import load_optional

HERE = Path(radam_kernels.__file__).parent


def declared(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """The names that a stub or a class in it declares; what it imports is not exported."""
    names = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.AnnAssign):
            names[node.target.id] = node
    return names


def compare(stub: dict[str, ast.stmt], real: object, where: str) -> None:
    assert set(stub) == {name for name in vars(real) if not name.startswith("_")}, where
    for name, node in stub.items():
        found = getattr(real, name)
        if isinstance(node, ast.ClassDef):
            compare(declared(node.body), found, f"{where}.{name}")
        elif isinstance(node, ast.FunctionDef) and not node.decorator_list:
            compare_parameters(node, found, f"{where}.{name}")


def compare_parameters(stub: ast.FunctionDef, real: object, where: str) -> None:
    """pybind11 writes the signature into the first line of the docstring."""
    names = re.findall(r"(\w+): ", real.__doc__.splitlines()[0])
    told = [arg.arg for arg in stub.args.args]
    assert len(told) == len(names), where
    for ours, name in zip(told, names, strict=True):
        assert ours == name or re.fullmatch(r"arg\d+", name), where


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_a_stub_declares_what_the_compiled_module_has(name):
    if not (module := load_optional(name)):
        pytest.skip(f"{name} is not built")
    stub = ast.parse((HERE / f"{name}.pyi").read_text())
    compare(declared(stub.body), module, name)


def test_the_package_says_that_it_is_typed():
    assert (HERE / "py.typed").is_file()


def test_the_script_that_type_checkers_read_runs(capsys):
    runpy.run_path(str(Path(__file__).with_name("user_script.py")), run_name="__main__")
    assert "expected 'auto' or one of" in capsys.readouterr().out
