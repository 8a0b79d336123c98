"""Ctrl-C at any moment of a step: after it, either all of the step has happened or nothing has."""

import pytest

from radam_kernels import available_backends

PRELUDE = """
import os
import random
import signal
import struct
import sys
import threading
import time

import torch
from torch.nn import Parameter

from radam_kernels import RAdam, radam_
from radam_kernels.backends import reference

KEYS = ("step", "exp_avg", "exp_avg_sq")
signal.signal(signal.SIGINT, signal.default_int_handler)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(n):
    return [randn(n), randn(3, seed=1), randn(n // 2, seed=2)]


def mixed(n):
    return [randn(n).bfloat16(), randn(3, seed=1), randn(n, seed=2), randn(n // 2).double()]


def apart(n):
    return [randn(n, 2)[:, 0], randn(n, seed=1), randn(3, n // 3, 2)[:, :, 1]]


def make(tensors, options):
    \"\"\"An optimizer on copies of them, laid out as they are, and with gradients.\"\"\"
    params = []
    for i, tensor in enumerate(tensors):
        memory = torch.empty_strided((tensor.untyped_storage().size() // tensor.itemsize,), (1,),
                                     dtype=tensor.dtype)
        copy = memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        params.append(Parameter(copy.copy_(tensor)))
        params[-1].grad = randn(*tensor.shape, seed=100 + i).to(tensor.dtype)
    return RAdam(params, lr=0.01, **options)


def values(opt):
    \"\"\"(param, step, exp_avg, exp_avg_sq) of each parameter; None for what is not there.\"\"\"
    params = opt.param_groups[0]["params"]
    return [(p, *(opt.state.get(p, {}).get(key) for key in KEYS)) for p in params]


def same(opt, other):
    \"\"\"Of each parameter, which values two optimizers agree on.\"\"\"
    def agree(a, b):
        return a is b if a is None or b is None else torch.equal(a, b)
    pairs = zip(values(opt), values(other), strict=True)
    return [tuple(map(agree, a, b)) for a, b in pairs]


def all_same(opt, other):
    return all(map(all, same(opt, other)))


def check_whole(opt, before, after):
    \"\"\"Whether a step has happened; all of it, or nothing.\"\"\"
    if all_same(opt, after):
        return True
    assert all_same(opt, before), (
        f"half a step: of each parameter, ('param', *{KEYS}) are as before: {same(opt, before)}, "
        f"as after: {same(opt, after)}"
    )
    return False


class Sender:
    \"\"\"A process that sends this one SIGINT: the GIL does not decide when.\"\"\"

    def __init__(self):
        self.latest = 0.002
        read, self.pipe = os.pipe()
        target = os.getpid()
        if os.fork() == 0:
            os.close(self.pipe)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            while message := os.read(read, 8):
                time.sleep(*struct.unpack("d", message))
                os.kill(target, signal.SIGINT)
            os._exit(0)
        os.close(read)

    def interrupt(self, run):
        \"\"\"Whether a SIGINT, sent at a random time from now, ended `run`.

        Adapts to how long `run` takes, so that most do, also on a busy machine.
        \"\"\"
        within = True
        try:
            os.write(self.pipe, struct.pack("d", random.uniform(0, self.latest)))
            run()
            within = False
            while True:
                time.sleep(0.001)
        except KeyboardInterrupt:
            self.latest *= 1.06 if within else 0.93
            return within


random.seed(0)
"""

# What is stepped, and how; sizes for a millisecond or so, most of it within the writes.
KINDS = {
    "cpu": "plain(400_000), {}",
    "cpu, several dtypes": "mixed(200_000), {}",
    "cpu, capturable": "plain(400_000), dict(capturable=True)",
    "cpu, flat": "plain(400_000), dict(flatten=True)",
    "cpu, not dense": "apart(60_000), {}",
    "reference": "plain(60_000), dict(backend='reference')",
    "reference, several dtypes": "mixed(30_000), dict(backend='reference')",
    "reference, capturable": "plain(60_000), dict(backend='reference', capturable=True)",
    "reference, not dense": "apart(30_000), dict(backend='reference')",
    "triton, several dtypes": "mixed(1_000), dict(backend='triton')",
    "triton, capturable": "plain(1_000), dict(backend='triton', capturable=True)",
    "triton, not dense": "apart(1_000), dict(backend='triton')",
}

LATER_STEPS = """
opt, before, after = (make(tensors, options) for _ in range(3))
for one in (opt, before, after):
    one.step()
sender = Sender()
tries = within = inside = 0
while inside < wanted and tries < 200:
    tries += 1
    after.step()
    ended = sender.interrupt(opt.step)
    within += ended
    if check_whole(opt, before, after):
        inside += ended
    else:
        opt.step()
        assert all_same(opt, after), "the step after an interrupted one is wrong"
    before.step()
"""

FIRST_STEPS = """
before, after, then = (make(tensors, options) for _ in range(3))
for one in (after, then, then):
    one.step()
sender = Sender()
tries = within = inside = 0
while inside < wanted and tries < 200:
    tries += 1
    opt = make(tensors, options)
    ended = sender.interrupt(opt.step)
    within += ended
    if check_whole(opt, before, after):
        inside += ended
    else:
        assert not opt.state, "state without a step"
        opt.step()
        assert all_same(opt, after), "the step after an interrupted one is wrong"
    opt.step()
    assert all_same(opt, then), "the second step is wrong"
"""


