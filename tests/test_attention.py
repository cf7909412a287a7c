"""Random shapes, masks and weights: the fused kernel equals the authors' einsum, forward and backward; awkward cases."""
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch.utils._python_dispatch import TorchDispatchMode

from revela_nb import attention
from revela_nb.attention import VALUE_NORMS, cross_chunk_attention, cross_chunk_einsum, in_batch_weights, read_by_sdpa, select_pairs


def layer(n, heads, kv_heads, length, dim, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, h, length, dim, generator=g, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    lengths = torch.randint(1, length + 1, (n,), generator=g)
    mask = torch.arange(length)[None] < lengths[:, None]
    if seed % 2: mask = mask.flip(1)  # left padding
    return q, k, v, mask, torch.randn(n, n, generator=g, dtype=dtype)


@settings(max_examples=25, deadline=None)
@given(groups=st.integers(1, 3), b=st.integers(1, 4), kv=st.integers(1, 3), share=st.integers(1, 3), length=st.integers(1, 7),
       dim=st.sampled_from([4, 8, 20]), seed=st.integers(0, 1000), norm=st.sampled_from(VALUE_NORMS), temperature=st.sampled_from([1e-3, 0.1, 2.0]))
def test_fused_equals_einsum(groups, b, kv, share, length, dim, seed, norm, temperature):
    q, k, v, mask, similarity = layer(groups * b, kv * share, kv, length, dim, seed)
    results = []
    for read in (cross_chunk_attention, cross_chunk_einsum):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, similarity)]
        out = read(*leaves[:3], in_batch_weights(leaves[3], temperature, b), mask, None, norm)
        (out * out.detach().cos()).sum().backward()
        results.append([out, *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)])
    for ours, theirs in zip(*results): torch.testing.assert_close(ours, theirs, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("norm", ["unit", "none"])
@pytest.mark.parametrize("group_size", [None, 2])
def test_gradcheck(norm, group_size):
    q, k, v, mask, similarity = layer(4, 2, 1, 3, 4, 2, torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, similarity)]
    run = lambda q, k, v, s: cross_chunk_attention(q, k, v, in_batch_weights(s, 0.5, group_size), mask, None, norm)
    assert torch.autograd.gradcheck(run, leaves)


def test_rescaled_is_unit_times_half_the_mean_value_length():
    q, k, v, mask, s = layer(3, 2, 2, 5, 8, 4)
    w = in_batch_weights(s, 0.5)
    mean = v.norm(dim=-1)[mask[:, None].expand(-1, 2, -1)].mean()
    torch.testing.assert_close(cross_chunk_attention(q, k, v, w, mask, value_norm="rescaled"), cross_chunk_attention(q, k, v, w, mask) * mean / 2)


def test_all_padding_chunk_and_zero_values_are_finite():
    q, k, v, mask, s = layer(3, 2, 1, 4, 8, 6)
    mask[1] = False
    v[2] = 0
    leaves = [x.requires_grad_() for x in (q, k, v, s)]
    out = cross_chunk_attention(*leaves[:3], in_batch_weights(leaves[3], 0.5), mask)
    out.sum().backward()
    assert out.isfinite().all() and all(x.grad.isfinite().all() for x in leaves)
    torch.testing.assert_close(out, cross_chunk_einsum(q, k, v, in_batch_weights(s, 0.5), mask))
    assert out.isfinite().all() and k.grad[1].abs().max() == 0  # nobody reads the empty chunk


def test_long_values_do_not_speak_louder():
    q, k, v, mask, s = layer(3, 2, 1, 4, 8, 8)
    w = in_batch_weights(s, 0.5)
    torch.testing.assert_close(cross_chunk_attention(q, k, 10 * v, w, mask), cross_chunk_attention(q, k, v, w, mask), atol=1e-5, rtol=1e-5)
    assert cross_chunk_attention(q, k, v, w, mask).norm(dim=-1).max() <= 1 + 1e-5  # a weighted mean of directions


