"""`revela bench`: ratios in one run, what does not fit is skipped, and the ways it compares are equal."""
import json

import pytest
import torch

from revela_nb.attention import cross_chunk_attention, select_pairs
from revela_nb import bench, patching, sweep
from revela_nb.bench import (METHODS, BenchCase, attention_by, authors_attention, bench_weights, layer_inputs, loop_attention, measure_case,
                             needed_bytes, random_lm, run_bench, run_case, step_flops, training_step)
from revela_nb.cli import main
from revela_nb.streams import read_chunks, triton_attention
from revela_nb.patching import in_batch_forward
from revela_nb.sweep import by_sdpa, draw_bench, reading_memory, sweep_cases

TINY = dict(layers=1, chunks=4, length=12, repeats=1, group_size=4)


def test_the_ways_agree():
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, h, 6, 8) for h in (4, 2, 2))
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, 4:] = False
    w = bench_weights(4, 4, 0.5)
    loop = loop_attention(q, k, v, w, mask)
    for way in (cross_chunk_attention, authors_attention, by_sdpa): torch.testing.assert_close(way(q, k, v, w, mask), loop)


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


def test_gradients_are_the_same_however_chunks_are_read():
    "Loop, einsum and ours over all pairs; groups one by one sum up to twice the gradient of the mean over both."
    def gradient(method, **options):
        torch.manual_seed(0)
        case, lm = BenchCase(method, **TINY | options), random_lm("smollm2-135m", 1)
        training_step(case, lm)()
        return lm.model.layers[0].self_attn.v_proj.weight.grad
    ours = gradient("fused")
    for method in ("loop", "einsum"): torch.testing.assert_close(gradient(method), ours)
    torch.testing.assert_close(gradient("apart", group_size=2), 2 * gradient("fused", group_size=2))
    torch.testing.assert_close(gradient("lean"), gradient("pairs"))


def test_what_does_not_fit_is_skipped_with_a_reason(monkeypatch):
    assert "GB" in run_case(BenchCase("einsum", chunks=256, length=512))["skipped"]
    assert "more than" in run_case(BenchCase("plain", **TINY), timeout=0.01)["skipped"]
    assert "no shape" in run_case(BenchCase("plain", shape="nothing", **TINY))["skipped"]
    assert "too many" in run_case(BenchCase("loop", chunks=17, length=2, layers=1))["skipped"]
    with pytest.raises(ValueError, match="no shape"): run_bench([BenchCase("plain", shape="nothing")])
    monkeypatch.setattr(bench, "free_memory", lambda: 2**20)
    monkeypatch.setattr(bench.subprocess, "run", lambda *a, **k: pytest.fail("started"))
    for method in (*METHODS, "layer"): assert "needs about" in run_case(BenchCase(method))["skipped"]


def test_estimate_of_memory():
    "Of what was measured on the CPU (2026-11-26, GB): the recorded run of 24_speed, and smaller ones."
    two = dict(length=64, layers=2)
    measured = [(5.75, BenchCase("loop")), (3.83, BenchCase("matched", shape="llama-3.2-1b", layers=1, chunks=4, length=48)), (4.51, BenchCase("plain")), (1.78, BenchCase("matched")), (5.66, BenchCase("einsum")), (1.87, BenchCase("fused")),
                (0.69, BenchCase("plain", chunks=4, length=64)), (0.61, BenchCase("matched", chunks=4, length=64)), (1.14, BenchCase("einsum", **two)),
                (1.52, BenchCase("loop", **two)), (0.84, BenchCase("einsum", checkpointing=True, **two)), (1.05, BenchCase("matched", length=64, layers=8, checkpointing=True))]
    if torch.cuda.is_available(): pytest.skip("the figures are a CPU's")
    for peak, case in measured: assert 0.75 < needed_bytes(case) / (peak * 1e9) < 1.4, (case, needed_bytes(case) / 1e9, peak)
    assert needed_bytes(BenchCase("plain", chunks=256)) > 40e9 > needed_bytes(BenchCase("apart", chunks=256))


def test_report_is_handed_out_after_every_case(monkeypatch):
    "A case that kills the run leaves what was known before; ratios to matched where plain did not run."
    rows = {"matched": {"seconds": 2.0, "peak": 10}, "fused": {"seconds": 3.0, "peak": 11}}
    def run(case, timeout):
        if case.method == "pairs": raise KeyboardInterrupt
        return vars(case) | {"device": "2 CPU threads"} | rows.get(case.method, {"skipped": "needs about 70 GB"})
    monkeypatch.setattr(bench, "run_case", run)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        run_bench([BenchCase(m) for m in ("plain", "matched", "fused", "pairs")], save=lambda report: seen.append(json.loads(json.dumps(report))))
    assert [len(r["rows"]) for r in seen] == [1, 2, 3]
    assert seen[-1]["rows"][2]["matched_ratio"] == 1.5 and "time_ratio" not in seen[-1]["rows"][2]


