"""Random shapes, masks and weights: the Triton kernels equal the authors' einsum, forward and backward; in Triton's interpreter where there is no GPU (conftest.py)."""
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux)")
from revela_nb import kernel
from revela_nb.attention import VALUE_NORMS, cross_chunk_attention, cross_chunk_einsum, in_batch_weights, select_pairs
from revela_nb import streams
from revela_nb.kernel import list_pairs
from revela_nb.streams import attend, double_pairs, read_chunks, runs_triton, triton_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def layer(n, heads, kv_heads, length, dim, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, h, length, dim, generator=g, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    mask = torch.arange(length)[None] < torch.randint(1, length + 1, (n,), generator=g)[:, None]
    if seed % 2: mask = mask.flip(1)  # left padding
    return [x.to(DEVICE) for x in (q, k, v, mask, torch.randn(n, n, generator=g, dtype=dtype))]


def everything(read, q, k, v, mask, similarity, temperature, group_size=None, **options):
    "Output and all gradients, by name."
    leaves = [x.clone().requires_grad_() for x in (q, k, v, similarity)]
    out = read(*leaves[:3], in_batch_weights(leaves[3], temperature, group_size), mask, **options)
    (out * out.detach().cos()).sum().backward()
    return dict(zip(("output", "query", "key", "value", "similarity"), [out.detach(), *(x.grad for x in leaves)]))


def worst(ours, exact):
    "Largest relative error, and whose it is; where the exact gradient is rounding only (of a key that is alone), it is relative to a tenth of the output."
    least = 0.1 * exact["output"].double().norm().item() if "output" in exact else 0.1
    return max(((ours[n].double() - exact[n].double()).norm().item() / max(exact[n].double().norm().item(), least, 0.1), n) for n in exact)


def test_without_a_gpu_the_interpreter_runs():
    "Another test may have imported triton first: conftest.py comes before all of them."
    assert (type(kernel.attend_forward).__name__ == "InterpretedFunction") == (DEVICE == "cpu")


def test_without_triton_the_module_loads():
    code = ("import sys; sys.modules['triton'] = None; from revela_nb import kernel, patching, streams; "
            "assert kernel.triton is None and callable(kernel.attend_forward) and callable(streams.measure_rows)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@settings(max_examples=12, deadline=None)
@given(groups=st.integers(1, 3), b=st.integers(1, 3), kv=st.integers(1, 2), share=st.integers(1, 3), length=st.sampled_from([1, 5, 33]),
       dim=st.sampled_from([16, 32]), seed=st.integers(0, 1000), norm=st.sampled_from(VALUE_NORMS), temperature=st.sampled_from([1e-3, 0.1, 2.0]))
def test_kernels_equal_einsum(groups, b, kv, share, length, dim, seed, norm, temperature):
    "Stands in for gradcheck, which needs float64: Triton has no products in it. The exact output and gradients are the einsum's in float64."
    given = layer(groups * b, kv * share, kv, length, dim, seed)
    ours = everything(triton_attention, *given, temperature, b, value_norm=norm)
    exact = everything(cross_chunk_einsum, *(x.double() if x.is_floating_point() else x for x in given), temperature, b, value_norm=norm)
    assert worst({"similarity": ours.pop("similarity")}, {"similarity": exact.pop("similarity")}) < (2e-5 / min(temperature, 1), "")       # 1 / temperature enlarges rounding
    assert worst(ours, exact) < (2e-6, ""), worst(ours, exact)


def test_several_tiles_of_readers_and_read():
    "70 tokens are more than one tile of either, in every kernel; 5 query heads share a key head."
    given = *layer(3, 5, 1, 70, 16, 3), 0.5
    assert all(5 * 70 > 2 * m and 70 > n for m, n, *_ in kernel.TILES.values())                   # query heads that share a key head make one list of rows
    assert worst(everything(triton_attention, *given), everything(cross_chunk_einsum, *given)) < (1e-5, "")


def test_scaling_and_head_size_128():
    given = *layer(2, 2, 2, 4, 128, 4), 0.5
    ours, exact = (everything(read, *given, scaling=0.03) for read in (triton_attention, cross_chunk_einsum))
    assert worst(ours, exact) < (1e-5, "")


def test_min_weight_leaves_the_same_pairs_out():
    given = *layer(6, 2, 1, 5, 16, 5), 0.5
    w = in_batch_weights(given[4], 0.5)
    assert 6 <= (~select_pairs(w, 0.05)).sum() - 6 < 24                                          # some are left out, others are not
    ours, exact = (everything(read, *given, min_weight=0.05) for read in (triton_attention, cross_chunk_attention))
    assert worst(ours, exact) < (1e-5, "")
    assert worst(ours, everything(triton_attention, *given)) > (1e-3, "")
    listed = everything(lambda q, k, v, weights, mask: attend(q, k, v, mask, list_pairs(weights, mask, 0.05), False).transpose(1, 2), *given)
    assert all(torch.equal(listed[n], ours[n]) for n in ours)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 9), b=st.integers(1, 3), seed=st.integers(0, 1000), temperature=st.sampled_from([1e-4, 0.1, 2.0]), least=st.sampled_from([None, 0.1]))
