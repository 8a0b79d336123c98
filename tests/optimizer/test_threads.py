"""Code that runs during a step, in another thread or in a hook, may edit anything: no crash, no
false error, and no wrong value of a parameter that it left alone."""

import textwrap
from itertools import product

import pytest

# Gradients are the same at every step, so a parameter's step count determines its values.
PRELUDE = """
import sys
import threading
from collections import defaultdict
from itertools import product
from math import nan

import torch
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from radam_kernels import RAdam

KEYS = ("step", "exp_avg", "exp_avg_sq")


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slices(count):
    \"\"\"Parameters of three elements, most of them not on 16 bytes.\"\"\"
    buffer = randn(3 * count + 1, seed=0)
    return [Parameter(buffer[3 * i + 1 : 3 * i + 4]) for i in range(count)]


def mixed():
    params = [Parameter(randn(n, seed=n)) for n in (1, 3, 70, 1, 2000, 5)]
    params += [Parameter(randn(n, seed=n).bfloat16()) for n in (1, 8)]
    params += [Parameter(randn(n, 2, seed=n)[:, 0]) for n in (1, 2, 6)]  # 2 and 6: not dense
    return params + [Parameter(randn(4, seed=4)), Parameter(randn(4, 3, seed=5).t())]


def parameters(kind):
    return {
        "one of one element": lambda: [Parameter(randn(1, seed=1))],
        "many of one element": lambda: [Parameter(randn(1, seed=i)) for i in range(40)],
        "not on 16 bytes": lambda: slices(40),
        "mixed": mixed,
    }[kind]()


def gradients(params):
    return [randn(*p.shape, seed=100 + i).to(p.dtype) for i, p in enumerate(params)]


def optimizer_of(params, **options):
    for p, grad in zip(params, gradients(params)):
        p.grad = grad.clone()
    half = len(params) // 2
    groups = [{"params": params[half:]}, {"params": params[:half], "lr": 0.05}]
    return RAdam(groups if half else params, lr=0.01, **options)


def values(opt, p):
    return [p.detach().clone(), *(opt.state[p][key].clone() for key in KEYS)]


def course(kind, steps, **options):
    \"\"\"What each parameter and its state are after 1, 2, ... steps that nothing disturbs.\"\"\"
    params = parameters(kind)
    opt, found = optimizer_of(params, **options), []
    for _ in range(steps):
        opt.step()
        found.append([values(opt, p) for p in params])
    return found


def check(opt, params, expected, counts=False):
    \"\"\"That parameters have taken all steps; with `counts`, as many as they say.\"\"\"
    for i, p in enumerate(params):
        if p is None:
            continue
        count = int(opt.state[p]["step"]) if counts else len(expected)
        names = ("param", *KEYS)
        for name, got, want in zip(names, values(opt, p), expected[count - 1][i], strict=True):
            assert torch.equal(got, want), f"{name} of {i} at {count}: {got} is not {want}"


def step_while(edit, opt, steps):
    \"\"\"Takes so many steps; after the first, a thread calls `edit` meanwhile.\"\"\"
    opt.step()
    over, errors = threading.Event(), []

    def work():
        try:
            while not over.is_set():
                edit()
        except BaseException as error:
            errors.append(error)

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(steps - 1):
            opt.step()
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(usual)
    if errors:
        raise errors[0]


class Within(TorchFunctionMode):
    \"\"\"Calls `edit` at each call of torch's within.\"\"\"

    def __init__(self, edit):
        super().__init__()
        self.edit, self.calls = edit, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        self.edit()
        return func(*args, **(kwargs or {}))
"""

KINDS = ("one of one element", "many of one element", "not on 16 bytes", "mixed")

