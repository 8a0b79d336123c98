"""The code of radam_kernels/frameworks.md runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import radam_kernels
from tests.frameworks.training import gpt2

PAGE = (Path(__file__).parents[2] / "radam_kernels/frameworks.md").read_text()
SNIPPETS = {
    section.splitlines()[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for section in PAGE.split("\n## ")[1:]
}

# What the reader has before: imports and a model.
BEFORE = {
    "transformers": """
from transformers import Trainer, TrainerCallback, TrainingArguments
model, data = gpt2(), [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 16
args = TrainingArguments("output", max_steps=2, use_cpu=True, report_to=[], max_grad_norm=0)
""",
    "accelerate": """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
data = torch.utils.data.DataLoader([torch.ones(6)])
""",
    "Lightning": "import lightning",
    "timm": """
import timm
model = timm.create_model("resnet10t")
""",
    "PEFT": """
from peft import LoraConfig, get_peft_model
model = gpt2()
""",
    "torchao": """
from torchao.quantization import quantize_
from torchao.prototype.quantized_training import int8_weight_only_quantized_training
""",
    "safetensors": """
from safetensors.torch import load_file, save_file
optimizer = RAdam(model.parameters(), flatten=True)
""",
    "Averages of the weights: EMA": "from ema_pytorch import EMA",
    "Lookahead and SAM": "from pytorch_optimizer import SAM, Lookahead",
    "schedulefree": "from schedulefree import ScheduleFreeWrapper",
}

# What shows that it works.
AFTER = {
    "transformers": """
trainer.add_callback(ClipInTheStep)
trainer.train()
assert type(trainer.optimizer.optimizer) is RAdam
assert trainer.optimizer.optimizer.param_groups[0]["initial_lr"] == 3e-4
""",
    "accelerate": "step(optimizer)",
    "Lightning": """
class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 3)

    def training_step(self, x, index):
        return self.net(x).square().mean()

Module.configure_optimizers = configure_optimizers
Module.configure_gradient_clipping = configure_gradient_clipping
module = Module()
lightning.Trainer(
    accelerator="cpu", max_steps=2, precision="bf16-mixed", gradient_clip_val=0.1, logger=False
).fit(module, torch.utils.data.DataLoader([torch.ones(6)] * 2))
""",
    "timm": "assert type(optimizer) is RAdam",
    "PEFT": """
model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
optimizer.step()
assert 0 < len(optimizer.state) < len([*model.parameters()])
""",
    "torchao": "step(optimizer)",
    "safetensors": "step(optimizer)",
    "Averages of the weights: EMA": """
step(optimizer)
average.update()
""",
    "Lookahead and SAM": """
step(lookahead)
step(sam, closure=lambda: model(torch.ones(2, 6)).sum().backward())
""",
    "schedulefree": """
step(optimizer)
optimizer.eval()
""",
}


def test_every_snippet_of_the_page_is_run():
    assert [heading for heading, codes in SNIPPETS.items() if codes] == list(BEFORE) == list(AFTER)


@pytest.mark.parametrize("heading", BEFORE)
def test_the_code_runs_as_it_stands_there(heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))

    def step(optimizer, **arguments) -> None:
        before = model(torch.ones(2, 6))
        before.square().sum().backward()
        optimizer.step(**arguments)
        assert not torch.equal(model(torch.ones(2, 6)), before)

    names = {"RAdam": radam_kernels.RAdam, "torch": torch, "nn": nn, "gpt2": gpt2}
    names |= {"model": model, "step": step}
    try:
        exec(BEFORE[heading], names)
    except (ImportError, RuntimeError) as error:
        if "torchvision" not in str(error) and not isinstance(error, ImportError):
            raise
        pytest.skip(f"not installed here: {error}")
    for code in SNIPPETS[heading]:
        exec(code, names)
    exec(AFTER[heading], names)