def test_pairs_are_those_of_a_loop(n, b, seed, temperature, least):
    g = torch.Generator().manual_seed(seed)
    weights, mask = in_batch_weights(torch.randn(n * b, n * b, generator=g), temperature, n), torch.rand(n * b, 3, generator=g) < 0.5
    pairs, keep = list_pairs(weights, mask, least), select_pairs(weights * mask.any(-1), least)
    expected = [(i, j) for i in range(n * b) for j in range(n * b) if keep[i, j]]
    assert list(zip(pairs.reader.tolist(), pairs.read.tolist())) == expected
    assert pairs.weights.tolist() == [weights[i, j].item() for i, j in expected]
    assert pairs.first[0] == pairs.first_read[0] == 0 and pairs.first[-1] == pairs.first_read[-1] == len(expected)
    assert sorted(pairs.by_read.tolist()) == list(range(len(expected)))
    for c in range(n * b):
        assert list(range(pairs.first[c], pairs.first[c+1])) == [p for p, (i, j) in enumerate(expected) if i == c]
        assert pairs.by_read[pairs.first_read[c]:pairs.first_read[c+1]].tolist() == [p for p, (i, j) in enumerate(expected) if j == c]


@pytest.mark.parametrize("change, message", [({"value_norm": "half"}, "value_norm"), ({"min_weight": 1.0}, "min_weight")])
def test_bad_options(change, message):
    q, k, v, mask, s = layer(2, 1, 1, 2, 16, 0)
    with pytest.raises(ValueError, match=message): triton_attention(q, k, v, in_batch_weights(s, 1.0), mask, **change)


def test_an_empty_chunk_and_zero_values_are_finite():
    given = layer(3, 2, 1, 4, 16, 6)
    given[3][1], given[2][2] = False, 0
    ours, exact = (everything(read, *given, 0.5) for read in (triton_attention, cross_chunk_einsum))
    assert all(x.isfinite().all() for x in ours.values()) and ours["key"][1].abs().max() == 0     # nobody reads the empty chunk
    assert worst({"output": ours["output"]}, {"output": exact["output"]}) < (1e-5, "")


