"""The cell's maths, shared by every Triton kernel: the twin of csrc/cell.h and csrc/cpu/tanh.inc.

A new cell is a branch in ``activation`` and ``times_derivative`` here, and in rnnkern/reference.py.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh of float32 to 2 ulp: odd, exact at 0, ±1 at ±inf, NaN stays NaN.

    With a = |x|, b = x clamped to ±1, s = -b², and Q(-a²) = a³ / (a - tanh a), a polynomial as good as none is short:

        tanh(x) = b + b · s / (Q(s) where a <= 1, else (1 + e^(2a)) / 2)

    The term added to b is at most a third of the result, so that its rounding errors count for little. The
    coefficients are those of csrc/cpu/tanh.inc (tools/fit_tanh.py).
    """
    a = tl.abs(x)
    b = tl.where(x > 1, 1.0, tl.where(x < -1, -1.0, x))
    s = 0 - b * b
    q = s * -0.00022790850198362023 - 0.005694628227502108
    q = s * q - 1.1999943256378174
    q = s * q + 3.000000476837158
    e = tl.exp2(2.8853900817779268 * a)
    return b + b * tl.div_rn(s, tl.where(a <= 1, q, 0.5 * e + 0.5))


@triton.jit
def activation(a, NONLINEARITY: tl.constexpr):
    """f(a)."""
    if NONLINEARITY == "tanh":
        return tanh(a)
    else:
        return tl.where(a < 0, 0.0, a)  # written so that NaN passes through, as it does in PyTorch


@triton.jit
def times_derivative(g, h, NONLINEARITY: tl.constexpr):
    """g ⊙ f'(h), with f' from the state h = f(a) alone."""
    if NONLINEARITY == "tanh":
        return g * (1 - h * h)
    else:
        return tl.where(h <= 0, 0.0, g)


@triton.jit
def clamp(g, limit):
    """g clamped to ±limit; NaN stays NaN."""
    return tl.where(g > limit, limit, tl.where(g < -limit, -limit, g))


@triton.jit
def tf32(x):
    """float32 rounded to the nearest TF32, where a tensor core would cut off; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b, summed in float32. PRECISION is Triton's word for float32 factors; "ieee" makes factors float32 first, as
    Triton's interpreter multiplies no bfloat16."""
    if PRECISION == "ieee":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(tf32(a), tf32(b), input_precision=PRECISION)
    else:
        return tl.dot(a, b)


@triton.jit
def squares(g, r, d, e):
    """(BATCH, 4): Σ g², Σ r², Σ d² and Σ e² for each column, in float64, as squares of small float32 gradients are
    no float32 numbers. All are one tensor, so that warps exchange their sums once."""
    g, r, d, e = g.to(tl.float64), r.to(tl.float64), d.to(tl.float64), e.to(tl.float64)
    pairs = tl.join(tl.join(g * g, d * d), tl.join(r * r, e * e))  # (HIDDEN, BATCH, 2, 2)
    return tl.sum(tl.reshape(pairs, g.shape[0], g.shape[1], 4), 0)
