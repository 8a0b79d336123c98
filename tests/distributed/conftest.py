"""Process groups of one process, and of ranks without the others."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist


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
