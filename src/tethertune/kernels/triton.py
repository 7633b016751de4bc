r"""The step on a CUDA device: one launch brings every row of every layer into its ball, without a look from the host.

The only module that imports Triton, which PyTorch brings where it is built for CUDA; import it where it is needed.

A :class:`Table` on the device says where the weights, centres and radii of all layers are and which program takes
which rows. It is built once; the radii are read at each launch, so a schedule writes to their tensors and nothing is
compiled or built again. What is compiled depends on the dtypes of weights and centre alone: a model whose layers have
them alike needs one launch, and each further pair of dtypes one more.

**MARS** (one launch). Rows of up to 32 and up to 256 weights are taken 8 and 2 at a time, longer ones one a program,
in a loop over 1024 columns, 16 bytes a thread at once (512 where rows do not start at multiples of that). What happens
to a row is what :mod:`tethertune.kernels.chunked` does:

1. *Measure* in float32 lanes of at most 128 additions, added up in float64: a relative error of at most
   :math:`2^{-16}`. A row that is inside by more is done, and not written.
2. *Scale* float32 rows that are outside by more to :math:`1 - 2^{-15}` of the radius, and measure what is stored on the
   way. A row that has come inside by more than the error is done.
3. *Settle* what is left in float64: rows within the error of their radius, 16-bit weights, radii near the rounding of
   the weights. The sum over earlier tiles and a prefix sum inside a tile say which weights come before a row fits,
   and these move one unit towards the centre (:mod:`tethertune.kernels.rounding`). Rows that are not finite end here:
   they are left as they are and counted.

**Frobenius** (two launches). No weight of a layer may be written before all of it is measured, and programs that wait
for one another need to run all at the same time, which a launch of thousands does not. So one launch measures the
squares of each chunk of a layer, in float64, the other adds them up, leaves a layer that is inside, and scales and
settles each chunk within its own share of the ball as above. Squares in float32 would leave layers near their radius
open and need a third launch for these; float64 costs no time while the memory is slower than four of its operations a
weight, as on data-centre devices.

Bytes a weight of b bytes around a centre of a bytes: inside a + b; outside a + 2b while what a program has read stays
in the cache (MARS: the rows under way; a Frobenius layer is read a second time: 2a + 3b). A float32 layer: 8, 12 and
20, against 28 of a fused Adam step; bfloat16: 4, 6, 10 against 14.
"""

# Triton's language is not Python's to a type checker: the functions it compiles have no annotations.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False
# ruff: noqa: ANN001, ANN202, PLR1714, SIM300

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from tethertune.kernels import rounding
from tethertune.kernels.stretches import Stretches

__all__ = [
    "Table",
    "frobenius",
    "frobenius_table",
    "mars",
    "mars_table",
    "scale",
    "squares",
    "supports",
]

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_FIELDS = 8  # of a block: addresses of weights, centre and radius, rows, columns, steps of weights and centre, shape
_NARROW, _MEDIUM, _WIDE, _ALIGNED = range(4)
_CHUNK = 1 << 15  # weights of a Frobenius layer that a program takes at least
_MOST_CHUNKS = 1 << 10

AIM = tl.constexpr(2.0**-15)  # the share of the radius by which scaling in float32 aims inside
ERROR = tl.constexpr(2.0**-16)  # the largest relative error of a sum measured in float32
MARGIN = tl.constexpr(rounding.MARGIN)
SMALLEST = tl.constexpr(1e-15)  # a distance whose square float32 still holds, and a scale that loses no digits
FIELDS = tl.constexpr(_FIELDS)
FLUSH = tl.constexpr(128)  # additions in float32 before the sum goes on in float64
# Rows a program takes: few enough that it needs about 72 registers a thread, so that seven run on a processor at once
ROWS_NARROW, ROWS_MEDIUM, ROWS_WIDE = tl.constexpr(8), tl.constexpr(2), tl.constexpr(1)


# ------------------------------------------------------------------------------------------------- tiles of stored rows
# `rows` is a tuple: pointers to where the rows of weights and of their centres start, (R, 1) each, and the number of
# columns of both: 0 of a centre that is 0. `here` says which of the R rows count.