# What a thread does in a loop; all of it keeps every value.
KEEPING = {
    "replaces dicts of the state": """
    for p in params:
        opt.state[p] = {**opt.state[p]}
""",
    "replaces the state": """
    opt.state = defaultdict(dict, {p: {**s} for p, s in list(opt.state.items())})
""",
    "adds and deletes other entries of the state": """
    for i, p in enumerate(params):
        opt.state[f"other {i}"] = {"x": torch.ones(1)}
        opt.state[p][f"other {i}"] = torch.ones(1)
    for i, p in enumerate(params):
        del opt.state[f"other {i}"], opt.state[p][f"other {i}"]
""",
    "orders the state in another way": """
    for p in params:
        opt.state[p] = dict(reversed(opt.state[p].items()))
    items = dict(reversed(opt.state.items()))
    opt.state = defaultdict(dict, items)
""",
    "sets new gradients": """
    for p in params:
        p.grad = p.grad.clone()
""",
    "replaces lists of parameters": """
    for group in opt.param_groups:
        group["params"] = list(group["params"])
        group["params"].extend(idle)
        del group["params"][-len(idle):]
""",
    "inserts parameters": """
    for group in opt.param_groups:
        group["params"][:0] = idle
        del group["params"][:len(idle)]
""",
    "reverses lists of parameters": """
    for group in opt.param_groups:
        group["params"].reverse()
""",
    "inserts groups": """
    opt.param_groups.insert(0, {**opt.param_groups[0], "params": list(idle), "lr": 1.0})
    del opt.param_groups[0]
    opt.param_groups.reverse()
""",
    "replaces groups": """
    opt.param_groups[:] = [{**group} for group in opt.param_groups]
""",
}


# The same, for edits that change the parameters with an even index.
CHANGING = {
    "deletes state and puts it back": """
    for p in even:
        kept = opt.state.pop(p, None)
        if kept is not None:
            opt.state[p] = kept
""",
    "deletes state": """
    for p in even:
        opt.state.pop(p, None)
        junk.append(torch.full_like(p, nan))
    del junk[:-100]
""",
    "replaces moments": """
    for p in even:
        for key in KEYS[1:]:
            if key in opt.state.get(p, ()):
                opt.state[p][key] = opt.state[p][key].clone()
""",
    "replaces step counts": """
    for p in even:
        if "step" in opt.state.get(p, ()):
            opt.state[p]["step"] = opt.state[p]["step"].clone()
""",
    "empties dicts of the state": """
    for p in even:
        kept = {**opt.state[p]}
        opt.state[p].clear()
        opt.state[p].update(kept)
""",
    "puts wrong moments": """
    for p in even:
        moments = {key: torch.full_like(p, nan, dtype=torch.float32) for key in KEYS[1:]}
        opt.state[p] = {"step": torch.tensor(3.0), **moments}
""",
}
# And for edits that keep parameters from a step: they are right for the steps that they took.
SKIPPING = {
    "takes gradients away": """
    for p, grad in zip(params, grads):
        p.grad = None
        p.grad = grad
""",
    "takes parameters out": """
    for group in opt.param_groups:
        for p in list(group["params"]):
            group["params"].remove(p)
            group["params"].append(p)
""",
    "clears lists of parameters": """
    for group in opt.param_groups:
        kept = list(group["params"])
        group["params"].clear()
        group["params"].extend(kept)
""",
    "clears the groups": """
    kept = list(opt.param_groups)
    opt.param_groups.clear()
    opt.param_groups.extend(kept)
""",
}
# Not in a thread: torch 2.13 itself crashes where one thread reads p.grad and another sets it to
# None and so frees it, without radam_kernels.
DROPPING = {
    "drops gradients": """
    for p, grad in zip(params, grads):
        p.grad = None
        junk.append(torch.full_like(p, nan))
        p.grad = grad.clone()
""",
    "drops gradients for good": """
    for p in even:
        p.grad = None
        junk.append(torch.full_like(p, nan))
""",
}
ALL = "check(opt, params, expected)"
ODD = "check(opt, [p if i % 2 else None for i, p in enumerate(params)], expected)"
COUNTED = "check(opt, params, expected, counts=True)"


def script(edit: str, kind: str, steps: int, run: str, then: str, options: str = "") -> str:
    """Runs `run`, in which `edit()` is called at any time, and then `then`."""
    setup = f"""
kind, steps, options = {kind!r}, {steps}, dict({options})
params = parameters(kind)
opt = optimizer_of(params, **options)
expected = course(kind, steps, **options)
even, idle, junk = params[::2], [Parameter(torch.zeros(7)) for _ in range(3)], []
grads = [p.grad for p in params]

def edit():
    {edit.strip()}
"""
    return "\n".join([PRELUDE, setup, textwrap.dedent(run), then])