def test_low_precision_stays_close():
    q, k, v, mask, s = layer(4, 4, 2, 16, 16, 10)
    w = in_batch_weights(s, 0.5)
    exact = cross_chunk_attention(q, k, v, w, mask)
    rounded = cross_chunk_attention(*(x.bfloat16() for x in (q, k, v)), w, mask).float()
    assert (rounded - exact).norm() < 0.01 * exact.norm()                                          # measured: 0.0047; bf16 keeps 8 bits, 0.004 a number


@pytest.mark.parametrize("similarity, kwargs, message", [
    (torch.ones(2, 3), {"temperature": 1.0}, "square"), (torch.ones(4, 4), {"temperature": 0.0}, "above 0"),
    (torch.ones(4, 4), {"temperature": 1.0, "group_size": 3}, "do not divide"), (torch.ones(4, 4), {"temperature": float("nan")}, "above 0")])
def test_bad_input(similarity, kwargs, message):
    with pytest.raises(ValueError, match=message): in_batch_weights(similarity, **kwargs)


def test_paper_temperature_does_not_overflow():
    w = in_batch_weights(torch.rand(16, 16, dtype=torch.bfloat16), 1e-4)
    assert w.dtype == torch.float32 and w.isfinite().all()
    torch.testing.assert_close(w.sum(1), torch.ones(16))


def test_a_weight_that_is_nan_shows():
    "Dropped as a pair that does not matter, it would leave a finite loss behind."
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 4, 8) for _ in range(3))
    w = torch.full((3, 3), 0.5).fill_diagonal_(0)
    w[0, 1] = float("nan")
    out = cross_chunk_attention(q, k, v, w, torch.ones(3, 4, dtype=torch.bool))
    assert out[0].isnan().any() and out[1:].isfinite().all()


class SdpaInstead:
    "What GPUs and low precision run, in the place of the matrix products."
    apply = staticmethod(read_by_sdpa)


@settings(max_examples=15, deadline=None)
@given(groups=st.integers(1, 3), b=st.integers(1, 4), kv=st.integers(1, 2), share=st.integers(1, 3), length=st.integers(1, 7),
       dim=st.sampled_from([4, 8, 20]), seed=st.integers(0, 1000), norm=st.sampled_from(VALUE_NORMS), temperature=st.sampled_from([1e-4, 0.1, 2.0]), pairs=st.sampled_from([1, 3, 256]))
def test_the_gpu_path_is_the_cpu_path(groups, b, kv, share, length, dim, seed, norm, temperature, pairs):
    q, k, v, mask, similarity = layer(groups * b, kv * share, kv, length, dim, seed)
    results = []
    for path in (SdpaInstead, attention.ReadByMatmul):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "ReadByMatmul", path)
            patch.setattr(attention, "PAIRS", pairs)
            leaves = [x.clone().requires_grad_() for x in (q, k, v, similarity)]
            out = cross_chunk_attention(*leaves[:3], in_batch_weights(leaves[3], temperature, b), mask, None, norm)
            (out * out.detach().cos()).sum().backward()
        results.append([out, *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)])
    for gpu, cpu in zip(*results): torch.testing.assert_close(gpu, cpu, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("norm", ["unit", "none"])
def test_gradcheck_of_the_gpu_path(norm, monkeypatch):
    monkeypatch.setattr(attention, "ReadByMatmul", SdpaInstead)
    q, k, v, mask, similarity = layer(4, 2, 1, 3, 4, 2, torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, similarity)]
    assert torch.autograd.gradcheck(lambda q, k, v, s: cross_chunk_attention(q, k, v, in_batch_weights(s, 0.5, 2), mask, None, norm), leaves)


