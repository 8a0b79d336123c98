"""With gradients whose sums are exact, any number of ranks computes the same bits."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from radam_kernels import RAdam
from tests.distributed.test_ddp import DDP
from tests.distributed.test_fsdp1 import FSDP1
from tests.distributed.test_fsdp2 import FSDP2, HSDP
from tests.distributed.test_zero import ZeRO
from tests.distributed.training import Training, Wrapper, train
from tests.helpers import same_bits


class Linear(nn.Module):
    """Linear in every parameter: gradients do not depend on their values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 300)
        self.second = nn.Linear(6, 5)
        self.third = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.first, self.second, self.third)
        return torch.cat([layer(x) for layer in layers], -1)


@dataclass(frozen=True)
class Exact(Training):
    def net(self) -> nn.Module:
        return Linear().to(self.dtype)

    def batch(self, step: int) -> Tensor:
        """Integers of which the sums over a batch are exact in bfloat16, too."""
        return super().batch(step).clamp(-2, 2).round()

    def loss(self, outputs: Tensor) -> Tensor:
        signs = 1 - 2 * (torch.arange(outputs.shape[-1]) % 2)
        return (outputs * signs).sum() / len(outputs)


@pytest.mark.distributed(2, 4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [DDP, ZeRO, FSDP1, FSDP2, HSDP])
def test_one_process_computes_the_same_bits(cls, dtype):
    how, wrapper = Exact(dtype=dtype), cls()
    plain, _ = train(Wrapper(), RAdam, how)
    model, _ = train(wrapper, RAdam, how)
    for p, q in zip(wrapper.full(model), plain.parameters(), strict=True):
        assert same_bits(p, q)