FIRST = ("cpu", "cpu, not dense", "cpu, flat", "reference, several dtypes", "reference, capturable")


def interrupted(kind: str, steps: str) -> str:
    """A script that steps until so many signals have ended a step which had written."""
    if "triton" in kind and (reason := available_backends()["triton"]):
        pytest.skip(reason)
    return (
        PRELUDE
        + f"""
tensors, options = {KINDS[kind]}
wanted = {5 if "triton" in kind else 10}
{steps}
print(f"{{tries}} signals: {{within}} ended a step, {{inside}} after it wrote")
assert inside >= 3, "too few signals came within the writes to say anything"
"""
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_interrupted_has_happened_or_not(kind, succeeds):
    print(succeeds(interrupted(kind, LATER_STEPS)))


@pytest.mark.parametrize("kind", [*FIRST, "triton, several dtypes"])
def test_a_first_step_that_is_interrupted_leaves_state_if_it_has_happened(kind, succeeds):
    print(succeeds(interrupted(kind, FIRST_STEPS)))


# From here on the signal comes in the midst of the writes, each time: two parameters, and the
# reference sends it when it has written the first.
MIDST = """
update = reference.radam_update_


def update_and_interrupt(*arguments):
    update(*arguments)
    signal.raise_signal(signal.SIGINT)


def interrupt_after_each_write(on=True):
    reference.radam_update_ = update_and_interrupt if on else update


tensors, options = [randn(5), randn(7)], dict(backend="reference")
opt, before, after = (make(tensors, options) for _ in range(3))
for one in (opt, before, after):
    one.step()
after.step()
"""


def test_a_handler_of_the_users_is_called_once_after_the_step_and_stays(succeeds):
    succeeds(
        PRELUDE
        + MIDST
        + """
def handler(signum, frame):
    seen.append((signum, frame is not None, all_same(opt, after)))

seen = []
signal.signal(signal.SIGINT, handler)
interrupt_after_each_write()
opt.step()
assert seen == [(signal.SIGINT, True, True)], seen
assert signal.getsignal(signal.SIGINT) is handler
interrupt_after_each_write(False)
opt.step()
assert len(seen) == 1
assert signal.getsignal(signal.SIGINT) is handler
"""
    )


def test_keyboard_interrupt_comes_after_the_step_and_the_handler_stays(succeeds):
    succeeds(
        PRELUDE
        + MIDST
        + """
interrupt_after_each_write()
try:
    opt.step()
except KeyboardInterrupt:
    pass
else:
    raise AssertionError("the signal was lost")
assert all_same(opt, after)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
    )


def test_an_ignored_signal_stays_ignored(succeeds):
    succeeds(
        PRELUDE
        + MIDST
        + """
signal.signal(signal.SIGINT, signal.SIG_IGN)
interrupt_after_each_write()
opt.step()
assert all_same(opt, after)
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
signal.raise_signal(signal.SIGINT)
"""
    )


def test_a_process_that_the_signal_ends_has_stepped_before(succeeds):
    """Its memory is shared with another, which looks at it then."""
    succeeds(
        PRELUDE
        + MIDST
        + """
for tensors in values(opt):
    for tensor in tensors:
        tensor.data.share_memory_()
child = os.fork()
if child == 0:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    interrupt_after_each_write()
    opt.step()
    os._exit(0)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == -signal.SIGINT
assert all_same(opt, after)
"""
    )


def test_the_handler_is_restored_after_a_step_that_raises(succeeds):
    succeeds(
        PRELUDE
        + MIDST
        + """
def fail(*arguments):
    raise ArithmeticError

reference.radam_update_ = fail
try:
    opt.step()
except ArithmeticError:
    pass
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
    )


@pytest.mark.parametrize("kind", ["cpu, several dtypes", "cpu, not dense", "reference"])
def test_a_step_in_another_thread_goes_on(kind, succeeds):
    succeeds(
        PRELUDE
        + f"""
tensors, options = {KINDS[kind]}
opt, after = make(tensors, options), make(tensors, options)
after.step()
for _ in range(4):
    after.step()
errors = []

def work():
    try:
        for _ in range(5):
            opt.step()
    except BaseException as error:
        errors.append(error)

thread = threading.Thread(target=work)
thread.start()
interrupts = 0
while thread.is_alive():
    try:
        time.sleep(random.uniform(0, 0.001))
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        interrupts += 1
thread.join()
assert not errors, errors
assert interrupts > 0
assert all_same(opt, after)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_functional_step_is_whole_too(backend, succeeds):
    succeeds(
        PRELUDE
        + f"""
def tables():
    params = mixed({200_000 if backend == "cpu" else 30_000})
    grads = [randn(*p.shape, seed=9).to(p.dtype) for p in params]
    zeros = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
    return params, grads, zeros, [z.clone() for z in zeros]

def run(lists, step):
    radam_(*lists, step=step, lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, backend={backend!r})

def equal(a, b):
    return [torch.equal(x, y) for xs, ys in zip(a, b) for x, y in zip(xs, ys)]

lists, before, after = tables(), tables(), tables()
sender = Sender()
inside = step = 0
while inside < 10 and step < 200:
    step += 1
    run(after, step)
    ended = sender.interrupt(lambda: run(lists, step))
    if all(equal(lists, after)):
        inside += ended
    else:
        assert all(equal(lists, before)), (equal(lists, before), equal(lists, after))
        run(lists, step)
    run(before, step)
assert inside >= 3
"""
    )
