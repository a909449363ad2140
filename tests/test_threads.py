"""Teams of threads: few rows share their threads, and no call waits for a thread that does not come."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import DTYPES, Answers, answers, make_problem, same_bits, threads
from torch.utils.data import DataLoader, Dataset

import rnnkern
from rnnkern.backends import BACKENDS

pytestmark = pytest.mark.usefixtures("cpu_library")
CPU = BACKENDS["cpu"]
CXX = os.environ.get("CXX", "g++")

#: Few rows, and enough work for two threads and more to share it; the last panel of 257 has one unit.
FEW_ROWS = [
    {"T": 40, "B": 1, "H": 160},
    {"T": 9, "B": 1, "H": 257},
    {"T": 6, "B": 3, "H": 384},
    {"T": 4, "B": 7, "H": 288},
    {"lengths": [9, 9, 5, 1], "H": 320},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FEW_ROWS, ids=str)
@pytest.mark.parametrize("gain", [1.0, 1e-8, 1e8])  # the squares of some steps leave the range of float32
def test_shared_rows_have_the_bits_of_one_thread(case: dict, dtype: torch.dtype, gain: float) -> None:
    for reverse in (False, True):
        p = make_problem(**case, dtype=dtype, reverse=reverse, nonlinearity="relu", gain=gain, clip=1e30)
        p = p.replace(z=p.z / 8)  # the states stay finite: no step doubles them more than once
        ours = []
        for n in (1, 2, 5):
            with threads(n):
                ours.append(answers(CPU, p))
        for name, one, two, five in zip(Answers._fields, *ours, strict=True):
            assert same_bits([one], [two]) and same_bits([one], [five]), name


def test_vanished_chain_of_shared_rows() -> None:
    """A member whose own units have vanished goes on as long as those of another live, and all stop together."""
    p = make_problem(40, 1, 256, gain=0.9)
    w_hh, grad_h = torch.zeros_like(p.w_hh), torch.zeros_like(p.grad_h)
    w_hh[:128, :128] = p.w_hh[:128, :128]  # the other half of the units hears nothing of later steps
    grad_h[-1] = p.grad_h[-1]
    grad_h[10] = p.grad_h[10]
    p = p.replace(w_hh=w_hh, grad_h=grad_h, grad_hn=None)
    with threads(1):
        one = answers(CPU, p)
    with threads(2):
        two = answers(CPU, p)
    assert same_bits(one, two) and two.delta[20, 0, :128].any() and not two.delta[20, 0, 128:].any()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five processors for whoever asks OpenMP, a function called in a parallel region, and members that only meet."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "processors.cpp").write_text('extern "C" int omp_get_num_procs() { return 5; }')
    (folder / "nested.cpp").write_text(
        'extern "C" void nested(void (*call)()) {\n#pragma omp parallel num_threads(2)\n call();\n}'
    )
    for name in ("processors", "nested"):
        command = ["-shared", "-fPIC", "-fopenmp", str(folder / f"{name}.cpp"), "-o", str(folder / f"{name}.so")]
        subprocess.run([CXX, *command], check=True)
    root = Path(__file__).parent
    member = [f"-I{root.parent}/csrc", str(root / "cpu_host/member.cpp"), "-o", str(folder / "member")]
    subprocess.run([CXX, "-std=c++20", "-O2", "-pthread", *member], check=True)
    return folder


@pytest.mark.parametrize(("size", "groups", "meetings"), [(2, 20, 20_000), (5, 200, 200)])
def test_members_meet(built: Path, size: int, groups: int, meetings: int) -> None:
    """Also where there are more of them than processors, and groups dissolve."""
    command = [built / "member", *map(str, (size, groups, meetings))]
    held, dissolved = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert held >= groups
    if (os.cpu_count() or 1) < size:
        assert 0 < dissolved <= groups, "who waits most of the time calls for it"


FIVE = """
import os, sys, torch, rnnkern
torch.set_num_threads(5)
before = len(os.listdir("/proc/self/task"))
torch.ops.rnnkern.recurrence(torch.randn(99, 1, 512), torch.zeros(1, 512), torch.eye(512), None, False, "tanh")
assert len(os.listdir("/proc/self/task")) == before + 4, "five threads share one row"
import pytest
raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "shared_rows and float32", sys.argv[1]]))
"""


def test_more_members_than_processors(built: Path) -> None:
    """Five threads share rows, whatever the machine has: they wait for each other, and finish."""
    done = subprocess.run(
        [sys.executable, "-c", FIVE, __file__],
        env=os.environ | {"LD_PRELOAD": " ".join([os.environ.get("LD_PRELOAD", ""), str(built / "processors.so")])},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.fixture
def busy() -> Iterator[None]:
    """A machine whose every processor has something else to do."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    yield
    for other in others:
        other.kill()
        other.wait()


def test_many_callers_on_a_busy_machine(busy: None) -> None:
    problems = [make_problem(64, B, 256, seed=B) for B in (1, 2, 3, 40)]
    with threads(1):
        alone = [answers(CPU, p) for p in problems]
    with threads(2), ThreadPoolExecutor(len(problems)) as pool:
        for _ in range(5):
            together = list(pool.map(lambda p: answers(CPU, p), problems))
            assert all(map(same_bits, alone, together))


def test_inside_a_parallel_region(built: Path) -> None:
    p = make_problem(20, 1, 256)
    alone, inside = answers(CPU, p), []
    call = ctypes.CFUNCTYPE(None)(lambda: inside.append(answers(CPU, p)))
    ctypes.CDLL(str(built / "nested.so")).nested(call)
    assert len(inside) == 2 and all(same_bits(alone, answer) for answer in inside)


FORK = """
import os, signal, torch, rnnkern
torch.set_num_threads(2)
sizes = (99, 1, 256), (9, 40, 64)
few, many = ((torch.ones(T, B, H), torch.zeros(B, H), torch.eye(H), None, False, "tanh") for T, B, H in sizes)
chains = lambda: [torch.ops.rnnkern.recurrence(*arguments) for arguments in (few, many)]
def step():
    module, x = rnnkern.RNN(3, 4), torch.ones(5, 2, 3)  # whose products PyTorch computes on one thread
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(0.1)
    module(x)[0].sum().backward()
    return [p.grad for p in module.parameters()]
ours = lambda: chains() + step()
before = ours()
torch.ones(1 << 20).add(1)  # libgomp's threads are there whoever asked for them
if (child := os.fork()) == 0:
    signal.alarm(60)
    after = ours()
    torch.set_num_threads(1)  # for what PyTorch itself computes
    os._exit(0 if all(map(torch.equal, before, after)) else 1)
assert os.waitpid(child, 0)[1] == 0, "the child hangs, or computes something else"
assert all(map(torch.equal, before, ours()))
"""


def test_forked_child() -> None:
    """PyTorch's own operators hang there where they take two threads: libgomp waits for threads that its parent has."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Encoded(Dataset[torch.Tensor]):
    """Samples that an RNN has encoded."""

    def __init__(self) -> None:
        self.rnn = rnnkern.RNN(8, 128, batch_first=True)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            return self.rnn(torch.full((1, 30, 8), index / 6))[0][0]


def test_in_the_workers_of_a_data_loader() -> None:
    encoded = Encoded()
    here = torch.stack([encoded[i] for i in range(len(encoded))])
    with threads(2):
        answers(CPU, make_problem(99, 1, 512))  # a team before the workers are forked
        (there,) = DataLoader(encoded, batch_size=6, num_workers=1, multiprocessing_context="fork")
    assert same_bits([here], [there])
