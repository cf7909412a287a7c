"""Evaluation: BEIR data in, search, figures equal to beir's and pytrec_eval's, run files, BM25."""
import gzip, json, logging, os, random, socket, zipfile
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import torch
from beir.datasets.data_loader import GenericDataLoader
from beir.retrieval.evaluation import EvaluateRetrieval
from hypothesis import given, settings, strategies as st

from revela_nb.bm25 import bm25_run, split_words
from revela_nb.evaluation import dense_run, encode_across_processes, evaluate, load_beir, read_run, score_queries, score_run, search, write_run

SHARED = Path(__file__).parents[2] / "shared" / "data"
CORPUS = [{"_id": "d1", "title": "Cats", "text": "The cat sat on the warm mat."}, {"_id": "d2", "title": "", "text": "Dogs bark at cats. \u00e9\u2028x"},
          {"_id": "d3", "text": "Python lists grow."}, {"_id": "q1", "title": "Lists", "text": "Append adds one item."}]
QUERIES = [{"_id": "q1", "text": "warm cat"}, {"_id": "q2", "text": "append to a list"}, {"_id": "q3", "text": "only in train"}]
QRELS = "query-id\tcorpus-id\tscore\nq2\tq1\t2\nq2\td3\t0\nq1\td1\t1\n"


def write_set(folder, gz=False, corpus=CORPUS, queries=QUERIES, qrels=QRELS):
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    def write(name, text): (gzip.open if gz else open)(folder / (name + ".gz" * gz), "wt", encoding="utf-8").write(text)
    def lines(records): return "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records)
    write("corpus.jsonl", lines(corpus)); write("queries.jsonl", lines(queries)); write("qrels/test.tsv", qrels)
    return folder


def test_load_equals_beirs_loader(tmp_path):
    ours = load_beir(write_set(tmp_path / "plain"))
    corpus, queries, qrels = GenericDataLoader(str(tmp_path / "plain")).load("test")
    assert ours[1:] == (queries, qrels) and list(ours[1]) == list(queries) == ["q2", "q1"]
    assert ours[0] == {i: {"title": d["title"] or "", "text": d["text"]} for i, d in corpus.items()}
    assert load_beir(write_set(tmp_path / "gz", gz=True)) == ours


def test_load_without_header_and_with_bom(tmp_path):
    folder = write_set(tmp_path, qrels=QRELS.split("\n", 1)[1])
    (folder / "queries.jsonl").write_bytes(b"\xef\xbb\xbf" + (folder / "queries.jsonl").read_bytes())
    assert load_beir(folder)[2] == {"q2": {"q1": 2, "d3": 0}, "q1": {"d1": 1}}


@pytest.mark.parametrize("change, message", [
    (dict(corpus=[*CORPUS, "{half"]), r"corpus.jsonl', line 5: not JSON"),
    (dict(corpus=[*CORPUS, CORPUS[0]]), r"corpus.jsonl', line 5: the id 'd1' was there before"),
    (dict(corpus=[*CORPUS, {"_id": "x"}]), r"corpus.jsonl', line 5: an object with"),
    (dict(corpus=[]), r"corpus.jsonl' is empty"),
    (dict(queries=["[1]"]), r"queries.jsonl', line 1: an object"),
    (dict(qrels=QRELS + "q1 d2 1\n"), r"test.tsv', line 5: 'query id<tab>"),
    (dict(qrels=QRELS + "q1\td2\thigh\n"), r"test.tsv', line 5"),
    (dict(qrels=QRELS + "q1\td1\t0\n"), r"line 5: q1 and d1 were judged 1 before, now 0"),
    (dict(qrels="query-id\tcorpus-id\tscore\n"), "holds no judgement"),
    (dict(qrels="zzz\td1\t1\n"), "judges no query"),
])
def test_malformed_files(tmp_path, change, message):
    with pytest.raises(ValueError, match=message): load_beir(write_set(tmp_path, **change))


def test_broken_bytes(tmp_path):
    folder = write_set(tmp_path / "a")
    (folder / "queries.jsonl").write_bytes(b'{"_id": "q1", "text": "ok"}\n{"_id": "q2", "text": "\xff"}\n')
    with pytest.raises(ValueError, match="queries.jsonl', line 2: not UTF-8"): load_beir(folder)
    folder = write_set(tmp_path / "b", gz=True)
    path = folder / "corpus.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="broken gzip"): load_beir(folder)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"): load_beir(tmp_path / "nowhere")
    folder = write_set(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="qrels/dev.tsv .*Splits that are there: test"): load_beir(folder, "dev")
    (folder / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="neither queries.jsonl nor queries.jsonl.gz"): load_beir(folder)


