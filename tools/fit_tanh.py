#!/usr/bin/env python3
"""Fit the two polynomials behind tanh_vector() (vmath.h) and print them as C hex floats.

With a = |x|, b = x clamped to [-1, 1] and s = -b*b,

    tanh(x) = b + b * s / max(Q(s), E(a)),      E(a) = (1 + e^(2a)) / 2,   Q(-a*a) = a^3 / (a - tanh a)

  * for a <= 1 the divisor is Q, whose pole nearest in s is at 20.2, so a short polynomial in s does;
  * for a >= 1 (where s = -1) it is E: 1 - 1/E(a) is 1 - 2/(1 + e^(2a));
  * Q and E cross at a = 1 and nowhere else, so max() picks the right one.

E needs e^(2a) = 2^n * p(r), r = a - n*ln2/2 and |r| <= ln2/4, p a polynomial.

Both fits are minimax in *ulps of the result*: the weight of an error at a point is what it does to tanh there.  Each
is a linear program on a Chebyshev grid, solved in double precision for a correction to a solution held in mpmath, so
it also works past double precision.  The coefficients are rounded to the target format one by one, from the lowest
up, and the others refitted each time, so the printed error is that of the rounded coefficients.

    python3 tools/fit_tanh.py            # needs numpy, scipy, mpmath; takes half a minute
"""

import sys

import numpy as np
from mpmath import mp, mpf
from scipy.optimize import linprog

mp.prec = 200
LN2 = mp.log(2)
FORMATS = {"float": 24, "double": 53}  # significand bits


def round_to(value, bits):
    """value rounded to a significand of `bits` bits (ties do not occur here)."""
    mantissa, exponent = mp.frexp(value)
    return mp.ldexp(mp.nint(mp.ldexp(mantissa, bits)), exponent - bits)


def c_hex(value, bits):
    mantissa, exponent = float(value).hex().split("p")  # exact: both formats fit a Python float
    return mantissa.rstrip("0").rstrip(".") + "p" + exponent + ("f" if bits == 24 else "")


def ulp(y, bits):
    return mp.ldexp(1, mp.frexp(y)[1] - bits)


def chebyshev_grid(low, high, count):
    return [(low + high) / 2 - (high - low) / 2 * mp.cos(mp.pi * i / (count - 1)) for i in range(count)]


def minimax(xs, target, weight, coefficients, free):
    """Improve coefficients[k], k in free, to minimise max |weight * (target - polynomial)| over xs."""
    half_width = max(abs(x) for x in xs)
    for _ in range(3):  # each pass gains the digits that the LP solver's double precision has
        residual = [w * (t - mp.polyval(coefficients[::-1], x)) for x, t, w in zip(xs, target, weight)]
        worst = max(abs(e) for e in residual)
        scale = max(abs(w) for w in weight)
        matrix = np.array([[float(w / scale * (x / half_width) ** k) for k in free] for x, w in zip(xs, weight)])
        rhs = np.array([float(e / worst) for e in residual])
        ones = np.ones((len(xs), 1))
        solution = linprog(
            c=[0.0] * len(free) + [1.0],  # the last unknown is the bound on the error
            A_ub=np.block([[matrix, -ones], [-matrix, -ones]]),
            b_ub=np.concatenate([rhs, -rhs]),
            bounds=[(None, None)] * len(free) + [(0, None)],
            method="highs",
        )
        for k, step in zip(free, solution.x):
            coefficients[k] += mpf(step) * worst / scale / half_width**k
    return max(abs(w * (t - mp.polyval(coefficients[::-1], x))) for x, t, w in zip(xs, target, weight))


def fit(xs, target, weight, degree, bits, pinned=()):
    """Coefficients c0..c_degree rounded to bits, and the error; pinned gives the first few as they must be."""
    coefficients = [mpf(c) for c in pinned] + [mpf(0)] * (degree + 1 - len(pinned))
    ideal = minimax(xs, target, weight, coefficients, range(len(pinned), degree + 1))
    for k in range(len(pinned), degree + 1):
        coefficients[k] = round_to(coefficients[k], bits)
        if k < degree:
            minimax(xs, target, weight, coefficients, range(k + 1, degree + 1))
    error = max(abs(w * (t - mp.polyval(coefficients[::-1], x))) for x, t, w in zip(xs, target, weight))
    return coefficients, ideal, error


def fit_divisor(degree, bits):
    """Q(s) for -1 <= s <= 0.  An error dQ moves tanh(a) by a^3/Q^2 * dQ."""
    grid = chebyshev_grid(mpf("-1.0001"), mpf("-1e-4"), 600)  # nearer to 0 any Q near 3 will do
    roots = [mp.sqrt(-s) for s in grid]
    target = [a**3 / (a - mp.tanh(a)) for a in roots]
    weight = [a**3 / q**2 / ulp(mp.tanh(a), bits) for a, q in zip(roots, target)]
    return fit(grid, target, weight, degree, bits)


def fit_exponential(degree, bits):
    """p(r) = e^(2r) for |r| <= ln2/4.  A relative error d of e = e^(2a) moves tanh(a) by 2e/(1+e)^2 * d.

    Only a >= 1 uses p, so the lowest such a that reduces to a given r sets the weight there.
    """
    half = LN2 / 4 * (1 + mpf(2) ** -10)  # n is rounded from an inexact product: a little beyond
    grid = chebyshev_grid(-half, half, 800)
    target = [mp.exp(2 * r) for r in grid]
    weight = []
    for r, t in zip(grid, target):
        n = mp.ceil((mpf("0.999") - r) / (LN2 / 2))
        e = mp.ldexp(t, int(n))
        weight.append(2 * e / (1 + e) ** 2 / t / ulp(mp.tanh(1), bits))
    return fit(grid, target, weight, degree, bits, pinned=[1])


def report(name, coefficients, ideal, error, bits):
    print(
        f"  {name}: degree {len(coefficients) - 1}, error {float(error):.3f} ulp of tanh "
        f"({float(ideal):.3f} before the coefficients were rounded)"
    )
    print("    " + ", ".join(c_hex(c, bits) for c in coefficients))


if __name__ == "__main__":
    degrees = {"float": (3, 5), "double": (7, 10)}  # of Q, of p
    if len(sys.argv) > 1:  # fit_tanh.py float 2 4: what would these degrees give?
        degrees = {sys.argv[1]: (int(sys.argv[2]), int(sys.argv[3]))}
    for name, (divisor_degree, exponential_degree) in degrees.items():
        bits = FORMATS[name]
        print(name)
        report("Q", *fit_divisor(divisor_degree, bits), bits)
        report("p", *fit_exponential(exponential_degree, bits), bits)
        for label, value in (("2/ln2", 2 / LN2), ("ln2/2", LN2 / 2)):
            rounded = round_to(value, bits)
            print(f"  {label}: {c_hex(rounded, bits)}, relative error {float(rounded / value - 1):.2e}")
