"""Which backend is chosen: the named one, or with "auto" the fastest that works."""

import pytest
import torch

import radam_kernels
from radam_kernels import backends
from radam_kernels.backends import reference
from tests.helpers import USUAL


@pytest.fixture
def empty_cache():
    """Clears the cache of resolved backends, before and after."""
    backends.resolve.cache_clear()
    yield
    backends.resolve.cache_clear()


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


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_devices_that_no_backend_steps_are_refused(name, empty_cache):
    with pytest.raises(RuntimeError, match=r"'hpu'.*work here are"):
        backends.resolve(name, "hpu")


def test_the_reference_named_does_not_warn(recwarn, empty_cache):
    assert backends.resolve("reference", "cpu") is reference
    assert not recwarn
