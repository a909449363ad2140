"""The Triton backend's own promises: every regime is right, the ladder fits every device, waits end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import need
from helpers import answers, check, make_problem, same_bits

import rnnkern
from rnnkern.backends import BACKENDS, triton
from rnnkern.kernels.plan import BATCH_CHOICES, Device, Plan, plan

ROOT = Path(__file__).parent.parent
TRITON = BACKENDS["triton"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: processors and shared memory of an A100, an H100, an RTX 4090, a T4, an MI300X, and a seventh of an H100
DEVICES = [(108, 166912), (132, 232448), (128, 101376), (40, 65536), (304, 65536), (16, 232448)]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def triton_runs() -> None:
    need("triton")


@pytest.fixture
def device() -> str:
    return "cpu" if triton.interprets() else "cuda"


@pytest.fixture
def gpu() -> None:
    if triton.interprets():
        pytest.skip("an interpreted program cannot wait for another, and has no stream")


@pytest.fixture(params=["resident", "grid", "step"])
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "grid":
        request.getfixturevalue("gpu")
    monkeypatch.setattr(triton, "regime", request.param)
    return request.param


CASES = [
    {"T": 1, "B": 1, "H": 1},
    {"T": 5, "B": 19, "H": 23},
    {"T": 4, "B": 17, "H": 64},
    {"lengths": [6, 5, 4, 4, 2, 1], "H": 31},
    {"lengths": [4] * 9 + [3] * 8 + [1] * 3, "H": 40},
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())).replace(" ", ""))
@dtypes
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_every_regime(regime: str, device: str, case: dict, dtype: torch.dtype, reverse: bool) -> None:
    p, other = (make_problem(**case, dtype=dtype, reverse=reverse, device=device, seed=seed) for seed in (0, 1))
    ours = answers(TRITON, p)
    check(p, ours, yardsticks=[other])
    assert same_bits(ours, answers(TRITON, p))
    clipped = make_problem(**case, dtype=dtype, reverse=reverse, clip=0.5, nonlinearity="relu", device=device)
    check(clipped, answers(TRITON, clipped))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("where", ["z", "w_hh"])
def test_padding_stays_out(regime: str, device: str, dtype: torch.dtype, where: str) -> None:
    """H = 21 and B = 9 fill no tile: an inf must not come back as NaN through the zeros beside them."""
    p = make_problem(5, 9, 21, dtype, device=device)
    spoiled = getattr(p, where).clone()
    spoiled[(2,) * spoiled.dim()] = float("inf")
    p = p.replace(**{where: spoiled})
    check(p, answers(TRITON, p))
    p = p.replace(grad_hn=None)  # zeros, which no infinite weight makes NaN
    check(p, answers(TRITON, p))


def test_statistics_in_several_launches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums have little room here: the grid kernel walks the sequence in parts, and says the same."""
    monkeypatch.setattr(triton, "regime", "step" if triton.interprets() else "grid")
    for reverse in (False, True):
        p = make_problem(7, 5, 40, reverse=reverse, device=device)
        whole = answers(TRITON, p)
        monkeypatch.setattr(triton, "PARTIAL_BYTES", 3 * 3 * 5 * 32)
        assert same_bits(whole, answers(TRITON, p))
        monkeypatch.undo()
        monkeypatch.setattr(triton, "regime", "step" if triton.interprets() else "grid")


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("tensor_cores", [True, False])
@pytest.mark.parametrize("numbers", DEVICES, ids=str)
def test_the_ladder_fits_the_device(numbers: tuple[int, int], size: int, tensor_cores: bool) -> None:
    device = Device(*numbers)
    for H in (1, 16, 17, 64, 100, 128, 200, 256, 384, 512, 1000, 1024, 2048, 3000, 4096, 8192, 20000):
        kernels = set()
        for B in (1, 7, 8, 9, 64, 1000, 5000):
            p = plan(size, tensor_cores, H, B, device)
            kernels.add(
                (p.regime, p.hidden, p.batch, p.warps, p.depth, p.resident, p.registers)
            )  # what is compiled for
            assert p.slices * p.hidden >= H and p.slices >= 1 <= p.groups
            assert on_chip(p, size) <= device.shared
            if p.regime == "grid":
                fits = min(device.shared // on_chip(p, size), device.registers // (32 * p.warps * p.registers))
                assert p.together <= fits and p.slices * p.groups <= device.processors * p.together
            else:
                assert p.groups * p.batch >= B
        large = plan(size, tensor_cores, H, 1 << 21, device)
        assert large.regime == "resident" or large.groups <= 65535, "the second axis of a launch"
        assert len(kernels) <= BATCH_CHOICES, "another B compiles little that is new"


def on_chip(p: Plan, size: int) -> int:
    """Bytes of W_hh and of the states beside it in one program's shared memory."""
    if p.regime == "resident":
        return size * p.hidden * (p.hidden + p.batch)
    return size * p.warps * p.depth * (p.hidden + p.batch) * (1 if p.resident else 3)


def test_a_regime_that_cannot_serve_says_why() -> None:
    small = Device(4, 65536, cooperative=False)
    with pytest.raises(ValueError, match="'resident' was asked for: W_hh of H = 1024 does not fit"):
        plan(4, True, 1024, 1, small, "resident")
    with pytest.raises(ValueError, match="'grid' was asked for: programs cannot wait"):
        plan(4, True, 1024, 1, small, "grid")
    with pytest.raises(ValueError, match="'grid' was asked for: H = 1024 has more slices"):
        plan(4, True, 1024, 1, Device(4, 65536), "grid")


def test_choices_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "device_of", lambda device: Device(132, 232448))
    words = triton.choices(torch.bfloat16, torch.device("cuda"))
    assert words == "resident to H = 256, grid on chip to H = 2048, grid streamed to H = 8192"


