"""PEFT: LoRA adapters beside frozen weights."""

import pytest
import torch

from radam_kernels import RAdam
from tests.frameworks.training import (
    Make,
    assert_trains_as_with_torch,
    gpt2,
    make_with,
    own_options,
)
from tests.helpers import assert_same, saved

pytest.importorskip("peft", reason="pip install 'radam_kernels[frameworks]'")
pytest.importorskip("transformers", reason="the models of these tests are those of transformers")

from peft import LoraConfig, PeftModel, get_peft_model

STEPS = 12


def lora(dtype: torch.dtype = torch.float64) -> PeftModel:
    settings = LoraConfig(
        r=4, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1, task_type="CAUSAL_LM"
    )
    return get_peft_model(gpt2(dtype), settings, autocast_adapter_dtype=False)


def train(model: PeftModel, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        ids = torch.randint(0, 32, (4, 12))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def frozen(model: PeftModel) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if not p.requires_grad]


@own_options
def test_adapters_train_as_with_torch(options):
    def run(make: Make):
        model = lora()
        before = frozen(model)
        optimizer = make_with(options, make, model.parameters(), lr=0.01)
        train(model, optimizer, 0, STEPS)
        assert all(map(torch.equal, frozen(model), before))
        # A state for each adapter, and no other parameter.
        assert set(optimizer.state) == {p for p in model.parameters() if p.requires_grad}
        return model, optimizer

    assert_trains_as_with_torch(run)


@pytest.mark.parametrize("options", [{}, {"flatten": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_adapters_are_resumed_to_the_bit(dtype, options, tmp_path):
    whole = lora(dtype)
    optimizer = RAdam(whole.parameters(), lr=0.01, **options)
    train(whole, optimizer, 0, 7)
    whole.save_pretrained(tmp_path)
    state = saved(optimizer.state_dict())
    train(whole, optimizer, 7, STEPS)
    resumed = PeftModel.from_pretrained(
        lora(dtype).unload(), tmp_path, is_trainable=True, autocast_adapter_dtype=False
    )
    other = RAdam(resumed.parameters(), lr=0.01, **options)
    other.load_state_dict(state)
    train(resumed, other, 7, STEPS)
    assert_same(other, optimizer)
