"""The tables that GPU kernels read: which block steps what, and when they are uploaded again."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from radam_kernels import RAdam
from radam_kernels.backends import upload
from radam_kernels.modules import cpu
from radam_kernels.scaling import UNSCALED


class Segments:
    """A plan of _cpu, refreshed for each step as an optimizer does it."""

    def __init__(self) -> None:
        self.plan = cpu.Plan()
        self.uploads: list[bytes] = []

    def upload(self, rows: bytes) -> torch.Tensor:
        self.uploads.append(rows)
        return upload.upload_pinned(torch.device("cpu"))(rows)

    def fill(self, segments, steps=None, **options):
        state = {}
        for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(segments):
            param.grad = grad
            step = torch.tensor(steps[i] - 1.0 if steps else 0.0)
            state[param] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        [group] = RAdam(list(state), **options).param_groups
        assert self.plan.refresh([group], state, {}, UNSCALED) == []
        [bucket] = self.plan.buckets
        return bucket

    def tables(self, segments, steps=None, chunk=64, stream=0, keep=True):
        """The tables, and of them segments, grads and work."""
        bucket = self.fill(segments, steps)
        tables = upload.tables_of(bucket, stream, self.upload, keep=keep)
        segment_rows, grads, low_memory, work = tables.segments(bucket, chunk)
        assert low_memory is None
        return tables, segment_rows, grads, work


def streams(n: int):
    return tuple(torch.zeros(n) for _ in range(4))


def test_rows_of_segments_hold_what_their_fields_say():
    segments = [streams(5), streams(0), streams(70)]
    _, rows, grads, _ = Segments().tables(segments, steps=[3, 3, 4])
    rows = rows.view(-1, len(cpu.segment_fields))
    assert len(rows) == len(grads) == len(segments)
    for row, address, tensors, scalars in zip(
        rows.tolist(), grads.tolist(), segments, (0, 0, 1), strict=True
    ):
        fields = dict(zip(cpu.segment_fields, row, strict=True))
        param, grad, exp_avg, exp_avg_sq = tensors
        if param.numel():
            assert fields["param"] == param.data_ptr()
            assert fields["exp_avg"] == exp_avg.data_ptr()
            assert fields["exp_avg_sq"] == exp_avg_sq.data_ptr()
            assert address == grad.data_ptr()
        assert fields["numel"] == param.numel()
        assert fields["scalars"] == scalars


def blocks_of(numels, chunk):
    """What the kernels make of a plan: (segment, chunk) of every block."""
    numels = np.array(numels)
    total, run, rows = upload.plan(numels, chunk)
    assert rows.dtype == np.int32
    for block in range(total):
        segment, i = rows[block >> run]
        i += block & ((1 << run) - 1)
        while i >= -(-numels[segment] // chunk):
            i -= -(-numels[segment] // chunk)
            segment += 1
        yield segment, i


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=20), st.sampled_from([1, 7, 64, 4096]))
@example([3] * 2000 + [0, 9000] + [1] * 700, 1)  # more blocks than rows
def test_the_work_covers_every_element_just_once(sizes, chunk):
    seen = [np.zeros(n, int) for n in sizes]
    for segment, i in blocks_of(sizes, chunk):
        part = seen[segment][i * chunk : (i + 1) * chunk]
        assert len(part), "a block without work"
        part += 1
    assert all((s == 1).all() for s in seen)


@pytest.mark.parametrize("numels", [[2**40], [64] * 10_000, [2**33, *[64] * 5000, 2**33]])
def test_the_table_of_work_stays_small(numels):
    total, run, rows = upload.plan(np.array(numels), 4096)
    assert total == sum(-(-n // 4096) for n in numels)
    assert len(rows) <= 4096
    assert len(rows) << run >= total


def test_nothing_is_uploaded_again_while_nothing_changes():
    source, segments = Segments(), [streams(5), streams(70)]
    source.tables(segments)
    before = len(source.uploads)
    source.tables(segments)
    source.tables(segments, steps=[2, 2])  # scalars are uploaded apart
    assert len(source.uploads) == before


def test_moved_gradients_upload_their_column_and_nothing_else():
    source, segments = Segments(), [streams(5), streams(70)]
    _, rows, first, work = source.tables(segments)
    before = first.clone()
    moved = [segments[0], (segments[1][0], torch.ones(70), *segments[1][2:])]
    uploads = len(source.uploads)
    _, same_rows, second, same_work = source.tables(moved)
    assert (same_rows is rows, same_work is work) == (True, True)
    assert [len(rows) for rows in source.uploads[uploads:]] == [2 * 8]
    assert second.tolist() == [moved[0][1].data_ptr(), moved[1][1].data_ptr()]
    # A launch that is still queued reads the old one.
    assert second.data_ptr() != first.data_ptr()
    assert torch.equal(first, before)


def test_new_pointers_or_step_counts_upload_the_segments_and_nothing_else():
    source, segments = Segments(), [streams(5), streams(70)]
    _, first, grads, work = source.tables(segments)
    rows = first.clone()
    moved = [segments[0], (*segments[1][:2], torch.ones(70), segments[1][3])]
    for change in (dict(segments=moved), dict(segments=moved, steps=[1, 2])):
        _, second, *same = source.tables(**change)
        assert all(a is b for a, b in zip(same, (grads, work), strict=True))
        assert not torch.equal(second, rows)
        # A launch that is still queued reads the old one.
        assert second.data_ptr() != first.data_ptr()
        assert torch.equal(first, rows)


def test_other_sizes_upload_the_work():
    source = Segments()
    *_, work = source.tables([streams(5), streams(70)])
    kept = work.clone()
    tables, *_, second = source.tables([streams(70), streams(5)])
    assert torch.equal(work, kept)
    assert second.view(torch.int32).tolist() == [0, 0, 0, 1, 1, 0]
    assert (tables.blocks, tables.run) == (3, 0)
    tables, *_, third = source.tables([streams(70), streams(5)], chunk=128)
    assert third.view(torch.int32).tolist() == [0, 0, 1, 0]
    assert tables.blocks == 2


def test_neither_streams_nor_captures_share_tables():
    source, segments = Segments(), [streams(5)]
    first, *_ = source.tables(segments, stream=1)
    second, *_ = source.tables(segments, stream=2)
    assert second is not first
    captured, *_ = source.tables(segments, stream=1, keep=False)
    assert captured is not first
    assert source.tables(segments, stream=1)[0] is first, "what a capture made is the graph's"


def test_tables_are_copies_of_what_the_host_goes_on_to_change():
    source, segments = Segments(), [streams(5)]
    _, first, grads, _ = source.tables(segments)
    before = first.clone(), grads.clone()
    source.fill([streams(9)] * 1, steps=[7])  # the vectors in C++ hold other rows now
    assert torch.equal(first, before[0])
    assert torch.equal(grads, before[1])

    scalars = source.fill(segments).scalar_rows
    assert source.fill(segments).scalar_rows == scalars
    assert source.fill(segments, lr=2.0).scalar_rows != scalars