STEP_BESIDE = "step_while(edit, opt, steps)"


def many(kind: str) -> int:
    return {"one of one element": 300, "mixed": 30}.get(kind, 60)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", KEEPING.values(), ids=KEEPING)
def test_edits_of_a_thread_that_keep_all_values_change_nothing(edit, kind, succeeds):
    succeeds(script(edit, kind, many(kind), STEP_BESIDE, ALL))


@pytest.mark.parametrize("edit", KEEPING.values(), ids=KEEPING)
def test_edits_of_a_thread_change_nothing_under_the_reference_either(edit, succeeds):
    succeeds(script(edit, "mixed", 8, STEP_BESIDE, ALL, 'backend="reference"'))


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("edit", CHANGING.values(), ids=CHANGING)
def test_edits_of_a_thread_change_no_other_parameter(edit, kind, succeeds):
    succeeds(script(edit, kind, many(kind), STEP_BESIDE, ODD))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", SKIPPING.values(), ids=SKIPPING)
def test_a_thread_that_keeps_parameters_from_steps_leaves_them_whole(edit, kind, succeeds):
    succeeds(script(edit, kind, many(kind), STEP_BESIDE, COUNTED))


# Within a step, code of the user's runs at each call of torch's under a mode, and in the property
# of a subclass. All edits there happen at the same places every time.
STEP_UNDER_A_MODE = """
opt.step()
with Within(edit) as mode:
    for _ in range(steps - 1):
        opt.step()
assert mode.calls > 0
"""
STEP_WITH_A_PROPERTY = """
class Hostile(Parameter):
    @property
    def grad(self):
        if armed:
            armed.clear()  # not within an edit
            try:
                edit()
            finally:
                armed.append(True)
        return self.__dict__.get("kept")

    @grad.setter
    def grad(self, value):
        self.kept = value

armed = []
params = [Hostile(p.detach()) for p in parameters(kind)]
even = params[::2]
opt = optimizer_of(params, **options)
opt.step()
armed.append(True)
for _ in range(steps - 1):
    opt.step()
armed.clear()
"""
WITHIN_KINDS = ("many of one element", "mixed")
WITHIN = pytest.mark.parametrize(
    "run",
    [STEP_UNDER_A_MODE, STEP_WITH_A_PROPERTY],
    ids=["a torch function mode", "a grad property"],
)


@WITHIN
@pytest.mark.parametrize("kind", WITHIN_KINDS)
@pytest.mark.parametrize("edit", KEEPING.values(), ids=KEEPING)
def test_edits_within_a_step_that_keep_all_values_change_nothing(edit, kind, run, succeeds):
    succeeds(script(edit, kind, 4, run, ALL))


@WITHIN
@pytest.mark.parametrize("edit", KEEPING.values(), ids=KEEPING)
def test_edits_within_a_step_change_nothing_under_the_reference_either(edit, run, succeeds):
    succeeds(script(edit, "mixed", 3, run, ALL, 'backend="reference"'))


@WITHIN
@pytest.mark.parametrize("kind", WITHIN_KINDS)
@pytest.mark.parametrize("edit", CHANGING.values(), ids=CHANGING)
def test_edits_within_a_step_change_no_other_parameter(edit, kind, run, succeeds):
    succeeds(script(edit, kind, 4, run, ODD))


@WITHIN
@pytest.mark.parametrize("kind", WITHIN_KINDS)
@pytest.mark.parametrize(
    "edit", [*SKIPPING.values(), *DROPPING.values()], ids=[*SKIPPING, *DROPPING]
)
def test_code_within_a_step_that_keeps_parameters_from_it_leaves_them_whole(
    edit, kind, run, succeeds
):
    succeeds(script(edit, kind, 4, run, COUNTED))


