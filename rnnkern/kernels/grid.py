"""The recurrence where W_hh is spread over the programs of a grid (larger H), or a step at a time (any H).

    forward      h_t = f(z_t + W h_{t-1})                           f = tanh or relu
    backward     g_t = e_t + r_t,  r_t = Wᵀ δ_{t+1}                 e_t = ∂L/∂y_t, g_t = ∂L/∂h_t
                 δ_t = clamp(g_t, ±clip) ⊙ f'(h_t),  ∂L/∂h_0 = Wᵀ δ_1
    statistics   ‖g_t‖², ‖r_t‖², ‖δ_t‖², ‖e_t‖² per step and sample, in float64, before the clamp

Program (slice, group) owns HIDDEN hidden units, hence as many rows of W (columns in the backward), and of the batch
the tiles group, group + groups, …, BATCH samples each; it keeps its slice of W on chip where RESIDENT. Programs of one
group exchange what they compute through the output itself: a program stores its part of h_t (of δ_t), then adds 1 to
ready[tile] with release; before visit v it waits, with acquire, until all slices have added 1 for each visit before.
While one tile's counts are under way, a program that has several tiles works on the next.

The product's long side K = H is cut into WARPS parts, a warp each, whose sums are added at the end.

A launch makes the visits [first, last), all that were made before being complete. So one visit a launch needs no
waiting: that is the step path, and what an interpreter can run. More visits a launch need all programs resident, and
each wait ends after ``limit`` looks: the program then writes (1, visit, slice, tile) to ``error``, waits no more, and
fills what is left with NaN.

Visits, steps and padding are those of resident.py. A sample that begins at this visit takes h0 (grad_hn) in the place
of what the visit before computed; one that ended at the visit before leaves its r as ∂L/∂h_0. The backward therefore
makes T + 1 visits, the last of no step.
"""

import triton
import triton.language as tl

from rnnkern.kernels.cell import activation, clamp, dot, squares, times_derivative
from rnnkern.kernels.resident import step


@triton.jit
def wait(ready, target, limit, error, visit, tile):
    """Whether ready[tile] has reached the target within so many looks; what was released before is then visible."""
    seen = tl.atomic_add(ready + tile, 0, sem="acquire")
    looks = 0
    while (seen < target) & (looks < limit):
        seen = tl.atomic_add(ready + tile, 0, sem="acquire")
        looks += 1
    if seen < target:
        tl.store(error + 1, visit)
        tl.store(error + 2, tl.program_id(0))
        tl.store(error + 3, tile)
        tl.store(error, 1)
    return seen >= target


@triton.jit
def slice_of(w, j, k, w_j, w_k, H: tl.constexpr):
    """(WARPS, HIDDEN, DEPTH): the rows j (HIDDEN) of w, cut along its columns k (WARPS, DEPTH)."""
    j = j[None, :, None]
    k = k[:, None, :]
    return tl.load(w + j * w_j + k * w_k, mask=(j < H) & (k < H), other=0)


@triton.jit
def states_of(x, k, b, stride_b, H: tl.constexpr, here):
    """(WARPS, DEPTH, BATCH): the hidden units k (WARPS, DEPTH) of the samples b (BATCH), 0 where not here (BATCH)."""
    k = k[:, :, None]
    return tl.load(
        x + b[None, None, :] * stride_b + k, mask=(k < H) & here[None, None, :], other=0, cache_modifier=".cg"
    )


