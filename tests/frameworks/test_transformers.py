"""transformers.Trainer."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from radam_kernels import RAdam
from tests.frameworks.training import MIXED, Make, assert_trains_as_with_torch, gpt2
from tests.helpers import TorchRAdam, assert_same

pytest.importorskip("transformers", reason="pip install 'radam_kernels[frameworks]'")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

from transformers import Trainer, TrainerCallback, TrainingArguments

STEPS = 12


def sentences(count: int = 48) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model: nn.Module, folder: Path | str, optimizer: dict, **options) -> Trainer:
    """A Trainer; `optimizer` holds its argument `optimizers` or `optimizer_cls_and_kwargs`."""
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    return Trainer(model=model, args=arguments, train_dataset=sentences(), **optimizer)


def raw(trained: Trainer) -> Optimizer:
    """The optimizer inside what accelerate's `prepare` has made of it."""
    return getattr(trained.optimizer, "optimizer", trained.optimizer)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"max_grad_norm": 0.0, "weight_decay": 0.1},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 3},
    ],
    ids=["defaults", "accumulation and clipping", "no clipping", "plateau"],
)
@pytest.mark.parametrize("by", ["optimizers", "optimizer_cls_and_kwargs"])
def test_it_trains_as_with_torch(by, options, tmp_path):
    def run(make: Make):
        model = gpt2(torch.float64)
        if by == "optimizers":
            optimizer = {"optimizers": (make(model.parameters(), lr=0.01), None)}
        else:
            optimizer = {"optimizer_cls_and_kwargs": (make, {"lr": 0.01})}
        if "eval_steps" in options:
            optimizer["eval_dataset"] = sentences(8)
        made = trainer(model, tmp_path, optimizer, **options)
        made.train()
        return model, raw(made)

    assert_trains_as_with_torch(run)


class ClipInTheStep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, optimizer, **others) -> None:
        optimizer.optimizer.clip_grad_norm_(0.1)


def test_clipping_in_the_step_trains_as_with_torch(tmp_path):
    def run(make: Make):
        model = gpt2(torch.float64)
        made = trainer(
            model,
            tmp_path,
            {"optimizer_cls_and_kwargs": (make, {"lr": 0.01})},
            gradient_accumulation_steps=2,
            max_grad_norm=0.0 if make is RAdam else 0.1,
        )
        if make is RAdam:
            made.add_callback(ClipInTheStep)
        made.train()
        return model, raw(made)

    assert_trains_as_with_torch(run)


def test_steps_in_backward_train_as_with_torch(tmp_path):
    def run(make: Make):
        model = gpt2(torch.float64)
        optimizer = make(model.parameters(), lr=0.01)
        if make is RAdam:
            optimizer.step_in_backward()
        made = trainer(model, tmp_path, {"optimizers": (optimizer, None)}, max_grad_norm=0.0)
        made.train()
        return model, raw(made)

    assert_trains_as_with_torch(run)


def test_bf16_trains_as_with_torch(tmp_path):
    def run(make: Make):
        model = gpt2()
        made = trainer(
            model, tmp_path, {"optimizers": (make(model.parameters(), lr=0.01), None)}, bf16=True
        )
        made.train()
        return model, raw(made)

    assert_trains_as_with_torch(run, **MIXED)


@pytest.mark.parametrize("options", [{}, {"flatten": True}, {"capturable": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_resumed_is_the_uninterrupted_one_to_the_bit(dtype, options, tmp_path):
    def made(**more) -> Trainer:
        model = gpt2(dtype)
        optimizer = RAdam(model.parameters(), lr=0.01, **options)
        return trainer(
            model, tmp_path, {"optimizers": (optimizer, None)}, save_strategy="steps",
            save_steps=7, **more,
        )  # fmt: skip

    whole = made()
    whole.train()
    resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert_same(raw(resumed), raw(whole))


def test_a_checkpoint_of_torchs_is_resumed(tmp_path):
    def made(make: Make) -> Trainer:
        model = gpt2(torch.float64)
        return trainer(
            model, tmp_path, {"optimizer_cls_and_kwargs": (make, {"lr": 0.01})},
            save_strategy="steps", save_steps=7,
        )  # fmt: skip

    whole = made(TorchRAdam)
    whole.train()
    resumed = made(RAdam)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert_same(raw(resumed), raw(whole), rtol=1e-10, atol=1e-12)


def test_optimizer_cls_and_kwargs_ignores_the_learning_rate_of_the_arguments(tmp_path):
    """transformers, with any optimizer: which is why the page says to give it."""
    made = trainer(
        gpt2(torch.float64), tmp_path, {"optimizer_cls_and_kwargs": (RAdam, {})}, learning_rate=0.5
    )
    assert {group["lr"] for group in made.create_optimizer().param_groups} == {1e-3}


def test_a_bfloat16_model_has_float32_moments_unless_told_otherwise(tmp_path):
    def moments(make: Make, **options) -> set[torch.dtype]:
        model = gpt2(torch.bfloat16)
        made = trainer(
            model, tmp_path, {"optimizer_cls_and_kwargs": (make, {"lr": 0.01, **options})}
        )
        made.train()
        return {state["exp_avg"].dtype for state in raw(made).state.values()}

    assert moments(RAdam) == {torch.float32}
    assert moments(RAdam, state_dtype="bfloat16") == moments(TorchRAdam) == {torch.bfloat16}