def test_no_empty_picture(tmp_path):
    skipped = [vars(BenchCase(m)) | {"skipped": "needs about 70 GB"} for m in ("plain", "fused")]
    with pytest.raises(ValueError, match="nothing to draw: plain: needs about 70 GB"): draw_bench({"rows": skipped}, tmp_path / "b.png")
    assert not list(tmp_path.iterdir())
    only_matched = skipped + [vars(BenchCase(m, chunks=n)) | {"seconds": 1.0, "peak": 1, "matched_ratio": 1.0} for m in ("matched", "fused") for n in (16, 32)]
    draw_bench({"rows": only_matched}, tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 5000


def test_sweep_varies_one_thing_at_a_time():
    cases = sweep_cases(3)
    for axis, (values, fixed) in sweep.SWEEP.items():
        some = [c for c in cases if c.axis == axis]
        if axis != "groups": assert list(dict.fromkeys(getattr(c, axis) for c in some)) == values
        varying = {name for name in vars(some[0]) if len({getattr(c, name) for c in some}) > 1}
        assert varying - {"method", "repeats"} == ({axis} if axis != "groups" else set())
        assert "plain" == some[0].method and "matched" == some[1].method
    assert {c.method for c in cases} == set(METHODS) - {"sdpa"}


READERS = {"matmul": read_chunks, "sdpa": by_sdpa}

@pytest.mark.parametrize("way", READERS)
def test_memory_grows_linearly_in_pairs(way):
    "What is kept and what is held at most: each pair adds at most what its own queries and keys take, and the last as much as the first."
    rows = [reading_memory(READERS[way], n, chunks=16, length=32) for n in (1, 4, 8, 15)]
    pairs = [r["pairs"] for r in rows]
    assert pairs == [16, 64, 128, 240]
    for what in ("kept", "peak"):
        slopes = [(b[what] - a[what]) / (b["pairs"] - a["pairs"]) for a, b in zip(rows, rows[1:])]
        one = 4 * 9 * 32 * 64 * 8                                              # bytes of eight (H, L, D) tensors
        assert all(-0.2 * one < s < one for s in slopes), (what, slopes)
        assert slopes[-1] <= 1.5 * max(slopes[0], 0.05 * one), (what, slopes) # not with their square


def test_einsum_keeps_its_tensor_whatever_the_pairs():
    few, all_pairs = (reading_memory(authors_attention, n, chunks=8, length=32) for n in (1, 7))
    assert few["kept"] == all_pairs["kept"] > 4 * 8 * 8 * 9 * 32 * 32
    assert all_pairs["kept"] > 10 * reading_memory(read_chunks, 7, chunks=8, length=32)["kept"]


def saved_bytes(read, neighbours):
    "What autograd saves for backward, each storage once, beyond the inputs; and the pairs."
    inputs, weights = layer_inputs("smollm2-135m", 4, 8), bench_weights(4, 4, 1.0, neighbours).detach().requires_grad_()
    seen = {}
    def pack(x): return seen.setdefault(x.untyped_storage().data_ptr(), x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): read(*inputs, weights, torch.ones(4, 8, dtype=torch.bool, device=weights.device))
    return sum(x.untyped_storage().nbytes() for x in seen.values()), int(select_pairs(weights).sum())


def test_triton_saves_a_number_for_each_pair_head_and_token_and_matmul_nothing():
    "The kernels' log of the softmax's denominator, the pair's weight, and some lists of integers."
    matmul = [saved_bytes(read_chunks, n)[0] for n in (1, 2, 3)]
    assert max(matmul) - min(matmul) <= 64 * 12
    pytest.importorskip("triton", reason="needs triton: pip install triton (Linux)")
    if torch.cuda.is_available(): pytest.skip("the inputs are on the CPU")
    (a, p), (b, q), (c, r) = (saved_bytes(triton_attention, n) for n in (1, 2, 3))
    assert (p, q, r) == (4, 8, 12) and 4 * 9 * 8 <= (b - a) / (q - p) <= 4 * 9 * 8 + 64
    assert (c - b) / (r - q) == pytest.approx((b - a) / (q - p), abs=16)


def test_command(tmp_path, capsys):
    words = ["bench", "--layers", "1", "--chunks", "2", "--shape", "smollm2-135m", "--lengths", "8", "--group_size", "2", "--repeats", "1", "--out", str(tmp_path / "b")]
    assert main(words) == 0
    report = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert len(report["rows"]) == 7 and (tmp_path / "b" / "bench.png").stat().st_size > 5000
    assert all(r["time_ratio"] > 0 for r in report["rows"]) and {r["time_ratio"] for r in report["rows"] if r["method"] == "plain"} == {1.0}
    assert report["layer"]["einsum"] > 0
    shown = capsys.readouterr().out
    assert "fused" in shown and "x matched" in shown
    assert main(["bench", "--shape", "gpt"]) == 2


def test_command_where_nothing_fits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda: 2**20)
    assert main(["bench", "--shape", "smollm2-135m", "llama-3.2-1b", "--chunks", "2", "--out", str(tmp_path)]) != 0
    report = json.loads((tmp_path / "bench.json").read_text())
    assert {r["shape"] for r in report["rows"]} == {"smollm2-135m", "llama-3.2-1b"} and all("GB" in r["skipped"] for r in report["rows"])
    assert "nothing to draw" in capsys.readouterr().err and not (tmp_path / "bench.png").exists()


def test_sweep_command(tmp_path, monkeypatch):
    "The preset, shrunken: every axis, one report, one picture of small multiples."
    monkeypatch.setattr(sweep, "SWEEP", {"temperature": ([1.0, 0.1], dict(chunks=2, length=4, layers=1)), "shape": (["smollm2-135m"], dict(layers=1, chunks=2, length=4))})
    monkeypatch.setattr(sweep, "ALL", ("plain", "matched", "fused"))
    monkeypatch.setattr(bench, "run_case", lambda case, timeout: (bench.time_layer if case.method == "layer" else measure_case)(case))
    assert main(["bench", "--sweep", "--repeats", "1", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [r["axis"] for r in report["rows"]] == ["temperature"] * 5 + ["shape"] * 3
    assert all("seconds" in r and r["matched_ratio"] > 0 for r in report["rows"] if r["method"] != "plain")
    assert (tmp_path / "bench.png").stat().st_size > 5000
