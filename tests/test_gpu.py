"""Oracle: loops over positions, entries and coordinates in float64. Without a GPU, kernels run in Triton's interpreter.

The interpreter must be chosen before Triton is imported: `test_in_the_interpreter` runs this file once more, in another
process. That the kernels compile for a GPU is tested without one.
"""

import importlib.util
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from tsae import gpu, kernels
from tsae.sae import SAE

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_triton = pytest.mark.skipif(gpu.triton is None, reason="Triton is not installed")
needs_kernels = pytest.mark.skipif(not gpu.available(), reason="no CUDA device: see test_in_the_interpreter")
SHAPES = [(1, 1, 1, 1), (1, 7, 3, 5), (3, 4, 1, 64), (6, 50, 9, 100), (2, 9, 17, 300)]  # b, n, k, d
DTYPES = [(torch.float32, torch.float32, 1e-5), (torch.bfloat16, torch.bfloat16, 1e-2),
          (torch.float32, torch.bfloat16, 1e-5)]  # of the values, of the rows; tolerance


def case(b, n, k, d, dtypes=(torch.float32, torch.float32), seed=0):
    """values (b, k), index (b, k) with repeats within a row and across rows, W (n, d), x (b, d)."""
    make = torch.Generator().manual_seed(seed)
    values, W, x = (torch.randn(shape, generator=make) for shape in ((b, k), (n, d), (b, d)))
    index = torch.randint(n, (b, k), generator=make)
    return [tensor.to(DEVICE) for tensor in (values.to(dtypes[0]), index, W.to(dtypes[1]), x.to(dtypes[1]))]


def same(found, wanted, tolerance=1e-5):
    """Whether two tensors agree to `tolerance` of the largest entry of the second."""
    found, wanted = found.double().cpu(), torch.as_tensor(wanted, dtype=torch.float64)
    return found.shape == wanted.shape and bool(((found - wanted).abs() <= tolerance * wanted.abs().max()).all())


def naive_sum_rows(values, index, W):
    values, index, W = values.double().cpu(), index.tolist(), W.double().cpu()
    out = torch.zeros(len(index), W.shape[1], dtype=torch.float64)
    for b, row in enumerate(index):
        for j, i in enumerate(row):
            out[b] += values[b, j] * W[i]
    return out


def naive_transpose_product(index, values, x, n):
    values, index, x = values.double().cpu(), index.tolist(), x.double().cpu()
    out = torch.zeros(n, x.shape[1], dtype=torch.float64)
    for b, row in enumerate(index):
        for j, i in enumerate(row):
            out[i] += values[b, j] * x[b]
    return out


def transposed(index, values, x, n):
    return gpu.transpose_product(index, values, x, n, index.flatten().argsort(stable=True))


def naive_products(x, W, index):
    x, W = x.tolist(), W.tolist()
    return [[sum(p * q for p, q in zip(x[b], W[i])) for i in row] for b, row in enumerate(index.tolist())]


@needs_kernels
@pytest.mark.parametrize("of_values, of_rows, tolerance", DTYPES)
@pytest.mark.parametrize("b, n, k, d", SHAPES)
def test_kernels_are_the_loops(b, n, k, d, of_values, of_rows, tolerance):
    values, index, W, x = case(b, n, k, d, (of_values, of_rows))
    wider = torch.promote_types(of_values, of_rows)
    for which in (index, index.int()):
        decoded, gradient = gpu.sum_rows(values, which, W), transposed(which, values, x, n)
        assert decoded.dtype == gradient.dtype == wider
        assert same(decoded, naive_sum_rows(values, index, W), tolerance)
        assert same(gradient, naive_transpose_product(index, values, x, n), tolerance)
        assert not gradient[[i for i in range(n) if i not in index]].any()
        products = gpu.sampled_products(x, W, which)
        assert products.dtype == torch.float32 and same(products, naive_products(x, W, index))


@needs_kernels
def test_lent_tensors_may_be_views():
    values, index, W, x = case(6, 20, 4, 10)
    views = [values.T.contiguous().T, index.T.contiguous().T, W.repeat(1, 2)[:, :10], x[:1].expand(6, -1)]
    assert not any(view.is_contiguous() for view in views)
    values, index, W, x = views
    assert same(gpu.sum_rows(values, index, W), naive_sum_rows(values, index, W))
    assert same(transposed(index, values, x, 20), naive_transpose_product(index, values, x, 20))
    assert same(gpu.sampled_products(x, W, index), naive_products(x, W, index))


@needs_kernels
@pytest.mark.parametrize("counts", [
    [0, 127, 0, 128, 129, 1, 256, 257, 0], [3 * 128 + 1], [0, 0, 1024], [1025, 0], [1] * 130 + [128] * 3])
def test_features_that_fire_often_are_cut_up(counts):
    """Around every multiple of the chunk, and unused features at the ends; the order of the entries is random."""
    assert gpu.CHUNK == 128
    index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))].unsqueeze(1).to(DEVICE)
    values, _, _, x = case(len(index), 1, 1, 20)
    found = transposed(index, values, x, len(counts))
    assert same(found, naive_transpose_product(index, values, x, len(counts)))
    assert (found.abs().sum(1) > 0).tolist() == [count > 0 for count in counts]
    assert torch.equal(found, transposed(index, values, x, len(counts))), "the same bits"


