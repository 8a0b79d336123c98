"""Process groups: of several processes, of this one alone, and of ranks without the others."""

import math
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from tests.conftest import Processes
from tests.distributed.ranks import SKIPPED

TIMEOUT_S = 60
_MODULES = (
    "tests.distributed.ranks",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.optim",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each number of processes that `@pytest.mark.distributed(2, 4)` lists."""
    mark = metafunc.definition.get_closest_marker("distributed")
    if mark and mark.args:
        metafunc.fixturenames.append("world")
        metafunc.parametrize("world", mark.args, ids=[f"{n} ranks" for n in mark.args])


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs the body of such a test on all ranks; without numbers, a test runs as any other.

    Arguments are parameters and paths, not other fixtures.
    """
    mark = pyfuncitem.get_closest_marker("distributed")
    if not (mark and mark.args):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    on_ranks = pyfuncitem._request.getfixturevalue("on_ranks")
    on_ranks(pyfuncitem.callspec.params["world"], pyfuncitem.function, **arguments)
    return True


@pytest.fixture
def on_ranks(rank_processes: Processes) -> Callable[..., None]:
    """Calls `function(**arguments)` on `world` ranks; fails the test unless all of them return."""

    def on_ranks(world: int, function: Callable, /, **arguments: object) -> None:
        code, output = rank_processes.run(
            "import pickle\n"
            "from tests.distributed.ranks import run\n"
            f"arguments = pickle.loads({pickle.dumps(arguments)!r})\n"
            f"run({function.__module__!r}, {function.__name__!r}, arguments, "
            f"world={world}, timeout={TIMEOUT_S})",
            timeout=TIMEOUT_S + 10,
        )
        assert code == 0, f"exit code {code}\n{output[-12000:]}"
        if output.startswith(SKIPPED):
            pytest.skip(output.removeprefix(SKIPPED).strip())

    return on_ranks


@pytest.fixture(scope="session")
def rank_processes() -> Iterator[Processes]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    made = Processes(*_MODULES)
    yield made
    made.close()


@pytest.fixture
def mesh() -> Iterator:
    """A device mesh of this process alone."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def mesh_of() -> Iterator[Callable]:
    """Makes a mesh on which this process is one rank, and the others do not exist.

    Its process group sends nothing: for tests of what needs no communication.
    """
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

    def mesh_of(*shape: int, rank: int):
        ranks = math.prod(shape)
        dist.init_process_group("fake", store=fake.FakeStore(), rank=rank, world_size=ranks)
        return dist.device_mesh.init_device_mesh("cpu", shape)

    yield mesh_of
    dist.destroy_process_group()
