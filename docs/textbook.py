# The source of docs/textbook.md, and a notebook to who opens it as one: `make textbook` runs it and writes the page.

# %% [markdown]
# # The textbook, measured
#
# Why plain recurrent nets forget is told with a handful of small tables. Here they are made again, in the order of the
# story (Hochreiter 1991; Bengio, Simard & Frasconi 1994; Pascanu, Mikolov & Bengio 2013; Saxe, McClelland & Ganguli
# 2014; Le, Jaitly & Hinton 2015), and no number is worked out by hand: a loss stands at the last step of a sequence,
# one backward pass runs, and `rnnkern.watch` records what arrives at every step before. Where there is a formula, it
# stands beside.
#
#     h_t = tanh(W_ih x_t + W_hh h_{t-1} + b)
#     ∂L/∂h_{t-1} = W_hhᵀ · diag(1 - h_t²) · ∂L/∂h_t           one step back: saturation, then weights
#
# *Lag* k is k steps before the last. The *horizon* is the largest lag at which at least 1/1000 of the gradient's norm
# is left; here 100 and 127 are whole sequences. The cells run in the order in which they stand, in ten seconds.

# %%
import textwrap

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import rnnkern
from rnnkern import init, jacobian
from rnnkern.gradflow.plots import AXIS, COLOURS


def measured(rnn, x, **options):
    """The record of a loss at the last step."""
    with rnnkern.watch(rnn, **options) as flow:
        rnn(x)[0][-1].sum().backward()
    return flow.read(order="lag")


def left(record):
    """‖∂L/∂h‖ at each lag as a share of that at lag 0."""
    return record.norm[0, 0] / record.norm[0, 0, 0]


def chain(w_hh, x):
    """The record of a tanh RNN with these recurrent weights, in float64."""
    rnn = rnnkern.RNN(x.shape[2], len(w_hh), bias=False, dtype=torch.float64)
    rnn.weight_hh_l0.data.copy_(w_hh)
    return measured(rnn, x)


def say(verdict):
    print("\n".join(textwrap.fill(line, 110) for line in str(verdict).splitlines()))


def silence(steps, features=1):
    """An input (T, B, I) under which h stays 0, where the tanh is the identity."""
    return torch.zeros(steps, 1, features, dtype=torch.float64)


def finished(ax, title, **labels):
    ax.set_title(title, loc="left")
    ax.set(**labels)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def picture(title, curves):
    """What is left at each lag, for curves by name."""
    ax = Figure(figsize=(6.8, 3.4), layout="constrained").add_subplot()
    for row, (name, norms) in enumerate(curves.items()):
        style = dict(color=COLOURS[row], linewidth=1.8, marker="o" if np.count_nonzero(norms) == 1 else None)
        with np.errstate(divide="ignore"):
            ax.plot(np.log10(norms), label=name, **style)
        zero = np.flatnonzero(norms == 0)  # has no logarithm: ticks at the bottom
        if len(zero):
            style = dict(color=COLOURS[row], markersize=4, transform=ax.get_xaxis_transform())
            ax.plot(zero, np.full(len(zero), 0.015 + 0.022 * row), "|", label="exactly 0", **style)
    ax.margins(y=0.12)
    ax.axhline(-3, color="0.4", linestyle=":", linewidth=1.2, label="1/1000")
    return finished(ax, title, xlabel=AXIS["lag"], ylabel="log10 of ‖∂L/∂h‖ / that at lag 0")