def both_streams(dtype, n, heads, kv, length, dim, seed, norm, window=None, exact=False):
    "Output at real tokens and all gradients of the doubled batch, by `attend` or by stock attention and the einsum."
    q, k, v, mask, s = layer(2 * n, heads, kv, length, dim, seed, torch.float64)
    mask, s = mask[:n], s[:n, :n]
    leaves = [x.to(dtype).to(torch.float64 if exact else dtype).requires_grad_() for x in (q, k, v)] + [s.to(torch.float64 if exact else torch.float32).requires_grad_()]
    real, age = mask.repeat(2, 1), torch.arange(length, device=DEVICE)[:, None] - torch.arange(length, device=DEVICE)
    past = (real[:, None] & ((age >= 0) & (age < (window or length))))[:, None]                    # (2N, 1, L, L)
    weights = in_batch_weights(leaves[3], 0.5)
    if exact:
        keys, values = (x.repeat_interleave(heads // kv, 1) for x in leaves[1:3])
        own = torch.nn.functional.scaled_dot_product_attention(leaves[0], keys, values, attn_mask=past | ~past.any(-1, keepdim=True))
        cross = cross_chunk_einsum(leaves[0][n:], leaves[1][:n], leaves[2][:n], weights, mask, None, norm)
        out = (own + torch.cat([torch.zeros_like(cross), cross])).transpose(1, 2)
    else: out = attend(*leaves[:3], mask, double_pairs(list_pairs(weights, mask)), past if seed % 3 or window or not mask.all() else True, None, norm)
    out = out * real[..., None, None]
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(DEVICE)
    out.backward(g.to(out.dtype))
    return dict(zip(("output", "query", "key", "value", "similarity"), (out.detach(), *(x.grad for x in leaves))))


@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 3), kv=st.integers(1, 2), share=st.integers(1, 3), length=st.sampled_from([1, 7, 40]), seed=st.integers(0, 1000),
       norm=st.sampled_from(VALUE_NORMS), window=st.sampled_from([None, 3]))
def test_both_streams_equal_stock_attention_and_einsum(n, kv, share, length, seed, norm, window):
    "With the model's mask: padding on either side, and a sliding window, which the cross-chunk part does not have."
    ours, exact = (both_streams(torch.float32, n, kv * share, kv, length, 16, seed, norm, window, e) for e in (False, True))
    assert worst({"similarity": ours.pop("similarity")} , {"similarity": exact.pop("similarity")}) < (2e-5, "")
    assert worst(ours, exact) < (2e-6, ""), worst(ours, exact)


def test_without_a_mask_the_whole_past_is_read_and_nothing_else():
    q, k, v, mask, s = layer(3, 4, 2, 40, 16, 2)
    nobody = list_pairs(torch.zeros(3, 3, device=DEVICE), torch.ones_like(mask))
    out = attend(q, k, v, torch.ones_like(mask), nobody).transpose(1, 2)
    exact = torch.nn.functional.scaled_dot_product_attention(q, *(x.repeat_interleave(2, 1) for x in (k, v)), is_causal=True)
    torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_operation_is_what_it_says(own, masked):
    "Schema, shapes without values, autograd's registration, and tracing by AOTAutograd with shapes that vary."
    q, k, v, mask, s = layer(6, 4, 2, 5, 16, 2)
    weights, half = in_batch_weights(s[:3, :3], 0.5), mask[:3]
    pairs = double_pairs(list_pairs(weights, half))
    given = [x.transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    past = torch.ones(6, 1, 5, 5, dtype=torch.bool, device=DEVICE) if masked else None
    lists = pairs.weights.detach().requires_grad_(), pairs.reader, pairs.read, pairs.first, pairs.by_read, pairs.first_read
    results = torch.library.opcheck(streams.attend_op, (*given, half, past, *lists, 0.25, own, True))
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@needs_gpu
@pytest.mark.parametrize("dtype, least", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(6, 9, 3, 160, 64), (3, 4, 2, 37, 128), (4, 14, 2, 157, 64)])
def test_on_a_gpu_both_streams_against_float64(shape, dtype, least):
    for window in (None, 20):
        ours, exact = (both_streams(dtype, *shape, 5, "unit", window, e) for e in (False, True))
        assert worst(ours, exact) < (least, ""), worst(ours, exact)


def test_strided_inputs():
    "Heads come out of a projection as (N, L, H, D), transposed; gradients from an expand."
    q, k, v, mask, s = layer(3, 4, 2, 5, 16, 8)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not any(x.is_contiguous() for x in turned)
    leaves = [[x.clone(memory_format=torch.preserve_format).requires_grad_() for x in given] for given in ((q, k, v), turned)]
    for given in leaves: triton_attention(*given, in_batch_weights(s, 0.5), mask).sum().backward()
    for a, b in zip(*leaves): assert torch.equal(a.grad, b.grad)