@pytest.mark.parametrize(
    ("arch", "more"), [(80, ""), (89, "--packed --batch=64"), (90, ""), (90, "--packed"), (100, "")]
)
def test_compiles_ahead_of_time(arch: int, more: str) -> None:
    """For a GPU that is not here: within its shared memory, as many programs as are to run at once; and no register of
    the resident kernel spills."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "tools/triton_resources.py", f"--archs={arch}", "--dtypes=bf16,tf32,fp32"]
    done = subprocess.run(
        [*command, "--hidden=64,256,1024", *more.split()], cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(rf"^ +{arch} (\S+) +(\d+)  (\S+) +(resident|grid) .* (\d+)$", done.stdout, re.M)
    assert len(lines) == 27
    assert all((int(mma) > 0) == (dtype != "fp32") for dtype, _, _, _, mma in lines), "tensor cores where allowed"


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx1100"])
def test_compiles_for_amd(arch: str) -> None:
    """What is chosen there, ahead of time: nothing asks for TF32, and no program waits for another."""
    program = f"""
import itertools
from rnnkern.kernels import grid, resident
from rnnkern.kernels.plan import Device, plan
from tools.triton_resources import compile_kernel

device = Device(120, 65536, cooperative=False)
for (dtype, size, precision), H in itertools.product((("bf16", 2, "tf32"), ("fp32", 4, "ieee")), (64, 512)):
    p = plan(size, precision == "tf32", H, 16, device)
    assert p.regime == ("resident" if H == 64 else "step")
    module = resident if p.regime == "resident" else grid
    constants = dict(H=H, HIDDEN=p.hidden, BATCH=p.batch, NONLINEARITY="tanh", PACKED=False, PRECISION=precision)
    if p.regime == "step":
        constants |= dict(DEPTH=p.depth, WARPS=p.warps, RESIDENT=False)
    of_backward = dict(HAS_GRAD_HN=True, STATS=True)
    for kernel, more in ((module.forward, {{}}), (module.backward, of_backward)):
        options = dict(num_warps=p.warps)
        assert compile_kernel(kernel, "{arch}", dtype, constants | more, options).asm["hsaco"]
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("packed", [False, True])
def test_operators_are_registered_well(device: str, packed: bool) -> None:
    p = make_problem(**({"lengths": [3, 2], "H": 5} if packed else {"T": 3, "B": 2, "H": 5}), device=device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(TRITON.recurrence, p.forward, test_utils=checks)
    torch.library.opcheck(TRITON.recurrence_, (p.z.clone(), *p.forward[1:]), test_utils=checks)
    torch.library.opcheck(TRITON.recurrence_backward, p.backward, test_utils=checks)
    torch.library.opcheck(TRITON.recurrence_backward_stats, p.backward, test_utils=checks)


def test_one_graph_of_operators(device: str) -> None:
    """torch.compile sees operators, not kernels; another T or B is no new graph."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    rnn = rnnkern.RNN(6, 5, bidirectional=True, device=device)
    with rnnkern.use_backend("triton"), torch.no_grad():
        compiled = torch.compile(rnn, backend=keep, fullgraph=True, dynamic=True)
        for T, B in ((4, 3), (6, 2), (9, 5)):
            x = torch.randn(T, B, 6, device=device)
            assert torch.equal(compiled(x)[0], rnn(x)[0])
    assert len(graphs) == 1


def test_operands_are_rounded_to_tf32() -> None:
    """To the nearest, where a tensor core cuts off; infinities, NaN and zeros stay."""
    if not triton.interprets():
        pytest.skip("by itself the function runs in the interpreter; on a GPU test_tf32 sees what it does")
    from triton_rounding import rounded

    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1 + 2**-11, 1 + 2**-10, 3.0e38])
    x = torch.cat([special, torch.randn(1016) * 10.0 ** torch.randint(-30, 30, (1016,))])
    y = torch.empty_like(x)
    rounded[(1,)](x, y, 1024)
    assert torch.equal(y[:4], x[:4]) and y[4].isnan() and y[5] == 1 + 2**-10 and y[6] == 1 + 2**-10
    assert (y.view(torch.int32)[:4] & 0x1FFF == 0).all() and (y.view(torch.int32)[5:] & 0x1FFF == 0).all()
    error = ((y.double() - x.double()) / x.double()).abs()[5:]
    assert error.max() <= 2**-11


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("H", [64, 128, 300, 1024])
def test_tf32_where_the_switch_allows_it(H: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to the truth as nn.RNN, which obeys the same switch; and float32 to its precision where it is off."""
    p = make_problem(20, 16, H, device="cuda")
    theirs = torch.nn.RNN(H, H, device="cuda", bias=False)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(torch.eye(H))
        theirs.weight_hh_l0.copy_(p.w_hh)
    z, h0, w_hh = p.z.double(), p.h0.double(), p.w_hh.double()
    truth = rnnkern.reference.recurrence(z, h0, w_hh)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    ours = TRITON.recurrence(*p.forward)
    plain = theirs(p.z, p.h0[None])[0]
    error, theirs_error = ((v.double() - truth).abs().max().item() for v in (ours, plain))
    assert 1e-6 < error <= 2 * theirs_error
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert (TRITON.recurrence(*p.forward).double() - truth).abs().max() < 1e-5


@pytest.mark.usefixtures("gpu")
def test_a_wait_that_runs_out_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel ends, says so at the next call, and what it could not compute is NaN. The GPU stays usable."""
    p = make_problem(50, 4, 700, device="cuda")
    right = answers(TRITON, p)
    monkeypatch.setattr(triton, "regime", "grid")
    monkeypatch.setattr(triton, "LIMIT", 0)
    h = TRITON.recurrence(*p.forward)
    torch.cuda.synchronize()
    assert h[-1].isnan().any() and not h[0].isnan().any()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"waited in vain at visit \d+"):
        TRITON.recurrence(*p.forward)
    check(p, answers(TRITON, p))
    assert same_bits(right, answers(TRITON, p))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("size", [{"T": 30, "B": 8}, {"lengths": [30] * 5 + [20, 11, 1]}], ids=["padded", "packed"])
@pytest.mark.parametrize("H", [64, 600])
def test_streams_and_graphs(H: int, size: dict) -> None:
    p = make_problem(**size, H=H, device="cuda")
    right = answers(TRITON, p)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = answers(TRITON, p)
    stream.synchronize()
    assert same_bits(right, on_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = answers(TRITON, p)
    for x in captured:
        x.fill_(7)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert same_bits(right, captured)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("H", [96, 640])
def test_same_bits_on_every_run(H: int) -> None:
    p = make_problem(40, 24, H, torch.bfloat16, device="cuda")
    right = answers(TRITON, p)
    assert all(same_bits(right, answers(TRITON, p)) for _ in range(200))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("H", [48, 720])
def test_another_length_compiles_nothing(H: int) -> None:
    from rnnkern.kernels import grid, resident

    def compiled() -> int:
        kernels = (resident.forward, resident.backward, grid.forward, grid.backward)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    for T, B in ((1, 1), (3, 40)):  # both widths of a tile
        answers(TRITON, make_problem(T, B, H, device="cuda"))
    before = compiled()
    for T, B in ((2, 2), (16, 16), (17, 3), (32, 64), (5, 33), (1, 128)):
        answers(TRITON, make_problem(T, B, H, device="cuda"))
    assert compiled() == before
