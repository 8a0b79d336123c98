"""Types of csrc/bind/bind_cuda.cpp, which documents what is here."""

fingerprint: str
architectures: str
inline_scalars: int

def chunk(param: int, grad: int, state: int) -> int: ...
def step(
    segments: int,
    grads: int,
    low_memory: int,
    work: int,
    run: int,
    blocks: int,
    param: int,
    grad: int,
    state: int,
    scalars: int,
    scalars_count: int,
    device_scalars: int,
    factor: int,
    device: int,
    stream: int,
) -> None: ...
def norm_chunk(dtype: int) -> int: ...
def power_sum(
    grads: int,
    work: int,
    run: int,
    blocks: int,
    dtype: int,
    norm_type: float,
    partials: int,
    sum: int,
    device: int,
    stream: int,
) -> None: ...
def advance(
    counters: int,
    count: int,
    groups: int,
    scalars: int,
    grad_scale: int,
    found_inf: int,
    device: int,
    stream: int,
) -> None: ...
def upload(to: int, rows: bytes, device: int, stream: int) -> None: ...
def why_not(device: int) -> str: ...
def runtime_version() -> int: ...
def driver_version() -> int: ...