@triton.jit(do_not_specialize=["first", "last", "limit", "T", "B", "start", "walk", "rows", "ready", "error"])
def forward(
    z,  # (T, B, H), or (N, H) where PACKED
    h0,  # (B, H)
    w_hh,  # (H, H)
    h,  # like z; it may be z
    rows,  # (2, T) int64: n_t, and the rows before step t; only where PACKED
    ready,  # (tiles,) int32, zeros: slices that have finished, added up over the visits of this launch
    error,  # (4,) int32
    first, last, limit, T, B, start, walk,
    z_t, z_b, h0_b, w_j, w_k, h_t, h_b,  # strides; the hidden units of a row lie side by side
    H: tl.constexpr, HIDDEN: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr,
    RESIDENT: tl.constexpr, NONLINEARITY: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    storage: tl.constexpr = z.dtype.element_ty
    unit = tl.program_id(0) * HIDDEN + tl.arange(0, HIDDEN)
    j = unit[:, None]
    is_unit = j < H
    depth = tl.arange(0, WARPS)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    if RESIDENT:
        w = slice_of(w_hh, unit, depth, w_j, w_k, H)
    alive = True
    for visit in range(first, last):
        t = start + visit * walk
        n, z_at = step(t, rows, T, B, z_t, z_b, PACKED)
        n, h_at = step(t, rows, T, B, h_t, h_b, PACKED)
        n_before, before = n * 0, h_at
        if visit > 0:
            n_before, before = step(t - walk, rows, T, B, h_t, h_b, PACKED)
        for tile in range(tl.program_id(1), tl.cdiv(B, BATCH), tl.num_programs(1)):
            sample = (tile * BATCH + tl.arange(0, BATCH)).to(tl.int64)
            b = sample[None, :]
            z_now = tl.load(z + z_at + b * z_b + j, mask=is_unit & (b < n), other=0).to(tl.float32)
            if visit > first and alive:
                alive = wait(ready, (visit - first) * tl.num_programs(0), limit, error, visit, tile)
            a = tl.zeros((WARPS, HIDDEN, BATCH), tl.float32)
            for at in range(0, H, WARPS * DEPTH):
                k = at + depth
                if not RESIDENT:
                    w = slice_of(w_hh, unit, k, w_j, w_k, H)
                if PACKED:
                    lasts = sample < n_before
                    state = states_of(h + before, k, sample, h_b, H, lasts)
                    begins = states_of(h0, k, sample, h0_b, H, (sample < n) & ~lasts)
                    state = tl.where(lasts[None, None, :], state, begins)
                else:
                    begun = visit > 0
                    source, stride = tl.where(begun, h + before, h0), tl.where(begun, h_b, h0_b)
                    state = states_of(source, k, sample, stride, H, sample < n)
                a += dot(w, state, PRECISION)
            h_now = activation(z_now + tl.sum(a, 0), NONLINEARITY)
            h_now = tl.where(alive, h_now, float("nan")).to(storage)
            tl.store(h + h_at + b * h_b + j, h_now, mask=is_unit & (b < n))
            tl.debug_barrier()  # the other threads' stores, before this one's release
            tl.atomic_add(ready + tile, 1, sem="release")


@triton.jit(do_not_specialize=["first", "last", "limit", "T", "B", "start", "walk", "rows", "ready", "error"])
def backward(
    grad_h,  # like h
    grad_hn,  # (B, H); only where HAS_GRAD_HN
    h,  # (T, B, H), or (N, H) where PACKED
    w_hh,  # (H, H)
    delta,  # like h, contiguous
    grad_h0,  # (B, H), contiguous
    partial,  # (last - first, slices, B, 4) float64, zeros: each slice's share of stats; only where STATS
    rows, ready, error,  # as above
    first, last, limit, T, B, start, walk, clip,
    e_t, e_b, grad_hn_b, h_t, h_b, w_j, w_k,  # strides
    H: tl.constexpr, HIDDEN: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr,
    RESIDENT: tl.constexpr, NONLINEARITY: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    HAS_GRAD_HN: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    storage: tl.constexpr = h.dtype.element_ty
    unit = tl.program_id(0) * HIDDEN + tl.arange(0, HIDDEN)
    j = unit[:, None]
    is_unit = j < H
    depth = tl.arange(0, WARPS)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    if RESIDENT:
        wt = slice_of(w_hh, unit, depth, w_k, w_j, H)
    alive = True
    for visit in range(first, last):
        t = start + visit * walk
        none = B.to(tl.int64) * 0
        n, n_before, at, before = none, none, none, none
        if visit < T:
            n, at = step(t, rows, T, B, B.to(tl.int64) * H, H, PACKED)
        if visit > 0:
            n_before, before = step(t - walk, rows, T, B, B.to(tl.int64) * H, H, PACKED)
        e_at, h_at = at * 0, at * 0
        if visit < T:
            n, e_at = step(t, rows, T, B, e_t, e_b, PACKED)
            n, h_at = step(t, rows, T, B, h_t, h_b, PACKED)
        for tile in range(tl.program_id(1), tl.cdiv(B, BATCH), tl.num_programs(1)):
            sample = (tile * BATCH + tl.arange(0, BATCH)).to(tl.int64)
            b = sample[None, :]
            e_now = tl.load(grad_h + e_at + b * e_b + j, mask=is_unit & (b < n), other=0).to(tl.float32)
            h_now = tl.load(h + h_at + b * h_b + j, mask=is_unit & (b < n), other=0).to(tl.float32)
            if visit > first and alive:
                alive = wait(ready, (visit - first) * tl.num_programs(0), limit, error, visit, tile)
            r = tl.zeros((WARPS, HIDDEN, BATCH), tl.float32)
            for k_at in range(0, H, WARPS * DEPTH):
                k = k_at + depth
                if not RESIDENT:
                    wt = slice_of(w_hh, unit, k, w_k, w_j, H)
                d_before = states_of(delta + before, k, sample, H, H, sample < n_before)
                r += dot(wt, d_before, PRECISION)
            r = tl.where(is_unit, tl.where(alive, tl.sum(r, 0), float("nan")), 0)
            if HAS_GRAD_HN:
                begins = is_unit & (b >= n_before) & (b < n)
                r_n = tl.load(grad_hn + b * grad_hn_b + j, mask=begins, other=0).to(tl.float32)
                r = tl.where(b < n_before, r, r_n)
            else:  # a sample that begins here; 0 times what is not finite in W would be NaN
                r = tl.where(b < n_before, r, 0)
            g = e_now + r
            d = times_derivative(clamp(g, clip), h_now, NONLINEARITY)
            tl.store(delta + at + b * H + j, d.to(storage), mask=is_unit & (b < n))
            tl.debug_barrier()
            tl.atomic_add(ready + tile, 1, sem="release")
            tl.store(grad_h0 + b * H + j, r.to(storage), mask=is_unit & (b >= n) & (b < n_before))
            if STATS:
                mine = (visit - first).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
                out = partial + (mine * B + sample[:, None]) * 4 + tl.arange(0, 4)[None, :]
                tl.store(out, squares(g, r, d, e_now), mask=sample[:, None] < n)