# All that an optimizer holds is deleted while it steps, and other tensors take the memory. The step
# may raise an error for what it misses.
DESTRUCTION = {
    "state": "opt.state.clear()",
    "dicts of the state": "[s.clear() for s in list(opt.state.values())]",
    "moments": "[s.pop('exp_avg', None) for s in list(opt.state.values())]",
    "parameters": "[g['params'].clear() for g in opt.param_groups]; params.clear(); even.clear()",
    "groups": "opt.param_groups.clear()",
    "everything": """
    opt.state.clear()
    [g.clear() for g in opt.param_groups]
    opt.param_groups.clear()
    params.clear()
    even.clear()
""",
}


@WITHIN
@pytest.mark.parametrize("kind", WITHIN_KINDS)
@pytest.mark.parametrize("edit", DESTRUCTION.values(), ids=DESTRUCTION)
def test_a_step_survives_the_deletion_of_all_that_it_uses(edit, kind, run, succeeds):
    edit = edit.strip() + "\n    junk.extend(torch.full((n,), nan) for n in (1, 3, 70))"
    run = "try:\n" + textwrap.indent(run, "    ") + "\nexcept (KeyError, ValueError):\n    pass"
    succeeds(script(edit, kind, 2, run, ""))


def test_parameters_step_once_though_the_state_goes_within_the_step(succeeds):
    succeeds(
        script("opt.state.clear()", "not on 16 bytes", 2, STEP_WITH_A_PROPERTY, "")
        + """
for p, want in zip(params, expected[-1], strict=True):
    assert torch.equal(p, want[0])
"""
    )


def test_a_mode_that_answers_nonsense_does_not_crash_a_step(succeeds):
    succeeds(
        PRELUDE
        + """
class Nonsense(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ == name:
            asked.add(name)
            return answer
        return func(*args, **(kwargs or {}))

asked, names = set(), ("__get__", "is_neg", "untyped_storage", "storage_offset")
answers = (None, 3, "text", torch.ones(2), torch.ones(1).untyped_storage())
for name, answer in product(names, answers):
    opt = optimizer_of(parameters("mixed"))
    opt.step()
    for p in opt.param_groups[0]["params"]:
        p.data = p.data.clone()
        for key in KEYS:
            opt.state[p][key] = opt.state[p][key].clone()
    try:
        with Nonsense():
            opt.step()
    except Exception as error:
        print(repr(error))
assert asked == set(names)
"""
    )


def test_a_learning_rate_that_is_replaced_while_it_is_read_is_kept_for_the_step(succeeds):
    succeeds(
        PRELUDE
        + """
class Hostile:
    def __float__(self):
        if armed:
            for group in opt.param_groups:
                group["lr"] = torch.tensor(0.01)
            junk.extend(torch.full((), nan) for _ in range(100))
        return 1e-8

armed, junk = [], []
params, same = parameters("many of one element"), parameters("many of one element")
opt = optimizer_of(params, capturable=True)
twin = optimizer_of(same, capturable=True)
for group in [*opt.param_groups, *twin.param_groups]:
    group["lr"] = torch.tensor(0.01)
for group in opt.param_groups:
    group["eps"] = Hostile()
armed.append(True)
for _ in range(8):
    opt.step()
    twin.step()
    for p, q in zip(params, same, strict=True):
        assert torch.equal(p, q)
"""
    )


def test_a_flag_that_deletes_itself_from_its_group_is_kept_for_the_step(succeeds):
    succeeds(
        PRELUDE
        + """
class Hostile:
    def __bool__(self):
        for group in opt.param_groups:
            group["maximize"] = group["capturable"] = False
        junk.append(object())
        return False

junk = []
params, same = parameters("mixed"), parameters("mixed")
opt, twin = optimizer_of(params), optimizer_of(same)
for _ in range(3):
    for group in opt.param_groups:
        group["maximize"] = group["capturable"] = Hostile()
    opt.step()
    twin.step()
    for p, q in zip(params, same, strict=True):
        assert torch.equal(p, q)
"""
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, "flatten=True") for kind in KINDS[:2]),  # the others are views
        *product(KINDS, ["", 'backend="reference"', "capturable=True"]),
    ],
)
def test_threads_that_step_one_optimizer_do_not_crash(kind, options, succeeds):
    """The step count is unspecified; in a first step, each thread may find half of the state."""
    succeeds(
        PRELUDE
        + f"""
params = parameters({kind!r})
opt = optimizer_of(params, {options})
sys.setswitchinterval(1e-5)

def work():
    for _ in range({5 if "reference" in options else 20}):
        try:
            opt.step()
        except (KeyError, ValueError) as error:
            print(repr(error))

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert all(torch.isfinite(p).all() for p in params)
"""
    )