@needs_kernels
def test_nothing_in_nothing_out():
    values, index, W, x = case(3, 5, 2, 4)
    assert gpu.sum_rows(values[:0], index[:0], W).shape == (0, 4)
    assert gpu.sampled_products(x[:0], W, index[:0]).shape == (0, 2)
    assert torch.equal(transposed(index[:0], values[:0], x[:0], 5).cpu(), torch.zeros(5, 4))
    assert torch.equal(gpu.sum_rows(values[:, :0], index[:, :0], W).cpu(), torch.zeros(3, 4))
    assert gpu.sampled_products(x, W, index[:, :0]).shape == (3, 0)
    assert [part.shape for part in gpu.select_top(x[:0], W, W[:, 0], 2)] == [(0, 2), (0, 2)]


@needs_kernels
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("b, n, k, d", [(1, 1, 1, 1), (9, 60, 5, 33), (4, 12, 12, 16)])
def test_select_top_is_the_sort(b, n, k, d, precision):
    _, _, W, x = case(b, n, k, d)
    bias = torch.linspace(-1, 1, n, device=DEVICE)
    pre = x.double().cpu() @ W.double().cpu().T + bias.double().cpu()
    for budget in (1, 2 * n * precision.itemsize, 2**20):  # one position at a time, two, all
        values, index = gpu.select_top(x, W, bias, k, precision, budget_bytes=budget)
        assert values.dtype == torch.float32 and index.dtype == torch.int64
        assert same(values.sort(descending=True).values, pre.sort(descending=True).values[:, :k])
        assert same(values, pre.gather(1, index.cpu())), "values belong to their features"


@needs_kernels
def test_spare_candidates_undo_the_rounding():
    """Eight features that bfloat16 cannot tell apart; the best is last."""
    W = (1 + 1e-4 * torch.arange(8.0, device=DEVICE)).unsqueeze(1) * torch.ones(8, 3, device=DEVICE)
    x, bias = torch.ones(2, 3, device=DEVICE), torch.zeros(8, device=DEVICE)
    assert len(set((x @ W.bfloat16().float().T).flatten().tolist())) == 1
    assert gpu.select_top(x, W, bias, 1, spare=7)[1].tolist() == [[7], [7]]
    values, index = gpu.select_top(x, W, bias, 1, spare=0)
    assert same(values, (x @ W.T).gather(1, index).cpu()), "exact values even so"


@needs_kernels
@pytest.mark.parametrize("lookup", ["none", "learned"])
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu", "gated"])
def test_a_step_through_the_kernels_is_that_of_float64(activation, lookup, monkeypatch):
    """The kernels refuse float64, so that the other step runs the library's calls. AuxK over many dead features and few."""
    monkeypatch.setattr(kernels, "FEW", 1.0)
    make = torch.Generator().manual_seed(0)
    sae = SAE(4, 48, activation, 3, 7, lookup, bandwidth=0.1)
    for p in sae.parameters():
        p.data = torch.randn(p.shape, generator=make)
    x, t = torch.randn(9, 4, generator=make), torch.randint(7, (9,), generator=make)
    for dead in (40, 3):
        found = []
        for dtype in (torch.float32, torch.float64):
            one = deepcopy(sae).to(DEVICE, dtype)
            out = one.loss(x.to(DEVICE, dtype), t.to(DEVICE), 0.3, torch.arange(48, device=DEVICE) < dead)
            out["loss"].backward()
            found.append([out["loss"], *(p.grad.to_dense() for p in one.parameters())])
        assert all(same(a.detach(), b.detach().cpu(), 1e-4) for a, b in zip(*found)), (activation, dead)


@needs_kernels
def test_other_tensors_are_refused_with_a_sentence():
    values, index, W, x = case(3, 5, 2, 4)
    assert gpu.takes(x) and not gpu.takes(x.double())
    with pytest.raises(ValueError, match="got torch.float64 on .*float32, bfloat16"):
        gpu.sum_rows(values, index, W.double())


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels themselves are run")
def test_tensors_on_a_cpu_are_refused_with_a_sentence():
    values, index, W, x = case(3, 5, 2, 4)
    assert not gpu.available() and not gpu.takes(x)
    with pytest.raises(ValueError, match="on cpu: the kernels read"):
        gpu.sampled_products(x, W, index)


def test_without_triton_the_module_still_imports(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("gpu_without_triton", gpu.__file__)
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    values, index, W, x = case(3, 5, 2, 4)
    assert not bare.available() and not bare.takes(x)
    with pytest.raises(RuntimeError, match="need Triton.*pip install triton"):
        bare.sum_rows(values, index, W)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter has nothing to compile")
@pytest.mark.parametrize("floats", ["fp32", "bf16"])
@pytest.mark.parametrize("name, constants", [
    ("_sum_segments", dict(TAIL=True)), ("_sum_segments", dict(TAIL=False, partial=None, tail=None)),
    ("_products", {})])
def test_the_kernels_compile_for_a_gpu(name, constants, floats, tmp_path, monkeypatch):
    """For compute capability 8.0: the compiler is stricter than the interpreter. No atomics: fixed order of sums."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = dict.fromkeys(("rows", "first", "last", "tail", "index"), "*i64")
    pointers |= dict.fromkeys(("weights", "W", "x"), f"*{floats}") | dict.fromkeys(("out", "partial"), "*fp32")
    constants = constants | dict(E=gpu.ROWS, D=gpu.COLUMNS)
    kernel = getattr(gpu, name)
    signature = {arg: "constexpr" if arg in constants else pointers.get(arg, "i32") for arg in kernel.arg_names}
    compiled = gpu.triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32))
    assert compiled.asm["cubin"] and "atom" not in compiled.asm["ptx"] and "fma" in compiled.asm["ptx"]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--noconftest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=os.environ | dict(TRITON_INTERPRET="1"),
                          capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