@pytest.mark.parametrize("norm", VALUE_NORMS)
@pytest.mark.parametrize("temperature", [1.0, 0.02])
def test_bf16_gradients_stay_close(norm, temperature):
    q, k, v, mask, s = layer(6, 4, 2, 16, 16, 10)
    s, grads = 0.1 * s, []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)] + [s.clone().requires_grad_()]
        out = cross_chunk_attention(*leaves[:3], in_batch_weights(leaves[3], temperature, 3), mask, None, norm).float()
        out.square().sum().backward()
        grads.append([out, *(x.grad.float() for x in leaves)])
    errors = [((rounded - exact).norm() / exact.norm()).item() for exact, rounded in zip(*grads)]
    assert errors[0] < 0.01 and max(errors[1:]) < 0.02, errors                                     # measured, of all cases: 0.0055 and 0.0112


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 8), length=st.integers(1, 5), seed=st.integers(0, 1000), temperature=st.sampled_from([1.0, 0.1, 0.01, 1e-4]), exponent=st.floats(-6, -0.5))
def test_threshold_loses_at_most_the_weights_left_out(n, length, seed, temperature, exponent):
    q, k, v, mask, similarity = layer(n, 2, 1, length, 8, seed)
    w, threshold = in_batch_weights(0.1 * similarity, temperature), 10 ** exponent
    error = (cross_chunk_attention(q, k, v, w, mask, min_weight=threshold) - cross_chunk_einsum(q, k, v, w, mask)).norm(dim=-1)     # (N, H, L)
    assert (error <= (w * (w <= threshold)).sum(1)[:, None, None] + 1e-5).all()
    assert (cross_chunk_attention(q, k, v, w, mask) - cross_chunk_einsum(q, k, v, w, mask)).abs().max() < 1e-5                       # the default loses nothing


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 8), length=st.integers(1, 5), seed=st.integers(0, 1000), temperature=st.sampled_from([1.0, 0.1, 0.01, 1e-4]), exponent=st.floats(-6, -0.5),
       path=st.sampled_from([attention.ReadByMatmul.apply, read_by_sdpa]))
def test_threshold_bounds_the_similaritys_gradient_too(n, length, seed, temperature, exponent, path):
    """With gamma the gradient of the weights, that of a similarity left out is at most 2 w max|gamma| / tau. Leaving it out takes w |gamma| / tau from itself,
    and w_ij / tau times the sum of the w_ik gamma_ik left out from every pair of its reader. For a given gradient of the output; in float64, since 1 / tau enlarges rounding."""
    q, k, v, mask, similarity = layer(n, 2, 1, length, 8, seed, torch.float64)
    grad, (similarity, threshold) = q.cos(), (0.1 * similarity, 10 ** exponent)
    w = in_batch_weights(similarity, temperature).requires_grad_()
    gamma, = torch.autograd.grad(cross_chunk_einsum(q, k, v, w, mask), w, grad)
    def gradient(**options):
        s = similarity.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention.ReadByMatmul, "apply", path)
            return torch.autograd.grad(cross_chunk_attention(q, k, v, in_batch_weights(s, temperature), mask, **options), s, grad)[0]
    w, left_out = w.detach(), (w <= threshold).detach()
    exact, most = gradient(min_weight=0.0), (gamma * left_out).abs().amax(1, keepdim=True)
    weight_lost = (w * left_out).sum(1, keepdim=True)
    rounding = 1e-5 * gamma.abs().max() * w / temperature + 1e-12                                                                    # the einsum has its epsilon elsewhere
    assert (exact.abs() <= 2 * w * gamma.abs().amax(1, keepdim=True) / temperature + rounding).all()
    assert ((gradient(min_weight=threshold) - exact).abs() <= w * (left_out + weight_lost) * most / temperature + rounding).all()


@contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try: yield
    finally: torch.set_num_threads(before)


@pytest.mark.parametrize("number", [2, 3, 7])
def test_threads_share_the_readers_and_change_nothing(number, monkeypatch):
    "Five chunks in two groups, one chunk alone: shares are uneven, and with seven threads some would have none."
    monkeypatch.setattr(attention, "BLOCK", 10) # so that these pairs are many
    results = []
    for n in (1, number):
        q, k, v, mask, similarity = layer(5, 4, 2, 6, 8, 0)
        leaves = [x.requires_grad_() for x in (q, k, v, similarity)]
        with threads(n):
            weights = torch.nn.functional.pad(in_batch_weights(leaves[3][:4, :4], 1.0, 2), (0, 1, 0, 1))
            out = cross_chunk_attention(*leaves[:3], weights, mask)
            results.append([out.detach(), *torch.autograd.grad(out.cos().sum(), leaves)])
            assert torch.get_num_threads() == n
    for one, several in zip(*results): torch.testing.assert_close(several, one, atol=1e-6, rtol=1e-6)