def test_unknown_ids_are_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "revela_nb.evaluation"):
        _, queries, qrels = load_beir(write_set(tmp_path, qrels=QRELS + "gone\td1\t1\nq1\tlost\t1\n"))
    assert qrels["q1"] == {"d1": 1, "lost": 1} and "gone" not in qrels and "gone" not in queries
    assert "1 judged queries" in caplog.text and "1 judged documents" in caplog.text


qrels_strategy = st.dictionaries(st.sampled_from(["q1", "q2", "q3"]), st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 3), min_size=1), min_size=1)


@given(qrels_strategy, st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_figures_equal_beirs(qrels, seed):
    rng = random.Random(seed)
    run = {q: {d: rng.random() for d in rng.sample("abcdefghijklmnopqrstuvw", 15)} for q in qrels}
    ours = score_run(run, qrels)
    ndcg, _, recall, _ = EvaluateRetrieval.evaluate(qrels, {q: dict(d) for q, d in run.items()}, [10, 100])
    mrr = EvaluateRetrieval.evaluate_custom(qrels, run, [10], "mrr")
    for value, theirs in zip(ours.values(), [ndcg["NDCG@10"], recall["Recall@100"], mrr["MRR@10"]]): assert abs(value - theirs) < 1e-5


def test_missing_queries_count_as_zero():
    qrels = {"q1": {"a": 1}, "q2": {"a": 1}, "q3": {"b": 1}}
    run = {"q1": {"a": 1.0}, "q2": {}}
    assert len(pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate({"q1": {"a": 1.0}})) == 1 # the trap
    assert score_run(run, qrels) == {"ndcg@10": 1 / 3, "recall@100": 1 / 3, "mrr@10": 1 / 3}
    assert list(score_queries(run, qrels)) and set(score_queries(run, qrels)) == set(qrels)
    assert score_run({}, qrels)["ndcg@10"] == 0
    with pytest.raises(ValueError, match="no query in common"): score_run({"other": {"a": 1.0}}, qrels)


def test_mrr_is_cut_at_ten():
    run = {"q": {f"d{i:02}": 100.0 - i for i in range(20)}}
    assert score_run(run, {"q": {"d09": 1}})["mrr@10"] == 0.1
    assert score_run(run, {"q": {"d10": 1}})["mrr@10"] == 0.0


def test_identical_ids_only_when_asked():
    qrels, run = {"q1": {"d1": 1, "q1": 1}}, {"q1": {"q1": 2.0, "d1": 1.0}}
    assert score_run(run, qrels)["ndcg@10"] == 1.0
    assert score_run(run, {"q1": {"d1": 1}})["mrr@10"] == 0.5
    assert score_run(run, {"q1": {"d1": 1}}, ignore_identical_ids=True)["mrr@10"] == 1.0
    assert run == {"q1": {"q1": 2.0, "d1": 1.0}} # not changed, unlike beir
    ndcg = EvaluateRetrieval.evaluate({"q1": {"d1": 1}}, {"q1": dict(run["q1"])}, [10])[0]["NDCG@10"]
    assert ndcg == score_run(run, {"q1": {"d1": 1}}, ignore_identical_ids=True)["ndcg@10"]


def test_scores_must_be_numbers():
    with pytest.raises(ValueError, match="not a finite number"): score_run({"q": {"a": float("nan")}}, {"q": {"a": 1}})
    assert score_run({"q": {"a": np.float32(1), "b": 0}}, {"q": {"a": 1}})["mrr@10"] == 1.0


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**20))
@settings(max_examples=30, deadline=None)
def test_search_equals_a_sort(n, m, k, seed):
    generator = torch.Generator().manual_seed(seed)
    queries, passages = torch.randn(n, 6, generator=generator), torch.randn(m, 6, generator=generator)
    scores, indices = search(queries, passages, k)
    expected, order = (queries @ passages.T).topk(min(k, m))
    assert scores.shape == indices.shape == (n, min(k, m))
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose((queries @ passages.T).gather(1, torch.as_tensor(indices)), expected, atol=1e-5)


