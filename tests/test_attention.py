"""Random shapes, masks and weights: the fused kernel equals the authors' einsum, forward and backward; awkward cases."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from revela_nb.attention import VALUE_NORMS, cross_chunk_attention, cross_chunk_einsum, in_batch_weights


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
    assert (rounded - exact).abs().max() < 0.05


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
