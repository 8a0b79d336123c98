"""Trainings of one format: the final loss of each seed."""

import math

import torch

from ..paper.harness.experiment import Row
from .contenders import BY_NAME, Span
from .tasks import TASKS

LAST = 0.02  # of the learning rate, at the end of the cosine


def train(task: str, beta2: float, name: str, first_seed: int, seeds: int, steps: int) -> list[Row]:
    """Final losses of `seeds` trainings that run side by side.

    The model computes in float32 on what it sees of the weights, their bfloat16; gradients are
    rounded to bfloat16.
    """
    make, default_steps, lr = TASKS[task]
    problem, steps = make(), steps or default_steps
    numbers = range(first_seed, first_seed + seeds)
    made = [problem.init(torch.Generator().manual_seed(seed)) for seed in numbers]
    drawn = [problem.draw(torch.Generator().manual_seed(1000 + n), steps) for n in numbers]
    batches = [torch.stack(parts, 1) for parts in zip(*drawn, strict=True)]
    spans: list[Span] = []
    end = 0
    for value in made[0].values():
        spans.append((end, value.numel()))
        end += -(-value.numel() // 256) * 256  # so that no block has elements of two tensors
    stored = torch.zeros(seeds, end, dtype=torch.bfloat16)
    for row, values in zip(stored, made, strict=True):
        for (start, n), value in zip(spans, values.values(), strict=True):
            row[start : start + n] = value.flatten()
    stepper = BY_NAME[name].make(stored, spans, beta2)

    seen = torch.empty(stored.shape, requires_grad=True)
    parts = zip(made[0].items(), spans, strict=True)
    places = {key: (slice(a, a + n), value.shape) for (key, value), (a, n) in parts}
    def weights():
        return {key: seen[:, part].view(seeds, *shape) for key, (part, shape) in places.items()}

    for step in range(steps):
        with torch.no_grad():
            seen.copy_(stored)
        problem.loss(weights(), *(part[step] for part in batches)).sum().backward()
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        stepper.step(seen.grad.bfloat16(), lr * (LAST + (1 - LAST) * cosine))
        seen.grad = None
    with torch.no_grad():
        seen.copy_(stored)
        losses = problem.held_out(weights()).tolist()
    facts = {"training": task, "beta2": beta2, "format": name}
    return [{**facts, "seed": n, "loss": loss} for n, loss in zip(numbers, losses, strict=True)]
