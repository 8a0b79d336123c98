"""The same edits and steps with two backends, which must agree in every bit.

Oracles: the reference backend, which shares the walk and the checks, but whose optimizer forgets
its plan before each step; ordinary steps, for those in backward; and a step of torch.optim.RAdam
from the same state, up to rounding.
`python -m tests.fuzz.machine MINUTES` runs it on new random sequences.
"""

import copy
import gc
import math
import re
import sys
import time
import warnings
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from tests.fuzz import edits
from tests.fuzz.worlds import TorchStep, World, errors_change_nothing, image, pickled_copy
from tests.helpers import MOMENTS, TorchRAdam, params_of, randn, saved, twin

SETTINGS = settings(
    deadline=None,
    database=None,
    stateful_step_count=40,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
SEEDS = st.integers(0, 2**16)
GRADIENTS = st.lists(st.sampled_from([*["new"] * 20, *edits.GRADIENTS]), min_size=1, max_size=4)
WAYS = ["plain"] * 6 + ["closure", "raises", "clipped", "clipped, then changed", "scaled"]


class Machine(RuleBasedStateMachine):
    """Applies each rule in both worlds, and compares them after it."""

    counts = dict.fromkeys(("sequences", "rules", "steps", "refused", "as torch"), 0)

    @initialize(
        seed=SEEDS,
        count=st.integers(1, 5),
        group_count=st.integers(1, 3),
        formats=st.fixed_dictionaries(
            {name: st.sampled_from(edits.OPTIONS[name][:4]) for name in edits.FORMATS}
        ),
        in_all=st.booleans(),
        flatten=st.booleans(),
        capturable=st.booleans(),
        weight_decay=st.sampled_from([0.0, 0.1]),
    )
    def begin(
        self, seed: int, count: int, group_count: int, formats: dict, in_all: bool, **options: Any
    ) -> None:
        torch.set_num_threads(1)
        self.counts["sequences"] += 1
        self.number = 0
        self.worlds = []
        for backend in ("cpu", "reference"):
            random = Random(seed)
            params = [edits.make_param(random) for _ in range(count)]
            if any(p.dtype == torch.float16 for p in params):  # which some formats refuse
                formats = {}
            groups = [{"params": params[i::group_count]} for i in range(min(group_count, count))]
            groups[0] |= {} if in_all else formats
            self.worlds.append(World(backend, groups, options | (formats if in_all else {})))

    def each(self, action: Callable[[World], Any]) -> Exception | None:
        """The same in both worlds, with the same result or exception, which is returned."""
        outcomes, error = [], None
        for world in self.worlds:
            try:
                outcomes.append(image(action(world)))
            except (KeyError, RuntimeError, ValueError) as raised:
                error = raised
                # Addresses decide on sizes of storages, and which of several pairs is named.
                varies = r"0x\w+|\d+ bytes|needs \d+|\d{9,}|.*shares memory.*"
                outcomes.append((type(raised), re.sub(varies, "", str(raised))))
        assert outcomes[0] == outcomes[1], outcomes
        return error

    @invariant()
    def worlds_agree(self) -> None:
        """After every rule, and after a step that follows every second one."""
        self.counts["rules"] += 1
        self.number += 1
        if self.number % 2:
            self.step_once(["new"], self.number, "plain", 0.0)
        first, second = (world.image() for world in self.worlds)
        assert first.keys() == second.keys()
        assert not [name for name in first if first[name] != second[name]]

    # Steps.

    @rule(
        kinds=GRADIENTS,
        seed=SEEDS,
        way=st.sampled_from(WAYS),
        number=st.sampled_from([0.0, 1e-3, 2.0, math.inf]),
    )
    def step(self, kinds: list[str], seed: int, way: str, number: float) -> None:
        self.step_once(kinds, seed, way, number)

    def step_once(self, kinds: list[str], seed: int, way: str, number: float) -> None:
        for world in self.worlds:
            for i, p in enumerate(world.params):
                edits.give_gradient(p, kinds[i % len(kinds)], seed + i)
        self.counts["steps"] += 1
        closure = {"closure": lambda: 1.5, "raises": lambda: {}["closure"]}.get(way)
        torch_step = TorchStep(self.worlds[0].optimizer) if way in ("plain", "closure") else None
        if way.startswith("clipped"):
            self.clip(number)
        for world in self.worlds:
            if way == "scaled":
                world.optimizer.grad_scale = torch.tensor(4.0)
                world.optimizer.found_inf = torch.tensor(float(number == 0))
            if way == "clipped, then changed":
                grads = [p.grad for p in world.params if p.grad is not None]
                torch.autograd.graph.increment_version(grads[:1])
        error = self.each(lambda world: world.step(closure))
        for world in self.worlds:
            world.optimizer._drop_clipping()
            for name in ("grad_scale", "found_inf"):
                vars(world.optimizer).pop(name, None)
        assert bool(error) or way != "raises"
        if error and way != "raises":
            self.heal()
        elif torch_step and not error:
            self.counts["as torch"] += torch_step.compare()

    def clip(self, norm: float) -> None:
        norms: list[Tensor] = []
        self.each(lambda world: norms.append(world.optimizer.clip_grad_norm_(norm)))
        if norms:
            # They are summed in another order, so both go on with the same factor.
            torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0, equal_nan=True)
            first, second = (vars(world.optimizer)["_clipping"] for world in self.worlds)
            second.factor = first.factor

    def heal(self) -> None:
        """Takes back what a step may refuse."""
        self.counts["refused"] += 1
        for world in self.worlds:
            world.optimizer.state.clear()
            for group in world.optimizer.param_groups:
                group.update(dict.fromkeys(edits.FORMATS), decouple_lr=False)
            for p in world.params:
                p.grad = None
                p.data = p.data.clone(memory_format=torch.contiguous_format).resolve_neg()

    @rule(count=st.integers(1, 3), seed=SEEDS, both=st.booleans())
    def step_in_backward(self, count: int, seed: int, both: bool) -> None:
        """In the first world, or in both; in none where an ordinary step would be refused."""
        tried = copy.deepcopy(self.worlds[1].optimizer)
        try:
            for p in params_of(tried):
                p.grad = torch.zeros_like(p)
            tried.step()
        except (RuntimeError, ValueError):
            return
        for world in self.worlds:
            world.optimizer.zero_grad()
            stepping = both or world is self.worlds[0]
            handle = world.optimizer.step_in_backward() if stepping else None
            for number in range(seed, seed + count):
                trained = [p for p in world.params if p.requires_grad]
                products = [p * randn(*p.shape, dtype=p.dtype, seed=number) for p in trained]
                if trained:
                    torch.stack([x.sum().abs().double() for x in products]).sum().backward()
                assert not stepping or all(p.grad is None for p in trained)
                world.optimizer.step()
                world.optimizer.zero_grad()
                world.optimizer.param_groups[0]["params"].reverse()
            if handle:
                handle.remove()

    # Edits.

    @rule(
        edit=st.sampled_from([*edits.TENSORS, *edits.IN_PLACE]),
        of=st.sampled_from(["param", *MOMENTS, *MOMENTS, "step", "grad", "extra"]),
        at=SEEDS,
        by_data=st.booleans(),
    )
    def edit_tensor(self, edit: str, of: str, at: int, by_data: bool) -> None:
        @torch.no_grad()
        def apply(world: World) -> None:
            p = world.params[at % len(world.params)]
            own = world.optimizer.state.get(p, {})
            extras = sorted(key for key in own if key.startswith(("param_", "exp_avg_")))
            key = extras[at % len(extras)] if of == "extra" and extras else of
            t = {"param": p, "grad": p.grad}.get(of, own.get(key))
            if not isinstance(t, Tensor):
                return
            if edit in edits.IN_PLACE:
                edits.IN_PLACE[edit](t)
            elif of in ("param", "grad") or by_data:
                p.grad = None if of == "param" else p.grad
                t.data = edits.TENSORS[edit](t.data)
            else:
                own[key] = edits.TENSORS[edit](t)

        self.each(apply)

    @rule(
        option=st.sampled_from([(name, x) for name, xs in edits.OPTIONS.items() for x in xs]),
        at=SEEDS,
        everywhere=st.booleans(),
    )
    def edit_option(self, option: tuple[str, object], at: int, everywhere: bool) -> None:
        for world in self.worlds:
            groups = world.optimizer.param_groups
            for group in groups if everywhere else [groups[at % len(groups)]]:
                edits.set_option(group, *option)

    @rule(edit=st.sampled_from([*edits.STATES, *edits.GROUPS]), at=SEEDS)
    def edit(self, edit: str, at: int) -> None:
        def apply(world: World) -> None:
            p = world.params[at % len(world.params)]
            if edit in edits.GROUPS:
                edits.GROUPS[edit](world.optimizer, p, Random(at))
            elif own := world.optimizer.state.get(p):
                edits.STATES[edit](world.optimizer, p, own, Random(at))

        self.each(apply)

    # Checkpoints and copies.

    @rule(through_file=st.booleans())
    def save(self, through_file: bool) -> None:
        def apply(world: World) -> None:
            found = world.optimizer.state_dict()
            world.saved.append(saved(found) if through_file else copy.deepcopy(found))

        self.each(apply)

    @precondition(lambda self: self.worlds[0].saved)
    @rule(way=st.sampled_from(["itself", "new optimizer", "through torch"]), at=SEEDS)
    def load(self, way: str, at: int) -> None:
        def apply(world: World) -> None:
            found = copy.deepcopy(world.saved[at % len(world.saved)])
            if way == "through torch":
                theirs = twin(world.optimizer, TorchRAdam)
                theirs.load_state_dict(found)
                found = theirs.state_dict()
            elif way == "new optimizer":
                world.optimizer = twin(world.optimizer, backend=world.backend)
            with errors_change_nothing(world.optimizer):
                world.optimizer.load_state_dict(found)

        self.each(apply)

    @rule(pickled=st.booleans())
    def copied(self, pickled: bool) -> None:
        for world in self.worlds:
            old = world.optimizer
            world.optimizer = pickled_copy(old) if pickled else copy.deepcopy(old)

    # The rest.

    @rule(what=st.sampled_from(["zero_grad", "masters", "repr", "gc", 1, 2, 3]))
    def between(self, what: str | int) -> None:
        if isinstance(what, int):
            torch.set_num_threads(what)
        elif what == "gc":
            gc.collect()
        elif what == "zero_grad":
            self.each(lambda world: world.optimizer.zero_grad(set_to_none=False))
        elif what == "masters":
            self.each(lambda world: dict(enumerate(world.optimizer.master_params())))
        else:
            self.each(lambda world: re.sub("backend.*", "", repr(world.optimizer)))


def run(minutes: float) -> dict[str, int]:
    """New random sequences for so long; returns how much was done."""
    warnings.simplefilter("ignore")
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        run_state_machine_as_test(Machine, settings=settings(SETTINGS, max_examples=50))
    return Machine.counts


if __name__ == "__main__":
    print(run(float(sys.argv[1])))