@triton.jit
def _rows(block, number, columns, WEIGHT: tl.constexpr, CENTRE: tl.constexpr, ALIGNED: tl.constexpr):
    w, c = tl.load(block), tl.load(block + 1)
    w_step, c_step = tl.load(block + 5), tl.load(block + 6)
    columns = columns.to(tl.int32)
    centred = tl.where(c == 0, 0, columns)
    # bfloat16 is the upper half of a float32, and handled in integers
    w = w.to(tl.pointer_type(tl.int16 if WEIGHT == tl.bfloat16 else WEIGHT))
    c = c.to(tl.pointer_type(tl.int16 if CENTRE == tl.bfloat16 else CENTRE))
    if ALIGNED:
        w, c = tl.multiple_of(w, 16), tl.multiple_of(c, 16)
        columns, centred = tl.multiple_of(columns, 8), tl.multiple_of(centred, 8)
        w_step, c_step = tl.multiple_of(w_step, 8), tl.multiple_of(c_step, 8)
    return w + (number * w_step)[:, None], c + (number * c_step)[:, None], columns, centred


@triton.jit
def _widen(x, DTYPE: tl.constexpr):
    """Stored numbers to float32, which holds them all."""
    if DTYPE == tl.bfloat16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _narrow(x, DTYPE: tl.constexpr):
    """Finite float32 numbers to the nearest stored ones."""
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    else:
        x = x.to(DTYPE)
    return x


@triton.jit
def _nearest(x, DTYPE: tl.constexpr):
    """Numbers to the nearest that ``DTYPE`` holds, in float32; of two roundings, so one of the two next to them."""
    return _widen(_narrow(x.to(tl.float32), DTYPE), DTYPE)


@triton.jit
def _load(rows, here, start, WEIGHT: tl.constexpr, CENTRE: tl.constexpr, C: tl.constexpr):
    """A tile of weights and of centres in float32, the pointers to the weights, and which of it is inside the rows."""
    cols = start + tl.arange(0, C)[None, :]
    here = here[:, None]
    mask = here & (cols < rows[2])
    w = tl.load(rows[0] + cols, mask=mask, other=0)
    c = tl.load(rows[1] + cols, mask=here & (cols < rows[3]), other=0)
    return _widen(w, WEIGHT), _widen(c, CENTRE), rows[0] + cols, mask


@triton.jit
def _step(w, c, DTYPE: tl.constexpr):
    """The stored number next to w on the side of the centre; see :func:`tethertune.kernels.rounding.step_towards`."""
    direction = (c > w).to(tl.int32) - (c < w).to(tl.int32)
    if DTYPE == tl.float16:
        lowest = -(2**15)
        bits = w.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    else:
        lowest = -(2**31)
        bits = w.to(tl.int32, bitcast=True)
        direction *= 1 if DTYPE == tl.float32 else 65536
    ordered = tl.where(bits < 0, lowest - bits, bits) + direction
    bits = tl.where(ordered < 0, lowest - ordered, ordered)
    if DTYPE == tl.float16:
        w = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        w = bits.to(tl.float32, bitcast=True)
    return w


# -------------------------------------------------------------------------------------------------- sums and rounding


@triton.jit
def _any(x):
    return tl.max(x.to(tl.int32), axis=0) > 0


@triton.jit
def _size(t, POWER: tl.constexpr):
    return tl.abs(t) if POWER == 1 else t * t


@triton.jit
def _root(x, POWER: tl.constexpr):
    return x if POWER == 1 else tl.sqrt(x)


@triton.jit
def _scaled(w, c, ratio, WEIGHT: tl.constexpr, DTYPE: tl.constexpr):
    """``c + ratio (w - c)`` in ``DTYPE``, rounded to what is stored. The fma is spelt out to be the same each time."""
    t = w.to(DTYPE) - c.to(DTYPE)
    return _nearest(tl.fma(t, tl.broadcast_to(ratio[:, None], t.shape), c.to(DTYPE)), WEIGHT)