def test_search_edges():
    assert search(torch.randn(2, 4), torch.zeros(0, 4))[1].shape == (2, 0)
    assert search(torch.zeros(0, 4), torch.randn(3, 4), 2)[1].shape == (0, 2)
    assert search(torch.randn(1, 4, requires_grad=True), np.random.randn(3, 4), 1)[1].shape == (1, 1)
    with pytest.raises(ValueError, match="same width"): search(torch.randn(2, 4), torch.randn(2, 5))
    with pytest.raises(ValueError, match="same width"): search(torch.randn(4), torch.randn(2, 4))
    with pytest.raises(ValueError, match="k must be at least 1"): search(torch.randn(2, 4), torch.randn(2, 4), 0)


class Letters:
    "Counts letters; remembers what it was given."
    def encode_passages(self, texts, batch_size=32, progress=False):
        self.passages = texts
        return torch.nn.functional.normalize(torch.tensor([[text.lower().count(c) + 1e-3 for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts]), dim=-1)
    def encode_queries(self, texts, batch_size=32, progress=False): return Letters().encode_passages(texts)


def test_dense_run_and_evaluate(tmp_path):
    corpus, queries, qrels = load_beir(write_set(tmp_path))
    letters = Letters()
    run = dense_run(letters, corpus, queries, k=2)
    assert letters.passages == ["Cats The cat sat on the warm mat.", "Dogs bark at cats. \u00e9\u2028x", "Python lists grow.", "Lists Append adds one item."]
    assert list(run) == ["q2", "q1"] and all(len(d) == 2 and list(d.values()) == sorted(d.values(), reverse=True) for d in run.values())
    assert evaluate(letters, corpus, queries, qrels) == score_run(dense_run(letters, corpus, queries), qrels)
    assert evaluate(letters, corpus, queries, qrels, k=1, ignore_identical_ids=True) == score_run(dense_run(letters, corpus, queries, k=2), qrels, True)


def test_run_file_round_trip(tmp_path):
    run = {"q2": {"b": 0.1 + 0.2, "a": 0.3, "c": -1e-9}, "q1": {"z": 5.0, "y": 5.0}}
    write_run(run, tmp_path / "new" / "x.run", tag="t")
    back = read_run(tmp_path / "new" / "x.run")
    assert back == run and [list(d) for d in back.values()] == [list(d) for d in run.values()] and list(back) == list(run)
    assert (tmp_path / "new" / "x.run").read_text().splitlines()[0] == "q2 Q0 b 1 0.30000000000000004 t"
    write_run({"q": {"low": 1.0, "high": 2.0}}, tmp_path / "new" / "x.run")
    assert list(read_run(tmp_path / "new" / "x.run")["q"]) == ["high", "low"] and len(list((tmp_path / "new").iterdir())) == 1


def test_run_file_errors(tmp_path):
    path = tmp_path / "x.run"
    write_run({"q": {"d": 1.0}}, path)
    before = path.read_text()
    for bad in [{"a b": {"d": 1.0}}, {"q": {"d\t1": 1.0}}, {"q": {"": 1.0}}]:
        with pytest.raises(ValueError, match="no spaces"): write_run(bad, path)
    with pytest.raises(TypeError): write_run({"q": {"d": 1.0}, "r": {"e": None}}, path)
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["x.run"] # all or nothing
    for line, message in [("q Q0 d 1 x t", "line 2"), ("q Q0 d 1 1.0", "line 2"), ("q Q0 d 9 2.0 t", "line 2: d is listed twice")]:
        path.write_text(before + line + "\n")
        with pytest.raises(ValueError, match=message): read_run(path)
    with pytest.raises(FileNotFoundError, match="no run file"): read_run(tmp_path / "none.run")


def test_bm25_edges(caplog):
    corpus = {d["_id"]: d for d in CORPUS}
    run = bm25_run(corpus, {"a": "cats", "b": "zebra", "c": "", "d": "the"}, k=50)
    assert set(run["a"]) == {"d1", "d2"} and run["b"] == run["c"] == run["d"] == {}
    assert bm25_run(corpus, {"a": "cats"}, k=1) == {"a": dict(list(run["a"].items())[:1])}
    assert bm25_run(corpus, {}) == {} and bm25_run({}, {"a": "cats"}) == {"a": {}}
    assert bm25_run({"x": {"title": "", "text": ""}, "y": {"title": "", "text": "the"}}, {"a": "the"}) == {"a": {}}
    assert bm25_run(corpus, {"a": "cats"}) == bm25_run(corpus, {"a": "cats"})
    with caplog.at_level(logging.DEBUG): bm25_run(corpus, {"a": "cats"})
    assert not [r for r in caplog.records if r.name.startswith("bm25s")]


def test_split_words():
    assert split_words("get_userName __init__ HTTPServer2 utf8 plain text") == "get user Name  init  HTTP Server2 utf8 plain text"


@pytest.mark.skipif(not (SHARED / "scifact").is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("name, documents, count, figure", [("scifact", 5183, 300, 0.686), ("cosqa", 6267, 500, 0.332), ("squad", 2067, 2000, 0.871)])
def test_bm25_reference_figures(tmp_path, name, documents, count, figure):
    corpus, queries, qrels = load_beir(SHARED / name)
    assert (len(corpus), len(queries), len(qrels)) == (documents, count, count)
    run = bm25_run(corpus, queries)
    assert abs(score_run(run, qrels)["ndcg@10"] - figure) < 0.005
    write_run(run, tmp_path / "x.run")
    raw = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(read_run(tmp_path / "x.run"))
    assert abs(sum(s["ndcg_cut_10"] for s in raw.values()) / len(qrels) - score_run(run, qrels)["ndcg@10"]) < 1e-9


def zipped(folder, target, inside="set/"):
    with zipfile.ZipFile(target, "w") as packed:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()): packed.write(path, f"{inside}{path.relative_to(folder)}")
    return target


@pytest.mark.parametrize("inside", ["set/", ""])
@pytest.mark.parametrize("gz", [False, True])
def test_a_zip_holds_what_the_folder_holds(tmp_path, inside, gz):
    folder = write_set(tmp_path / "set", gz)
    assert load_beir(zipped(folder, tmp_path / "set.zip", inside)) == load_beir(folder)


def test_bad_zips_are_named(tmp_path):
    path = zipped(write_set(tmp_path / "set"), tmp_path / "x.zip")
    whole = path.read_bytes()
    for broken in (b"", b"no zip", whole[:-30], whole.replace(b"The cat", b"The dog", 1)):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="x.zip' is not a whole zip"): load_beir(path)
    with zipfile.ZipFile(path, "w") as packed: packed.writestr("readme.txt", "none")
    with pytest.raises(ValueError, match="x.zip' holds 0 corpus.jsonl"): load_beir(path)
    zipped(write_set(tmp_path / "set", corpus=["{half"]), path)
    with pytest.raises(ValueError, match=r"x.zip/corpus.jsonl', line 1: not JSON"): load_beir(path)
    with pytest.raises(FileNotFoundError, match="nothing.zip"): load_beir(tmp_path / "nothing.zip")
    zipped(write_set(tmp_path / "set"), path)
    with pytest.raises(FileNotFoundError, match="x.zip.*dev.tsv.*that are there: test"): load_beir(path, "dev")