def legend(ax):
    """Beside the picture, in the order in which the lines end."""
    lines = ax.get_legend_handles_labels()[0]
    handles = sorted(lines, key=lambda line: (line.get_marker() == "|", -line.get_ydata()[-1]))
    return ax.legend(handles=handles, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


# %% [markdown]
# ## 1. One unit
#
# With one unit and no input h stays 0, and k steps back multiply the gradient by w^k. That is all there is to it: a
# factor that is a little below 1 is a factor that vanishes.

# %%
print("   w    k       w^k  measured")
for w, k in [(0.9, 10), (0.9, 50), (0.9, 100), (0.5, 20), (1.1, 50), (1.1, 100)]:
    record = chain(torch.tensor([[w]], dtype=torch.float64), silence(k + 1))
    print(f"{w:4} {k:4} {w**k:9.2g} {left(record)[k]:9.2g}")

# %% [markdown]
# ## 2. Many units: the spectral radius
#
# With W_hh = g · Q, Q orthogonal, every direction is multiplied by g, which is the largest singular value and the
# spectral radius at once. So g^k once more, to the last digit, now with 64 units.

# %% radius: Straight lines by lag, on a logarithmic scale: down for g below 1, level for 1, up above
torch.manual_seed(0)
Q = init.orthogonal_(rnnkern.RNN(1, 64, dtype=torch.float64)).weight_hh_l0.detach()

radii = {}
print("  g   lag 10    g^10  lag 100   g^100  horizon  symptoms")
for g in (0.5, 0.9, 1.0, 1.1, 1.5):
    record = radii[g] = chain(g * Q, silence(101))
    n = left(record)
    symptoms = ", ".join(sorted(record.verdict().names)) or "none"
    print(f"{g} {n[10]:8.2g} {g**10:7.2g} {n[100]:8.2g} {g**100:7.2g} {record.horizon.item():8.0f}  {symptoms}")

legend(picture("W_hh = g · orthogonal, no input", {f"g = {g}": left(record) for g, record in radii.items()}))

# %% [markdown]
# The record says the same in words:

# %%
say(radii[0.9].verdict())

# %% [markdown]
# ## 3. Saturation
#
# The same weights, now with input. Where |h| is large, 1 - h² is small: each step back has two factors, and the record
# keeps them apart. An orthogonal W_hh takes nothing; what is lost, the tanh has taken. And g = 1.5, which explodes in
# silence, does so much less with the smallest input: its states grow until 1 - h² has nearly made up for it. So tanh
# nets explode less than their weights would, and vanishing is the common case.

# %% saturation: For g = 1 the gain falls as the input grows; for g = 1.5 it falls to just above 1 at once, then below
torch.manual_seed(0)
x = torch.randn(101, 8, 16, dtype=torch.float64)

scales = (0, 0.1, 0.25, 0.5, 1, 2, 4)
factors = {g: [chain(g * Q, scale * x) for scale in scales] for g in (1.0, 1.5)}
print("  g  input  saturation x weights = a step back  horizon")
for g, records in factors.items():
    for scale, record in zip(scales, records):
        means = record.mean_saturation_factor, record.mean_weight_factor, record.mean_gain, record.horizon
        print("{} {:6} {:11.2f} {:9.2f} {:13.2f} {:8.0f}".format(g, scale, *(m.item() for m in means)))

figure = Figure(figsize=(6.8, 3.4), layout="constrained")
for ax, (g, records) in zip(figure.subplots(1, 2, sharey=True), factors.items()):
    for name, style, colour in zip(("weight_factor", "saturation_factor", "gain"), ("o-", "o-", "s--"), COLOURS):
        means = [getattr(record, f"mean_{name}").item() for record in records]
        ax.plot(means, style, color=colour, linewidth=1.8, markersize=4, label=name)
    ax.axhline(1, color="0.4", linestyle=":", linewidth=1.2)
    ax.set_xticks(range(len(scales)), map(str, scales))
    finished(ax, f"W_hh = {g} · orthogonal", xlabel="standard deviation of the input", ylim=(0, 1.6))
figure.axes[0].set_ylabel("factor of one step back")
figure.axes[0].legend(frameon=False, loc="lower left")

# %% [markdown]
# ## 4. The spectral radius is for the long run
#
# What bounds a step is the largest singular value σ: below 1 all must vanish, above 1 it may explode, and need not
# (Pascanu et al.). What decides in the long run is the radius ρ. The two differ where W_hh is not normal. Here ρ = 0.9,
# so all vanishes in the end; yet it grows first:
#
#     W = (a c; 0 a)      W^k = a^k (1 kc/a; 0 1)

# %% transient: The norm rises at first, then falls, for ever above ρᵏ and below σᵏ
a, c = 0.9, 2.0
W = torch.tensor([[a, c], [0, a]], dtype=torch.float64)
transient = chain(W, silence(201))
sigma = torch.linalg.matrix_norm(W, 2).item()
k = np.arange(201)
formula = a**k * np.hypot(1, 1 + k * c / a) / np.sqrt(2)

print(f"spectral radius {a}, largest singular value {sigma:.2f}")
print("lag      " + "".join(f"{j:9}" for j in (1, 5, 10, 50, 100, 200)))
print("measured " + "".join(f"{left(transient)[j]:9.2g}" for j in (1, 5, 10, 50, 100, 200)))
print("formula  " + "".join(f"{formula[j]:9.2g}" for j in (1, 5, 10, 50, 100, 200)))
print(f"largest at lag {left(transient).argmax()}, horizon {transient.horizon.item():.0f}")

ax = picture("Spectral radius 0.9, not normal", {"measured": left(transient)})
ax.plot(k[:11], k[:11] * np.log10(sigma), "--", color=COLOURS[1], linewidth=1.8, label=f"σᵏ, σ = {sigma:.2f}")
ax.plot(k, k * np.log10(a), "--", color=COLOURS[2], linewidth=1.8, label=f"ρᵏ, ρ = {a}")
legend(ax)

# %% [markdown]
# ## 5. What the usual initialisations do
#
# By default W_hh is drawn from U(±1/√H), with a variance of 1/(3H). For large H its spectral radius then is
# 1/√3 = 0.577, and so is the root mean square of its singular values; the largest of them is 2/√3 = 1.155. No bound
# rules growth out, and yet a gradient of nearly any direction loses four tenths at each step, *whatever the size of
# the net*.

# %%
torch.manual_seed(0)
default = {H: rnnkern.RNN(16, H) for H in (64, 256, 1024)}
print("   H  radius  σ, root mean square  largest σ")
for H, rnn in default.items():
    sigma = torch.linalg.svdvals(rnn.weight_hh_l0.detach().double())
    print(f"{H:4} {jacobian.spectral_radius(rnn).item():7.2f} {sigma.square().mean().sqrt():20.3f} {sigma.max():10.2f}")

# %% [markdown]
# An orthogonal W_hh loses only what the tanh takes, which is less the wider the net (the input being the same). The
# identity with ReLU, the IRNN, passes the gradient on untouched where a unit is on, and not at all where it is off.

# %% inits: Default falls steeply in a straight line, orthogonal slowly, identity hardly
x = torch.randn(128, 8, 16)
records = {}
for H, rnn in default.items():
    records["default", H] = measured(rnn, x)
    records["orthogonal", H] = measured(init.orthogonal_(rnnkern.RNN(16, H)), x)
    records["identity", H] = measured(init.identity_(rnnkern.RNN(16, H, nonlinearity="relu")), x)
print("W_hh           H  a step back  horizon")
for name, H in sorted(records):
    print(f"{name:10} {H:5} {records[name, H].mean_gain.item():12.2f} {records[name, H].horizon.item():8.0f}")

names = "default", "orthogonal", "identity"
legend(picture("Three initialisations, H = 256", {name: left(records[name, 256]) for name in names}))

# %% [markdown]
# What the record of the default net says, if the task asks for 100 steps:

# %%
say(records["default", 256].verdict(needs=100))

# %% [markdown]
# ## 6. What clipping does, and what it does not
#
# `clip_grad_norm_` makes the step on the weights shorter, after the gradient has been computed; the chain is the same.
# `clip=` works inside the chain, on each element at each step, so that the norms stay finite (they are recorded before
# they are clipped). Both are for what explodes. What has vanished stays vanished.

# %%
print("  g  clip=   lag 0   lag 50  lag 100   ‖∂L/∂θ‖  after clip_grad_norm_")
for g in (1.5, 0.5):
    for clip in (float("inf"), 1.0):
        rnn = rnnkern.RNN(1, 64, clip=clip, dtype=torch.float64)
        rnn.weight_hh_l0.data.copy_(g * Q)
        for bias in (rnn.bias_ih_l0, rnn.bias_hh_l0):
            nn.init.zeros_(bias)
        n = measured(rnn, silence(101)).norm[0, 0]
        before = nn.utils.clip_grad_norm_(rnn.parameters(), 1.0)
        after = nn.utils.get_total_norm([p.grad for p in rnn.parameters()])
        print(f"{g} {clip:6} {n[0]:7.2g} {n[50]:8.2g} {n[100]:8.2g} {before:9.2g} {after:22.2g}")

# %% [markdown]
# ## 7. Truncated backpropagation
#
# Chunks of 25 steps: the state goes on from one to the next, the gradient does not. It is exactly 0 beyond, however
# well the weights would carry it.

# %% truncated: Both fall alike until lag 24; from there on chunks of 25 steps have exactly 0
torch.manual_seed(0)
rnn = init.orthogonal_(rnnkern.RNN(16, 64))
x = 0.3 * torch.randn(100, 8, 16)
whole = measured(rnn, x)
with rnnkern.watch(rnn) as flow:
    bptt = rnnkern.TruncatedBPTT(25, flow=flow)
    for (part,) in bptt.chunks(x):
        output, bptt.hx = rnn(part, bptt.hx)
    output[-1].sum().backward()
cut = flow.read(order="lag")
for name, record in {"whole": whole, "cut": cut}.items():
    shares = ", ".join(f"lag {j}: {left(record)[j]:.2g}" for j in (24, 25, 99))
    print(f"{name:5}  {shares}, horizon {record.horizon.item():.0f}")

legend(picture("Truncated backpropagation", {"100 steps": left(whole), "chunks of 25": left(cut)}))

# %% [markdown]
# ## 8. Gates
#
# An LSTM's memory is c, and from c_t to c_{t-1} the forget gate multiplies the gradient: by σ(b) at the start, b the
# gate's bias. Around 0, the default, half is lost at each step, as in a tanh net. The bias of 1 that Gers, Schmidhuber
# & Cummins (2000) and Jozefowicz, Zaremba & Sutskever (2015) advise keeps 0.73, and training has to find the rest; 3
# keeps 0.95. (Some comes back through the other gates too, so that the horizon is longer than that of σ(b) alone.)


# %% gates: The LSTM with forget bias 0 falls nearly as steeply as tanh, with 1 slowly, with 3 it stays level
def lstm(forget, H=64):
    net = nn.LSTM(16, H)
    nn.init.zeros_(net.bias_hh_l0)
    net.bias_ih_l0.data[H : 2 * H] = forget  # the gates are i, f, g, o
    return net


torch.manual_seed(0)
x = torch.randn(128, 8, 16)
curves = {"tanh": left(measured(rnnkern.RNN(16, 64), x))}
gates = {b: measured(lstm(b), x, cell_states=True)["rnn.c"] for b in (0.0, 1.0, 3.0)}
print("forget bias  σ(b)  one step back of c  horizon of c")
for b, record in gates.items():
    forget = torch.sigmoid(torch.tensor(b)).item()
    print(f"{b:11} {forget:5.2f} {record.mean_gain.item():19.2f} {record.horizon.item():13.0f}")
    curves[f"LSTM's c, b = {b:.0f}"] = left(record)
legend(picture("Gated and plain, H = 64", curves))

# %% [markdown]
# ## 9. What one sees without the chain
#
# Two usual ways to look at all this show something else. A hook, or `retain_grad`, on the output of `nn.RNN` sees
# ∂L/∂y, what the loss asks of each output: with a loss at the end it is 0 at all steps but one, and says nothing of
# vanishing. And a loop over cells with `retain_grad` at each state gets the right gradients, but their squares
# underflow float32 long before they do: the usual `h.grad.norm()` is 0 where the gradient is not.

# %% naive: The record lies on the float64 loop to the end, the float32 norm ends early; the output has one point
torch.manual_seed(0)
x = torch.randn(121, 8, 16)
rnn = rnnkern.RNN(16, 64)
recorded = left(measured(rnn, x))

output, _ = rnn.to_torch()(x)
output.retain_grad()
output[-1].sum().backward()
at_output = output.grad.flatten(1).norm(dim=1).flip(0).numpy()


def loop(dtype):
    """∂L/∂h by lag, (T, B, H), from a loop over cells."""
    cell, h, states = nn.RNNCell(16, 64).to(dtype), None, []
    cell.load_state_dict({name.removesuffix("_l0"): w for name, w in rnn.state_dict().items()})
    for x_t in x.to(dtype):
        h = cell(x_t, h)
        h.retain_grad()
        states.append(h)
    h.sum().backward()
    return torch.stack([h.grad for h in reversed(states)])


truth, in_float32 = (loop(dtype).square().sum((1, 2)).sqrt().numpy() for dtype in (torch.float64, torch.float32))
seen = {"record": recorded, "loop, norm in float32": in_float32 / in_float32[0], "output": at_output / at_output[0]}
print("lag   loop in float64" + "".join(f"{name:>23}" for name in seen))
for j in (0, 1, 40, 80, 90, 120):
    print(f"{j:3} {truth[j] / truth[0]:17.2g}" + "".join(f"{norms[j]:23.2g}" for norms in seen.values()))
for name, norms in seen.items():
    print(f"{name}: not 0 at {np.count_nonzero(norms)} of {len(x)} steps")

ax = picture("Four ways to look at one gradient", seen)
ax.plot(np.log10(truth / truth[0]), color="0.85", linewidth=7, zorder=0, label="loop in float64")
legend(ax)

# %% [markdown]
# ## Where to go on
#
# [gradient-flow.md](gradient-flow.md) has the formulas and the verdict's rules, [jacobian.md](jacobian.md) asks the
# same without a loss, [gated.md](gated.md) is about LSTM and GRU, and `make demo` trains nets with both inits.
