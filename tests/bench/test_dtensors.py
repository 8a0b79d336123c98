"""The benchmark of DTensors."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from bench import dtensors

pytestmark = pytest.mark.bench


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_every_optimizer_is_timed():
    found = dtensors.measure(3, 0.0)
    assert list(found) == [dtensors.PLAIN, dtensors.OURS, dtensors.ADAM, dtensors.RADAM]
    assert all(seconds > 0 for seconds in found.values())
