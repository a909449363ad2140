"""The recurrence where one program keeps all of W_hh on chip (small H).

    forward      h_t = f(z_t + W h_{t-1})                           f = tanh or relu
    backward     g_t = e_t + r_t,  r_t = Wᵀ δ_{t+1}                 e_t = ∂L/∂y_t, g_t = ∂L/∂h_t
                 δ_t = clamp(g_t, ±clip) ⊙ f'(h_t),  ∂L/∂h_0 = Wᵀ δ_1
    statistics   ‖g_t‖², ‖r_t‖², ‖δ_t‖², ‖e_t‖² per step and sample, in float64, before the clamp

A program owns BATCH samples and all HIDDEN >= H units, and walks the whole sequence; nothing crosses between programs.
States are columns: W (HIDDEN, HIDDEN) times h (HIDDEN, BATCH), so that the tensor cores' 16-row side lies on the hidden
units and as few as 8 samples fill a tile. W stays in shared memory or registers, h and r in registers; the next
step's inputs are loaded while this step's product runs.

Time: visit v = 0, 1, … looks at step t = start + v·walk. Step t has n_t samples: B, or rows[0, t] where PACKED. A
sample that has no step t keeps what it holds: its initial value before its sequence begins, its final one after it.
Rows and columns of padding hold zeros in every product, as 0 · inf would spread.
"""

import triton
import triton.language as tl

from rnnkern.kernels.cell import activation, clamp, dot, squares, times_derivative


@triton.jit
def step(t, rows, T, B, stride_t, stride_b, PACKED: tl.constexpr):
    """n_t, and where the rows of step t begin."""
    if PACKED:
        return tl.load(rows + t), tl.load(rows + T + t) * stride_b
    else:
        return B.to(tl.int64), t.to(tl.int64) * stride_t


@triton.jit(do_not_specialize=["T", "B", "start", "walk", "rows"])
def forward(
    z,  # (T, B, H), or (N, H) where PACKED
    h0,  # (B, H)
    w_hh,  # (H, H)
    h,  # like z; it may be z
    rows,  # (2, T) int64: n_t, and the rows before step t; only where PACKED
    T, B, start, walk,
    z_t, z_b, h0_b, w_j, w_k, h_t, h_b,  # strides; the hidden units of a row lie side by side
    H: tl.constexpr, HIDDEN: tl.constexpr, BATCH: tl.constexpr,
    NONLINEARITY: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    storage: tl.constexpr = z.dtype.element_ty
    unit = tl.arange(0, HIDDEN)
    j = unit[:, None]
    sample = (tl.program_id(0) * BATCH + tl.arange(0, BATCH)).to(tl.int64)
    b = sample[None, :]
    is_unit = j < H
    w = tl.load(w_hh + j * w_j + unit[None, :] * w_k, mask=is_unit & (unit[None, :] < H), other=0)
    state = tl.load(h0 + b * h0_b + j, mask=is_unit & (b < B), other=0)

    n, at = step(start, rows, T, B, z_t, z_b, PACKED)
    z_next = tl.load(z + at + b * z_b + j, mask=is_unit & (b < n), other=0)
    for visit in range(T):
        t = start + visit * walk
        n, at = step(t, rows, T, B, h_t, h_b, PACKED)
        z_now = z_next.to(tl.float32)
        if visit + 1 < T:
            n_next, at_next = step(t + walk, rows, T, B, z_t, z_b, PACKED)
            z_next = tl.load(z + at_next + b * z_b + j, mask=is_unit & (b < n_next), other=0)
        product = dot(w, state, PRECISION)
        h_now = activation(z_now + tl.where(is_unit, product, 0), NONLINEARITY).to(storage)
        state = tl.where(b < n, h_now, state)
        tl.store(h + at + b * h_b + j, h_now, mask=is_unit & (b < n))


@triton.jit(do_not_specialize=["T", "B", "start", "walk", "rows"])
def backward(
    grad_h,  # like h
    grad_hn,  # (B, H); only where HAS_GRAD_HN
    h,  # (T, B, H), or (N, H) where PACKED
    w_hh,  # (H, H)
    delta,  # like h, contiguous
    grad_h0,  # (B, H), contiguous
    stats,  # (T, B, 4) float64, zeros: ‖g‖², ‖r‖², ‖δ‖², ‖e‖²; only where STATS
    rows,  # as above
    T, B, start, walk, clip,
    e_t, e_b, grad_hn_b, h_t, h_b, w_j, w_k,  # strides
    H: tl.constexpr, HIDDEN: tl.constexpr, BATCH: tl.constexpr,
    NONLINEARITY: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    HAS_GRAD_HN: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    storage: tl.constexpr = h.dtype.element_ty
    unit = tl.arange(0, HIDDEN)
    j = unit[:, None]
    sample = (tl.program_id(0) * BATCH + tl.arange(0, BATCH)).to(tl.int64)
    b = sample[None, :]
    is_unit = j < H
    wt = tl.load(w_hh + j * w_k + unit[None, :] * w_j, mask=is_unit & (unit[None, :] < H), other=0)  # Wᵀ
    r = tl.zeros((HIDDEN, BATCH), tl.float32)
    if HAS_GRAD_HN:
        r = tl.load(grad_hn + b * grad_hn_b + j, mask=is_unit & (b < B), other=0).to(tl.float32)

    n, at = step(start, rows, T, B, e_t, e_b, PACKED)
    e_next = tl.load(grad_h + at + b * e_b + j, mask=is_unit & (b < n), other=0)
    n, at = step(start, rows, T, B, h_t, h_b, PACKED)
    h_next = tl.load(h + at + b * h_b + j, mask=is_unit & (b < n), other=0)
    for visit in range(T):
        t = start + visit * walk
        n, at = step(t, rows, T, B, B.to(tl.int64) * H, H, PACKED)
        e_now, h_now = e_next.to(tl.float32), h_next.to(tl.float32)
        if visit + 1 < T:
            n_next, at_next = step(t + walk, rows, T, B, e_t, e_b, PACKED)
            e_next = tl.load(grad_h + at_next + b * e_b + j, mask=is_unit & (b < n_next), other=0)
            n_next, at_next = step(t + walk, rows, T, B, h_t, h_b, PACKED)
            h_next = tl.load(h + at_next + b * h_b + j, mask=is_unit & (b < n_next), other=0)
        g = e_now + r
        d = times_derivative(clamp(g, clip), h_now, NONLINEARITY)
        d_stored = d.to(storage)
        product = dot(wt, d_stored, PRECISION)
        tl.store(delta + at + b * H + j, d_stored, mask=is_unit & (b < n))
        if STATS:
            out = stats + (t.to(tl.int64) * B + sample[:, None]) * 4 + tl.arange(0, 4)[None, :]
            tl.store(out, squares(g, r, d, e_now), mask=sample[:, None] < n)
        r = tl.where(is_unit, tl.where(b < n, product, r), 0)
    tl.store(grad_h0 + b * H + j, r.to(storage), mask=is_unit & (b < B))
