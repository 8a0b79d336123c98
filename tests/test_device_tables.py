"""The tables that GPU kernels read: which block steps what, and when they are uploaded again."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from radam_kernels import RAdam, flat
from radam_kernels.backends import device_tables
from radam_kernels.modules import cpu


class Segments:
    """A table of _cpu, filled anew for each step as an optimizer does it."""

    def __init__(self) -> None:
        self.table = cpu.Table()
        self.uploads: list[bytes] = []

    def upload(self, rows: bytes) -> torch.Tensor:
        self.uploads.append(rows)
        return device_tables.upload_pinned(torch.device("cpu"))(rows)

    def fill(self, segments, steps=None):
        self.table.release()
        for i, streams in enumerate(segments):
            self.table.add(*streams, float(steps[i] if steps else 1), 0, streams[0])
        [bucket] = self.table.buckets()
        return bucket

    def tables(self, segments, steps=None, chunk=64, stream=0, keep=True):
        bucket = self.fill(segments, steps)
        tables = device_tables.device_tables(bucket, self.table, stream, self.upload, keep=keep)
        rows = bucket.segment_rows
        return tables, tables.rows("segments", rows), tables.work(rows, chunk)


def streams(n: int):
    return tuple(torch.zeros(n) for _ in range(4))


def test_rows_of_segments_hold_what_their_fields_say():
    segments = [streams(5), streams(0), streams(70)]
    _, rows, _ = Segments().tables(segments, steps=[3, 3, 4])
    rows = rows.view(-1, len(flat.SEGMENT_FIELDS))
    for row, tensors, scalars in zip(rows.tolist(), segments, (0, 0, 1), strict=True):
        fields = dict(zip(flat.SEGMENT_FIELDS, row, strict=True))
        if tensors[0].numel():
            for name, tensor in zip(flat.SEGMENT_FIELDS, tensors, strict=False):
                assert fields[name] == tensor.data_ptr()
        assert fields["numel"] == tensors[0].numel()
        assert fields["scalars"] == scalars


def blocks_of(numels, chunk):
    """What the kernels make of a plan: (segment, chunk) of every block."""
    numels = np.array(numels)
    total, run, rows = device_tables.plan(numels, chunk)
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
    total, run, rows = device_tables.plan(np.array(numels), 4096)
    assert total == sum(-(-n // 4096) for n in numels)
    assert len(rows) <= 4096
    assert len(rows) << run >= total


def test_nothing_is_uploaded_again_while_nothing_changes():
    source, segments = Segments(), [streams(5), streams(70)]
    source.tables(segments)
    before = len(source.uploads)
    source.tables(segments)
    source.tables(segments, steps=[2, 2])  # scalars travel apart
    assert len(source.uploads) == before


def test_new_pointers_or_step_counts_renew_the_segments_and_nothing_else():
    source, segments = Segments(), [streams(5), streams(70)]
    _, first, work = source.tables(segments)
    rows = first.clone()
    moved = [segments[0], (segments[1][0], torch.ones(70), *segments[1][2:])]
    for change in (dict(segments=moved), dict(segments=moved, steps=[1, 2])):
        _, second, same = source.tables(**change)
        assert same is work
        assert not torch.equal(second, rows)
        # A launch that is still queued reads the old one.
        assert second.data_ptr() != first.data_ptr()
        assert torch.equal(first, rows)


def test_other_sizes_renew_the_work():
    source = Segments()
    _, _, work = source.tables([streams(5), streams(70)])
    kept = work.clone()
    tables, _, second = source.tables([streams(70), streams(5)])
    assert torch.equal(work, kept)
    assert second.view(torch.int32).tolist() == [0, 0, 0, 1, 1, 0]
    assert (tables.blocks, tables.run) == (3, 0)
    tables, _, third = source.tables([streams(70), streams(5)], chunk=128)
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
    _, first, _ = source.tables(segments)
    rows = first.clone()
    source.fill([streams(9)] * 1, steps=[7])  # the vector in C++ holds other rows now
    assert torch.equal(first, rows)

    [group] = RAdam([torch.zeros(1)]).param_groups
    scalars = source.table.scalar_rows([group])
    source.fill(segments)
    assert source.table.scalar_rows([{**group, "lr": 2.0}]) != scalars
