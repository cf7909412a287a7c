"""`revela bench`: ratios in one run, what does not fit is skipped, and the ways it compares are equal."""
import json

import pytest
import torch

from revela_nb import patching
from revela_nb.attention import cross_chunk_attention, select_pairs
from revela_nb.bench import (METHODS, BenchCase, attention_by, authors_attention, bench_weights, einsum_bytes, loop_attention, measure_case,
                             random_lm, run_bench, run_case, step_flops)
from revela_nb.cli import main
from revela_nb.kernel import read_chunks
from revela_nb.patching import in_batch_forward

TINY = dict(layers=1, chunks=4, length=12, repeats=1, group_size=4)


def test_the_ways_agree():
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, h, 6, 8) for h in (4, 2, 2))
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, 4:] = False
    w = bench_weights(4, 4, 0.5)
    loop = loop_attention(q, k, v, w, mask)
    for way in (cross_chunk_attention, authors_attention): torch.testing.assert_close(way(q, k, v, w, mask), loop)


def test_einsum_takes_the_shipped_functions_place_and_leaves_it():
    lm, ids = random_lm("smollm2-135m", 1), torch.randint(0, 99, (4, 8))
    w, mask = bench_weights(4, 4, 1.0).detach(), torch.ones(4, 8, dtype=torch.long)
    shipped = in_batch_forward(lm, ids, mask, w).loss
    calls = []
    with attention_by(lambda *a: calls.append(1) or authors_attention(*a)): einsum = in_batch_forward(lm, ids, mask, w).loss
    torch.testing.assert_close(shipped, einsum)
    assert calls and patching.read_chunks is read_chunks
    with pytest.raises(RuntimeError), attention_by(authors_attention): raise RuntimeError
    assert patching.read_chunks is read_chunks


def test_weights_have_as_many_pairs_as_asked_for():
    assert select_pairs(bench_weights(8, 8, 1.0)).sum() == 56
    assert select_pairs(bench_weights(8, 4, 1.0)).sum() == 24
    assert (select_pairs(bench_weights(8, 8, 1.0, 2)).sum(1) == 2).all()
    assert select_pairs(bench_weights(8, 8, 1e-4)).sum() <= 16
    torch.testing.assert_close(bench_weights(8, 8, 1.0, 2).sum(1), torch.ones(8))


def test_operations_grow_as_they_must():
    one, two = BenchCase("plain", chunks=16), BenchCase("plain", chunks=32)
    assert step_flops(two) == 2 * step_flops(one)
    assert step_flops(one, 10) - step_flops(one) == pytest.approx((step_flops(one, 20) - step_flops(one)) / 2)
    parameters = sum(p.numel() for p in random_lm("smollm2-135m", 4).parameters())
    assert step_flops(one) == pytest.approx(6 * parameters * 2 * 16 * 160, rel=.05) # the head's matrix is the embedding's


def test_measures_checkpointing_and_every_method():
    for method in METHODS:
        result = measure_case(BenchCase(method, checkpointing=method == "fused", **TINY))
        assert result["seconds"] > 0 and result["peak"] >= 0 and result["method"] == method


def test_what_does_not_fit_is_skipped_with_a_reason(monkeypatch):
    assert "GB" in run_case(BenchCase("einsum", chunks=256, length=512))["skipped"]
    assert einsum_bytes(BenchCase("einsum", checkpointing=True)) < einsum_bytes(BenchCase("einsum"))
    assert "more than" in run_case(BenchCase("plain", **TINY), timeout=0.01)["skipped"]
    assert "no shape" in run_case(BenchCase("plain", shape="nothing", **TINY))["skipped"]
    with pytest.raises(ValueError, match="no shape"): run_bench("nothing")


def test_command(tmp_path, capsys):
    words = ["bench", "--layers", "1", "--chunks", "2", "4", "--lengths", "8", "--group_size", "2", "--repeats", "1", "--out", str(tmp_path / "b")]
    assert main(words) == 0
    report = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert len(report["rows"]) == 10 and (tmp_path / "b" / "bench.png").stat().st_size > 5000
    assert all(r["time_ratio"] > 0 for r in report["rows"]) and {r["time_ratio"] for r in report["rows"] if r["method"] == "plain"} == {1.0}
    assert "fused" in capsys.readouterr().out
    assert main(["bench", "--shape", "gpt"]) == 2
