"""Which backend is chosen: the named one, or with "auto" the fastest that works."""

from types import SimpleNamespace

import pytest
import torch

import radam_kernels
from radam_kernels import backends
from radam_kernels.backends import cuda, reference, triton_
from tests.helpers import USUAL


@pytest.fixture
def empty_cache():
    """Clears the caches of what works and of resolved backends, before and after."""
    caches = (backends.resolve, backends.why_not)  # before tests replace them
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


def test_every_backend_works_or_says_why_not():
    reasons = radam_kernels.available_backends()
    assert tuple(reasons) == backends.NAMES == ("cuda", "cpu", "triton", "reference")
    assert reasons["cpu"] is None
    assert reasons["reference"] is None
    assert all(why is None or len(why) > 20 for why in reasons.values())


def test_a_backend_that_does_not_work_is_refused_with_its_reason():
    why = radam_kernels.available_backends()["cuda"]
    for make in (
        lambda: radam_kernels.RAdam([torch.zeros(1)], backend="cuda"),
        lambda: radam_kernels.radam_(*torch.zeros(4, 1), step=1, **USUAL, backend="cuda"),
    ):
        with pytest.raises(RuntimeError, match=r"'cuda'.*work here are.*'cpu'") as error:
            make()
        assert why in str(error.value)


def test_an_unknown_backend_is_refused_with_those_there_are():
    for make in (
        lambda: radam_kernels.RAdam([torch.zeros(1)], backend="gpu"),
        lambda: radam_kernels.radam_(*torch.zeros(4, 1), step=1, **USUAL, backend="gpu"),
    ):
        with pytest.raises(
            ValueError, match=r"'auto'.*'cuda'.*'cpu'.*'triton'.*'reference'.*'gpu'"
        ):
            make()


def test_auto_takes_the_cpu_kernel_on_the_cpu(recwarn, empty_cache):
    assert backends.resolve("auto", "cpu") is backends.cpu
    assert not recwarn


def test_auto_warns_when_only_the_reference_is_left(monkeypatch, empty_cache):
    monkeypatch.setattr(
        backends, "why_not", lambda name, *_: None if name == "reference" else "broken"
    )
    with pytest.warns(UserWarning, match="slow reference does: broken"):
        assert backends.resolve("auto", "cpu") is reference


def test_a_named_backend_never_gives_way_to_another(monkeypatch, empty_cache):
    monkeypatch.setattr(
        backends, "why_not", lambda name, *_: "it is broken" if name == "cpu" else None
    )
    with pytest.raises(RuntimeError, match=r"'cpu' can't step .*it is broken.*'reference'"):
        backends.resolve("cpu", "cpu")


@pytest.mark.parametrize(
    ("driver", "taken"),
    [(12080, triton_), (13000, cuda), (14010, cuda)],
    ids=["12.8", "13.0", "14.1"],
)
def test_auto_takes_triton_where_the_driver_is_too_old(monkeypatch, empty_cache, driver, taken):
    built = SimpleNamespace(
        runtime_version=lambda: 13000, driver_version=lambda: driver, why_not=lambda device: ""
    )
    monkeypatch.setattr(cuda, "_cuda", built)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton_, "why_not", lambda device_type: None)
    assert backends.resolve("auto", "cuda") is taken
    why = backends.why_not("cuda", "cuda")
    if taken is triton_:
        assert "driver is for CUDA 12.8 and _cuda was built with CUDA 13.0" in why
        assert "build radam_kernels with CUDA 12" in why
    else:
        assert why is None


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_devices_that_no_backend_steps_are_refused(name, empty_cache):
    with pytest.raises(RuntimeError, match=r"'hpu'.*work here are"):
        backends.resolve(name, "hpu")


def test_the_reference_named_does_not_warn(recwarn, empty_cache):
    assert backends.resolve("reference", "cpu") is reference
    assert not recwarn