@triton.jit
def _sum(
    rows, here, ratio,
    WEIGHT: tl.constexpr, CENTRE: tl.constexpr, POWER: tl.constexpr, DTYPE: tl.constexpr,
    SCALED: tl.constexpr, STORED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The sum of ``|w - c| ** POWER`` of each row as it is, or as it is when scaled, in lanes of ``DTYPE``."""
    total = tl.zeros([R], tl.float64)
    for part in range(0, rows[2], FLUSH * C):
        lanes = tl.zeros([R, C], DTYPE)
        for start in range(part, tl.minimum(part + FLUSH * C, rows[2]), C):
            w, c, target, mask = _load(rows, here, start, WEIGHT, CENTRE, C)
            if SCALED:
                w = _scaled(w, c, ratio, WEIGHT, DTYPE)
            if STORED:
                tl.store(target, _narrow(w, WEIGHT), mask=mask)
            lanes += _size(w.to(DTYPE) - c.to(DTYPE), POWER)
        if C > 256:
            total += tl.sum(lanes.to(tl.float64), axis=1)
        else:  # so few that their sum is within the error in any order
            total += tl.sum(lanes, axis=1).to(tl.float64)
    return total


@triton.jit
def _move(w, closer, c, gained, excess, POWER: tl.constexpr):
    """Closer weights, first to last, until their gain makes up for the excess; and what is gained so far."""
    c = c.to(tl.float64)
    gain = tl.maximum(_size(w.to(tl.float64) - c, POWER) - _size(closer.to(tl.float64) - c, POWER), 0.0)
    before = gained[:, None] + tl.cumsum(gain, axis=1) - gain
    return tl.where((before < excess[:, None]) & (gain > 0), closer, w), gained + tl.sum(gain, axis=1)


@triton.jit
def _settle(
    rows, here, ratio, budget,
    WEIGHT: tl.constexpr, CENTRE: tl.constexpr, POWER: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Store the scaled rows, rounded so that the sum of each is within its budget."""
    excess = _sum(rows, here, ratio, WEIGHT, CENTRE, POWER, tl.float64, True, False, R, C) - budget
    gained = tl.zeros([R], tl.float64)
    left = -budget
    for start in range(0, rows[2], C):
        w, c, target, mask = _load(rows, here, start, WEIGHT, CENTRE, C)
        w = _scaled(w, c, ratio, WEIGHT, tl.float64)
        if _any(gained < excess):
            w, gained = _move(w, _step(w, c, WEIGHT), c, gained, excess, POWER)
        tl.store(target, _narrow(w, WEIGHT), mask=mask)
        left += tl.sum(_size(w.to(tl.float64) - c.to(tl.float64), POWER), axis=1)
    if WEIGHT != tl.float32 and WEIGHT != CENTRE:  # the centre may lie between stored numbers: on to the nearest
        here = here & (left > 0)
        if _any(here):
            tl.debug_barrier()  # the threads read what others have stored
            gained = tl.zeros([R], tl.float64)
            for start in range(0, rows[2], C):
                w, c, target, mask = _load(rows, here, start, WEIGHT, CENTRE, C)
                w, gained = _move(w, _nearest(c, WEIGHT), c, gained, left, POWER)
                tl.store(target, _narrow(w, WEIGHT), mask=mask)


@triton.jit
def _bring_inside(
    rows, outside, surely, total, aim, budget, limit,
    WEIGHT: tl.constexpr, CENTRE: tl.constexpr, POWER: tl.constexpr, EXACT: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Levels 2 and 3 for rows that may be outside; returns how many of them are not finite.

    ``total`` is the sum of each row (``EXACT``, or within the error of level 1), ``aim`` what it is scaled to,
    ``budget`` what it may be after rounding, ``limit`` what it may be already. Level 2 takes those ``surely`` outside.
    """
    if WEIGHT == tl.float32:
        ratio = _root(aim / total, POWER) * (1 - AIM)
        surely = surely & (ratio > SMALLEST)
        if _any(surely):
            nearer = ratio.to(tl.float32)
            reached = _sum(rows, surely, nearer, WEIGHT, CENTRE, POWER, tl.float32, True, True, R, C)
            outside = outside & ~(surely & (reached <= budget * (1 - ERROR)))
            tl.debug_barrier()  # the threads read what others have stored
    broken = tl.zeros([R], tl.int64)
    if _any(outside):
        if WEIGHT == tl.float32 or not EXACT:
            total = _sum(rows, outside, total, WEIGHT, CENTRE, POWER, tl.float64, False, False, R, C // 2)
        finite = total < float("inf")
        broken = (outside & ~finite).to(tl.int64)
        outside = outside & finite & (total > limit)
        if _any(outside):
            _settle(rows, outside, _root(aim / total, POWER), budget, WEIGHT, CENTRE, POWER, R, C // 2)
    return tl.sum(broken, axis=0)


# ---------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def _mars_tile(
    block, first, broken,
    WEIGHT: tl.constexpr, CENTRE: tl.constexpr, ALIGNED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The R rows of a block from the first on."""
    number = first + tl.arange(0, R)
    here = number < tl.load(block + 3)
    rows = _rows(block, number, tl.load(block + 4), WEIGHT, CENTRE, ALIGNED)
    radius = tl.load(tl.load(block + 2).to(tl.pointer_type(tl.float64)) + number, mask=here, other=0.0)
    total = _sum(rows, here, radius, WEIGHT, CENTRE, 1, tl.float32, False, False, R, C)
    outside = here & ~(total <= radius * (1 - ERROR))  # a NaN as well
    if _any(outside):
        surely = outside & (total > radius * (1 + ERROR))
        aim, budget = radius * (1 - 2 * MARGIN), radius * (1 - MARGIN)
        bad = _bring_inside(rows, outside, surely, total, aim, budget, radius, WEIGHT, CENTRE, 1, False, R, C)
        if bad > 0:
            tl.atomic_add(broken, bad)


@triton.jit
def _mars(jobs, blocks, broken, WEIGHT: tl.constexpr, CENTRE: tl.constexpr):
    job = jobs + 2 * tl.program_id(0).to(tl.int64)
    block = blocks + FIELDS * tl.load(job)
    first = tl.load(job + 1)
    shape = tl.load(block + 7)
    if shape == 0:
        _mars_tile(block, first, broken, WEIGHT, CENTRE, False, ROWS_NARROW, 32)
    elif shape == 1:
        _mars_tile(block, first, broken, WEIGHT, CENTRE, False, ROWS_MEDIUM, 256)
    elif shape == 2:
        _mars_tile(block, first, broken, WEIGHT, CENTRE, False, ROWS_WIDE, 512)
    else:
        _mars_tile(block, first, broken, WEIGHT, CENTRE, True, ROWS_WIDE, 1024)


@triton.jit
def _chunk(block, number, WEIGHT: tl.constexpr, CENTRE: tl.constexpr, ALIGNED: tl.constexpr):
    """A chunk of a layer as one row."""
    columns = tl.load(block + 4)
    columns = tl.minimum(tl.load(block + 3) - number * columns, columns)
    return _rows(block, number + tl.arange(0, 1), columns, WEIGHT, CENTRE, ALIGNED)


@triton.jit
def _measure_chunk(block, number, target, WEIGHT: tl.constexpr, CENTRE: tl.constexpr, ALIGNED: tl.constexpr):
    rows = _chunk(block, number, WEIGHT, CENTRE, ALIGNED)
    none = tl.zeros([1], tl.float64)
    here = none == 0
    square = _sum(rows, here, none, WEIGHT, CENTRE, 2, tl.float64, False, False, 1, 1024)
    tl.store(target, tl.sum(square, axis=0))
    if WEIGHT != tl.float32 and WEIGHT != CENTRE:  # scaled by 0: the stored numbers nearest to the centre
        floor = _sum(rows, here, none, WEIGHT, CENTRE, 2, tl.float64, True, False, 1, 1024)
        tl.store(target + 1, tl.sum(floor, axis=0))


@triton.jit(do_not_specialize=["most"])
def _measure(jobs, blocks, squares, most, WEIGHT: tl.constexpr, CENTRE: tl.constexpr):
    job = jobs + 2 * tl.program_id(0).to(tl.int64)
    layer, number = tl.load(job), tl.load(job + 1)
    block, target = blocks + FIELDS * layer, squares + 2 * (layer * most + number)
    if tl.load(block + 7) == 3:
        _measure_chunk(block, number, target, WEIGHT, CENTRE, True)
    else:
        _measure_chunk(block, number, target, WEIGHT, CENTRE, False)


@triton.jit
def _add_up(squares, count):
    """The sum of every second of so many numbers, in an order that depends on their count alone."""
    total = tl.zeros([256], tl.float64)
    for start in range(0, count, 256):
        number = start + tl.arange(0, 256)
        total += tl.load(squares + 2 * number, mask=number < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _scale_chunk(
    block, number, square, floor, shrink, WEIGHT: tl.constexpr, CENTRE: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    rows = _chunk(block, number, WEIGHT, CENTRE, ALIGNED)
    square = tl.zeros([1], tl.float64) + square
    aim = shrink * square
    here = square >= 0
    surely = aim > SMALLEST * SMALLEST
    # what is aimed at is MARGIN inside already; one more for the rounding of the scale itself
    _bring_inside(
        rows, here, surely, square, aim * (1 - MARGIN), aim + floor, aim + floor, WEIGHT, CENTRE, 2, True, 1, 1024
    )  # fmt: skip


@triton.jit(do_not_specialize=["most", "parts"])
def _scale(jobs, blocks, squares, most, totals, parts, broken, WEIGHT: tl.constexpr, CENTRE: tl.constexpr):
    job = jobs + 2 * tl.program_id(0).to(tl.int64)
    layer, number = tl.load(job), tl.load(job + 1)
    block, own = blocks + FIELDS * layer, squares + 2 * (layer * most + number)
    total = _add_up(totals + 2 * layer * parts, parts)
    floors = _add_up(totals + 2 * layer * parts + 1, parts)
    radius = tl.load(tl.load(block + 2).to(tl.pointer_type(tl.float64)))
    if total < float("inf"):
        if tl.sqrt(total) > radius:
            shrink = tl.maximum(radius * radius * (1 - MARGIN) - floors, 0.0) / total
            if tl.load(block + 7) == 3:
                _scale_chunk(block, number, tl.load(own), tl.load(own + 1), shrink, WEIGHT, CENTRE, True)
            else:
                _scale_chunk(block, number, tl.load(own), tl.load(own + 1), shrink, WEIGHT, CENTRE, False)
    elif number == 0:
        tl.atomic_add(broken, 1)


# ------------------------------------------------------------------------------------------------------------- the host


@dataclass(frozen=True, eq=False)
class Table:
    """Where the weights of a constraint are on one device, and which program takes which of them.

    Attributes:
        stretches: What it was built from, so that their memory stays.
        blocks: Addresses and shapes, int64, (stretches, 8).
        jobs: For each pair of dtypes, of weights and centre, the block and the first row (or number of the chunk) that
            each program takes, int64, (programs, 2).
        squares: Float64, (stretches, chunks, 2), Frobenius only: sum of squares and floor of each chunk of a layer.
    """

    stretches: tuple[Stretches, ...]
    blocks: Tensor
    jobs: dict[tuple[tl.dtype, tl.dtype], Tensor]
    squares: Tensor


def supports(rows: Stretches, *, by_row: bool) -> bool:
    """Whether these rows can be in a table; otherwise :mod:`tethertune.kernels.chunked` takes them.

    They must be float32, bfloat16 or float16, as their centre, which is on the same device. A Frobenius ball's layer
    must have no gaps between its rows.
    """
    every = [x for x in (rows.weight, rows.centre) if x is not None]
    return all(x.dtype in _DTYPES and x.device == rows.weight.device for x in every) and (
        by_row or all(x.is_contiguous() for x in every)
    )


def mars_table(stretches: Sequence[Stretches]) -> Table:
    """A table for :func:`mars`: each row has a ball of its own."""
    blocks, programs, steps = [], [], []
    for rows in stretches:
        count, columns = rows.weight.shape
        shape = _NARROW if columns <= 32 else _MEDIUM if columns <= 256 else _ALIGNED if _is_aligned(rows) else _WIDE
        centre_step = 0 if rows.centre is None else rows.centre.stride(0)
        blocks.append([*_addresses(rows), count, columns, rows.weight.stride(0), centre_step, shape])
        steps.append((ROWS_NARROW, ROWS_MEDIUM, ROWS_WIDE, ROWS_WIDE)[shape].value)
        programs.append(-(-count // steps[-1]) if columns else 0)
    return _table(stretches, blocks, programs, steps, most=0)


def frobenius_table(stretches: Sequence[Stretches]) -> Table:
    """A table for :func:`frobenius`: each of the stretches is a layer, without gaps between its rows."""
    blocks, programs = [], []
    for rows in stretches:
        count = rows.weight.numel()
        chunk = -(-max(_CHUNK, -(-count // _MOST_CHUNKS)) // 1024) * 1024
        shape = _ALIGNED if count % 8 == 0 and _is_aligned(rows, flat=True) else _WIDE
        blocks.append([*_addresses(rows), count, chunk, chunk, chunk, shape])
        programs.append(-(-count // chunk))
    return _table(stretches, blocks, programs, [1] * len(blocks), most=max(programs, default=0))


def _addresses(rows: Stretches) -> tuple[int, int, int]:
    return rows.weight.data_ptr(), 0 if rows.centre is None else rows.centre.data_ptr(), rows.radius.data_ptr()


def _is_aligned(rows: Stretches, *, flat: bool = False) -> bool:
    """Whether every row can be read eight weights at a time."""
    every = [x for x in (rows.weight, rows.centre) if x is not None]
    columns = rows.weight.numel() if flat else rows.weight.shape[1]
    steps = [] if flat else [x.stride(0) for x in every]
    return all(n % 8 == 0 for n in (columns, *steps)) and all(x.data_ptr() % 16 == 0 for x in every)


def _table(
    stretches: Sequence[Stretches], blocks: list[list[int]], programs: list[int], steps: list[int], *, most: int
) -> Table:
    """Bring it to the device."""
    device = stretches[0].weight.device
    jobs: dict[tuple[tl.dtype, tl.dtype], list[Tensor]] = {}
    for number, (rows, count, step) in enumerate(zip(stretches, programs, steps, strict=True)):
        if count:
            centre = rows.weight if rows.centre is None else rows.centre
            pair = _DTYPES[rows.weight.dtype], _DTYPES[centre.dtype]
            first = torch.arange(count, dtype=torch.int64) * step
            jobs.setdefault(pair, []).append(torch.stack([torch.full_like(first, number), first], dim=1))
    return Table(
        tuple(stretches),
        torch.tensor(blocks, dtype=torch.int64).to(device),
        {pair: torch.cat(parts).to(device) for pair, parts in jobs.items()},
        torch.zeros(len(blocks), most, 2, dtype=torch.float64, device=device),
    )


def mars(table: Table, broken: Tensor) -> None:
    """Bring every row of every weight in the table into its l1 ball; what is inside keeps its bits.

    Args:
        table: From :func:`mars_table`.
        broken: Int64, one element, on the device: the number of rows that are not finite is added to it.
    """
    _launch(_mars, table, broken)


def frobenius(table: Table, broken: Tensor) -> None:
    """Bring every layer in the table into its Frobenius ball; what is inside keeps its bits.

    Args:
        table: From :func:`frobenius_table`.
        broken: Int64, one element, on the device: the number of layers that are not finite is added to it.
    """
    scale(table, squares(table), broken)


def squares(table: Table) -> Tensor:
    """Measure every layer in the table: ``table.squares``, now filled.

    Where layers are sharded, its sum over the chunks, ``squares(table).sum(dim=1)``, is what is to be added up over
    the ranks for :func:`scale`.
    """
    _launch(_measure, table, table.squares, table.squares.shape[1])
    return table.squares


def scale(table: Table, totals: Tensor, broken: Tensor) -> None:
    """Bring layers into their Frobenius balls that have been measured by :func:`squares`.

    Args:
        table: From :func:`frobenius_table`.
        totals: Float64, contiguous, (layers, parts, 2): what is summed over the parts is the sum of squares and the
            floor of each layer, on all ranks together. Every chunk then stays within its own share.
        broken: Int64, one element, on the device: the number of layers that are not finite is added to it.
    """
    _launch(_scale, table, table.squares, table.squares.shape[1], totals, totals.shape[1], broken)


def _launch(kernel: Any, table: Table, *arguments: Tensor | int) -> None:
    with torch.cuda.device_of(table.blocks):
        for (weight, centre), jobs in table.jobs.items():
            kernel[(len(jobs),)](jobs, table.blocks, *arguments, WEIGHT=weight, CENTRE=centre, enable_fp_fusion=True)