def test_memory_that_was_not_cleared_does_not_show(monkeypatch):
    "All results are stored, also where nobody reads or is read."
    dirty = lambda x, **kwargs: torch.full_like(x, float("nan"), **kwargs)
    given = layer(4, 2, 1, 5, 16, 10)
    read = lambda q, k, v, w, mask: triton_attention(q, k, v, w * torch.tensor([[0., 0, 0, 0], [1, 0, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0]], device=DEVICE), mask)
    clean = everything(read, *given, 0.5)
    monkeypatch.setattr(torch, "empty_like", dirty)
    again = everything(read, *given, 0.5)
    assert all(torch.equal(clean[n], again[n]) for n in clean)
    assert clean["output"][0].abs().max() == clean["key"][1].abs().max() == clean["value"][2].abs().max() == 0


def test_autocast_takes_the_type_of_products():
    seen = []
    q, k, v, mask, s = layer(2, 1, 1, 2, 16, 12)
    with pytest.MonkeyPatch.context() as patch:
        def noted(query, key, value, key_mask, mask, weights, *rest): return seen.append((query.dtype, key.dtype, value.dtype, weights.dtype)) or (query,)
        patch.setattr(streams, "attend_op", noted)
        for enabled in (True, False):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled): triton_attention(q, k, v, in_batch_weights(s, 1.0), mask)
    assert seen == [(torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32), (torch.float32,) * 4]


@pytest.mark.parametrize("dim, dtype", [(16, torch.float32), (20, torch.float32), (64, torch.bfloat16), (64, torch.float64)])
def test_read_chunks_falls_back_on_a_cpu(dim, dtype):
    q, k, v, mask, s = (x.cpu() for x in layer(3, 2, 1, 4, dim, 14, dtype))
    given = q, k, v, in_batch_weights(s, 0.5), mask
    assert not runs_triton(q) and torch.equal(read_chunks(*given), cross_chunk_attention(*given))


def test_what_runs_the_kernels(monkeypatch):
    class OnGpu(torch.Tensor): is_cuda = True
    seen = lambda dim, dtype: runs_triton(torch.empty(1, 1, 1, dim, dtype=dtype).as_subclass(OnGpu))
    assert all(seen(dim, dtype) for dim in streams.HEAD_SIZES for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert not seen(20, torch.float32) and not seen(256, torch.bfloat16) and not seen(64, torch.float64)
    monkeypatch.setattr(streams, "triton", None)
    assert not seen(64, torch.float32)


@needs_gpu
@pytest.mark.parametrize("shape", [(6, 9, 3, 160, 64), (5, 4, 2, 37, 128), (4, 14, 2, 157, 64), (3, 2, 1, 70, 16), (3, 4, 4, 20, 32)])
@pytest.mark.parametrize("dtype, least", [(torch.float32, 5e-6), (torch.float16, 4e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("norm", VALUE_NORMS)
def test_on_a_gpu_against_float64(shape, dtype, least, norm):
    "The inputs are rounded first, so that only what the kernels do counts. A value's gradient adds up 2,400 numbers of one sign here, one after the other: 3e-6 on an H200."
    q, k, v, mask, s = layer(*shape, 16)
    rounded = [x.to(dtype) for x in (q, k, v)]
    ours = everything(triton_attention, *rounded, mask, s, 0.5, value_norm=norm)
    exact = everything(cross_chunk_einsum, *(x.double() for x in rounded), mask, s.double(), 0.5, value_norm=norm)
    assert worst(ours, exact) < (least, ""), worst(ours, exact)


@needs_gpu
def test_on_a_gpu_read_chunks_takes_the_kernels_and_falls_back():
    for dim, kernels in ((64, True), (20, False)):
        q, k, v, mask, s = layer(4, 4, 2, 20, dim, 18)
        given = q, k, v, in_batch_weights(s, 0.5), mask
        assert runs_triton(q) == kernels
        assert torch.equal(read_chunks(*given), (triton_attention if kernels else cross_chunk_attention)(*given))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_same_bits_twice(dtype):
    q, k, v, mask, s = layer(16, 9, 3, 160, 64, 20)
    first, second = (everything(triton_attention, *(x.to(dtype) for x in (q, k, v)), mask, s, 0.5, 4) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