def test_a_parameter_made_within_a_step_does_not_get_the_state_of_a_freed_one(succeeds):
    """Python gives the new object the address of the old."""
    succeeds(
        PRELUDE
        + """
class Hostile(Parameter):
    @property
    def grad(self):
        if armed:
            armed.clear()
            old = params.pop()
            address = id(old)
            del opt.state[old], old
            made = []
            while not made or (id(made[-1]) != address and len(made) < 1000):
                made.append(Parameter(torch.ones(1)))
            made[-1].grad = torch.ones(1)
            params.append(made[-1])
        return torch.ones(1)

armed = []
opt = RAdam([Hostile(torch.ones(1)), Parameter(torch.ones(1))], lr=0.1)
params = opt.param_groups[0]["params"]
params[1].grad = torch.ones(1)
opt.step()
armed.append(True)
opt.step()
assert (params[1] != 1) == (params[1] in opt.state)
opt.step()
assert opt.state[params[1]]["step"] <= 2
"""
    )


# Each of these runs in a process of its own, where freed memory is overwritten: a fault here is a
# crash, or a use of memory that was freed.
HOSTILE = {
    "a gradient that clears the state": """
class Hostile(torch.nn.Parameter):
    @property
    def grad(self):
        if armed and not done:
            done.append(True)
            optimizer.state.clear()
        return torch.ones(10)

armed, done = False, []
optimizer = RAdam([Hostile(torch.zeros(10)) for _ in range(3)])
optimizer.step()
armed = True
optimizer.step()
assert all(s["step"] == 1 for s in optimizer.state.values())
""",
    "a learning rate that removes its group": """
class Hostile:
    def __float__(self):
        if len(optimizer.param_groups) > 1:
            optimizer.param_groups.pop()
        return 0.01

params = [torch.nn.Parameter(torch.zeros(10)) for _ in range(2)]
for p in params:
    p.grad = torch.ones(10)
optimizer = RAdam([{"params": params[:1]}, {"params": params[1:]}])
optimizer.step()
optimizer.param_groups[1]["lr"] = Hostile()
optimizer.step()
assert len(optimizer.param_groups) == 1
assert optimizer.state[params[1]]["step"] == 2
""",
    "a hook that steps the optimizer that is stepping": """
class Hostile(torch.nn.Parameter):
    def __hash__(self):
        if armed and not done:
            done.append(True)
            optimizer.step()
        return id(self)

armed, done = False, []
params = [Hostile(torch.zeros(10)), torch.nn.Parameter(torch.zeros(10))]
for p in params:
    p.grad = torch.ones(10)
optimizer = RAdam(params)
optimizer.step()
optimizer.state[object()] = {}
armed = True
optimizer.step()
assert torch.isfinite(params[0]).all()
""",
    "threads that step one optimizer": """
import sys, threading
sys.setswitchinterval(1e-6)
params = [torch.nn.Parameter(torch.zeros(20_000)) for _ in range(20)]
for p in params:
    p.grad = torch.ones(20_000)
optimizer = RAdam(params)

def work():
    for i in range(30):
        try:
            optimizer.step()
        except (KeyError, ValueError):  # a state that another thread cleared half-way
            pass
        if i % 3 == 0:
            optimizer.state.clear()

threads = [threading.Thread(target=work) for _ in range(4)]
for t in threads:
    t.start()
for t in threads:
    t.join()
""",
}


@pytest.mark.parametrize("script", HOSTILE.values(), ids=HOSTILE)
def test_no_code_that_runs_within_a_step_can_crash_it(script, succeeds):
    succeeds("import torch\nfrom radam_kernels import RAdam\n" + script)