def test_threads_see_neither_autocast_nor_inference_mode(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 10)
    q, k, v, mask, similarity = layer(4, 4, 2, 6, 8, 0)
    w = in_batch_weights(similarity, 1.0)
    with threads(2):
        expected = cross_chunk_attention(q, k, v, w, mask)
        with torch.autocast("cpu", torch.bfloat16): torch.testing.assert_close(cross_chunk_attention(q, k, v, w, mask), expected, atol=1e-6, rtol=0)
        with torch.inference_mode(): torch.testing.assert_close(cross_chunk_attention(q.clone(), k.clone(), v.clone(), w.clone(), mask), expected)


@pytest.mark.parametrize("pairs", [1, 3, 6.8, 20])
@pytest.mark.parametrize("n", [2, 8, 14])
def test_blocks_fit_the_room_made_for_them(n, pairs, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", int(pairs * 100))
    blocks = list(attention.list_blocks(torch.ones(n, n).fill_diagonal_(0).bool(), [0, n - 1], 100))
    assert max(len(j) for *_, j in blocks) * 100 <= attention.BLOCK
    for r, i in enumerate((0, n - 1)): assert torch.cat([j for place, reader, j in blocks if (place, reader) == (r, i)]).tolist() == [j for j in range(n) if j != i]


def test_an_error_in_a_thread_is_raised_and_leaves_their_number():
    def fail(readers):
        if 3 in readers: raise ValueError("reader 3")
    with threads(2):
        with pytest.raises(ValueError, match="reader 3"): attention.share_out(fail, torch.ones(4, 4).bool(), attention.BLOCK)
        assert torch.get_num_threads() == 2
        assert attention.share_out(lambda readers: readers, torch.ones(5, 5).bool(), attention.BLOCK) == [[0, 1, 2], [3, 4]]
        assert attention.share_out(lambda readers: (readers, torch.get_num_threads()), torch.ones(5, 5).bool(), 10) == [([0, 1, 2, 3, 4], 2)] # small products


class Written(TorchDispatchMode):
    "Numbers that matrix products write, and the largest tensor that anything makes."
    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out):
            self.largest = max(self.largest, out.numel())
            if any(product in str(func) for product in ("bmm", "aten.mm", "addmm")): self.products += out.numel()
        return out


def written(weights, length=32):
    q, k, v = (torch.randn(len(weights), h, length, 8, generator=torch.Generator().manual_seed(0), requires_grad=True) for h in (4, 2, 2))
    with threads(1), Written() as counted: # a dispatch mode sees its own thread only
        cross_chunk_attention(q, k, v, weights, torch.ones(len(weights), length, dtype=torch.bool)).sum().backward()
    return counted


def test_cost_grows_with_pairs_and_memory_does_not(monkeypatch):
    "No tensor is larger than the queries, and what the matrix products write is proportional to the pairs, however many chunks there are."
    monkeypatch.setattr(attention, "BLOCK", 2 * 32 * 32 * 2) # two pairs of 2 query heads and 32 tokens
    w = in_batch_weights(torch.rand(16, 16, generator=torch.Generator().manual_seed(0)), 1.0)
    dense, groups = written(w), written(in_batch_weights(torch.rand(16, 16, generator=torch.Generator().manual_seed(0)), 1.0, 4))
    alone = written(in_batch_weights(torch.rand(4, 4, generator=torch.Generator().manual_seed(0)), 1.0))
    assert groups.products == 4 * alone.products                     # four groups in one batch cost four groups
    assert dense.products > 4 * groups.products                      # 240 pairs against 48
    assert max(dense.largest, groups.largest) <= 16 * 4 * 32 * (8 + 1)     # the einsum holds 16 * 16 * 4 * 32 * 32 numbers, 57 times as many