def test_a_zip_writes_nothing_outside(tmp_path):
    path = zipped(write_set(tmp_path / "set"), tmp_path / "x.zip")
    with zipfile.ZipFile(path, "a") as packed: packed.writestr(f"../../../../../..{tmp_path}/out/qrels/evil.tsv", "x")
    load_beir(path)
    assert not (tmp_path / "out").exists()


def share_of_two(rank, world, port, out):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    seen = []
    def encode(texts): seen.extend(texts); return torch.tensor([[float(len(t)), float(ord(t[0]))] for t in texts])
    found = [encode_across_processes(encode, ["a" * i + "b" for i in range(n)]).tolist() for n in (1, 2, 7)]
    (Path(out) / f"{rank}.json").write_text(json.dumps([found, len(seen)]))
    torch.distributed.barrier() # who exits while the other still talks can be aborted
    torch.distributed.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    torch.multiprocessing.start_processes(share_of_two, (2, port, str(tmp_path)), 2, start_method="spawn")
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    expected = [[[i + 1., float(ord("a" if i else "b"))] for i in range(n)] for n in (1, 2, 7)]
    assert [r[0] for r in results] == [expected, expected]
    assert sum(r[1] for r in results) == 1 + 2 + 7 and min(r[1] for r in results) > 0 # each text once, and both worked
