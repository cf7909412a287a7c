"""Comparison of runs, fusion, suites from the hub (with a stand-in of the hub's exact columns), and mteb's nDCG@10."""
import math
import zipfile

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from hypothesis import given, settings, strategies as st

import revela_nb.compare as compare
from revela_nb.compare import choose_weight, compare_runs, fuse_ranks, fuse_scores, known_items, load_task, remove_excluded
from revela_nb.bm25 import bm25_run
from revela_nb.evaluation import load_beir, score_queries, score_run

QRELS = {f"q{i}": {"r": 1} for i in range(12)}


def ranks_run(ranks): return {f"q{i}": {**{f"w{j}": 10. - j for j in range(1, r)}, "r": 10. - r} for i, r in enumerate(ranks)}


def test_p_value_is_the_share_of_sign_patterns():
    a, b = np.array([1, 1, 2, 1, 3, 1, 1, 2, 1, 1, 4, 1]), np.array([2, 1, 1, 3, 2, 2, 4, 2, 1, 5, 2, 3])
    d = 1 / a - 1 / b
    patterns = 1 - 2 * ((np.arange(2 ** 12)[:, None] >> np.arange(12)) & 1)
    found = compare_runs(ranks_run(a), ranks_run(b), QRELS, "mrr@10")
    assert found.p_value == pytest.approx(np.mean(abs(patterns @ d / 12) >= abs(d.mean()) - 1e-12), abs=1e-12)
    assert found.difference == pytest.approx(d.mean()) and found.low < d.mean() < found.high
    means = d[np.random.default_rng(1).integers(0, 12, (20_000, 12))].mean(1)
    assert [found.low, found.high] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=.015)
    assert found.count_changes() == ((d > 1e-9).sum(), (abs(d) <= 1e-9).sum(), (d < -1e-9).sum())


def test_changes_are_ranked_and_missing_queries_count():
    found = compare_runs(ranks_run([1, 2, 1]), {"q1": {"r": 1.}, "q2": {"w": 2., "r": 1.}}, {q: QRELS[q] for q in ("q0", "q1", "q2")}, "mrr@10")
    assert found.list_changes() == ([("q0", 1., 0.), ("q2", 1., .5)], [("q1", .5, 1.)])
    assert found.list_changes(1)[0] == [("q0", 1., 0.)]
    assert compare_runs({}, ranks_run([1] * 12), QRELS).difference == -1


@pytest.mark.parametrize("words, call", [("two judged", lambda: compare_runs({}, {}, {"q": {"r": 1}})), ("metric must be", lambda: compare_runs({}, {}, QRELS, "map")),
    ("no query in common", lambda: compare_runs({"x": {"r": 1.}}, {}, QRELS)), ("not a finite", lambda: compare_runs({"q0": {"r": math.nan}}, {}, QRELS)),
    ("negative", lambda: fuse_ranks([], k=-1)), ("between 0 and 1", lambda: fuse_scores({}, {}, 2)), ("finite", lambda: fuse_scores({"q": {"a": math.inf}}, {}))])
def test_bad_input_is_refused(words, call):
    with pytest.raises(ValueError, match=words): call()


runs = st.dictionaries(st.sampled_from("pq"), st.dictionaries(st.sampled_from("abcdef"), st.floats(-9, 9, width=16), max_size=6), max_size=2)


@settings(max_examples=50, deadline=None)
@given(runs, runs)
def test_fusion_against_the_definitions(a, b):
    by_rank, by_score = fuse_ranks([a, b]), fuse_scores(a, b, .25)
    assert by_rank.keys() == by_score.keys() == a.keys() | b.keys()
    for q in by_rank:
        assert by_rank[q].keys() == by_score[q].keys() == a.get(q, {}).keys() | b.get(q, {}).keys()
        for d in by_rank[q]:
            expected = sum(1 / (60 + 1 + sorted(r[q], key=lambda x: -r[q][x]).index(d)) for r in (a, b) if d in r.get(q, {}))
            assert by_rank[q][d] == pytest.approx(expected)
            scaled = [(r[q][d] - min(r[q].values())) / span if (span := max(r[q].values()) - min(r[q].values())) else 1. for r in (a, b) if d in r.get(q, {})]
            weights = [w for w, r in ((.25, a), (.75, b)) if d in r.get(q, {})]
            assert by_score[q][d] == pytest.approx(np.dot(scaled, weights))
        assert list(by_score[q].values()) == sorted(by_score[q].values(), reverse=True)


def text_table(names, rows): return Dataset.from_dict({n: [r.get(n) for r in rows] for n in names}, features=Features({n: Value("string") for n in names}))


def numbers(query, document, rows, kind):
    return Dataset.from_list([dict(zip((query, document, "score"), r)) for r in rows], features=Features({query: Value(kind), document: Value(kind), "score": Value("int64")}))


COIR_COLUMNS = ["_id", "title", "partition", "text", "language"]
HUB = {
    ("BeIR/scifact", "corpus", "corpus"): text_table(["_id", "title", "text"], [{"_id": "4983", "title": "Cells", "text": "stem cells grow"}, {"_id": "5836", "title": "", "text": "mice sleep"}]),
    ("BeIR/scifact", "queries", "queries"): text_table(["_id", "title", "text"], [{"_id": "1", "title": "", "text": "do cells grow"}, {"_id": "2", "title": "", "text": "not judged"}]),
    ("BeIR/scifact-qrels", None, "test"): numbers("query-id", "corpus-id", [(1, 4983, 1)], "int64"),
    ("CoIR-Retrieval/CodeSearchNet-ccr-python-queries-corpus", None, "corpus"): text_table(COIR_COLUMNS, [{"_id": "d1", "text": "return a + b"}, {"_id": "d2", "text": "print(x)"}]),
    ("CoIR-Retrieval/CodeSearchNet-ccr-python-queries-corpus", None, "queries"): text_table(COIR_COLUMNS, [{"_id": "q1", "partition": "test", "text": "def print"}, {"_id": "q2", "partition": "train", "text": "x"}]),
    ("CoIR-Retrieval/CodeSearchNet-ccr-python-qrels", None, "test"): numbers("query_id", "corpus_id", [("q1", "d2", 1), ("lost", "d1", 1)], "string"),
    ("xlangai/BRIGHT", "documents", "biology"): text_table(["id", "content"], [{"id": f"b/{i}.txt", "content": t} for i, t in enumerate(["moths fly to light", "light attracts moths at night", "fish swim"])]),
    ("xlangai/BRIGHT", "examples", "biology"): Dataset.from_list([
        {"query": "why do moths fly to light", "reasoning": "", "id": "0", "excluded_ids": ["b/0.txt"], "gold_ids_long": ["b"], "gold_ids": ["b/1.txt"], "gold_answer": ""},
        {"query": "do fish swim", "reasoning": "", "id": "1", "excluded_ids": ["N/A"], "gold_ids_long": ["b"], "gold_ids": ["b/2.txt"], "gold_answer": ""}]),
}


@pytest.fixture
def hub(monkeypatch):
    def load_dataset(repository, config=None, split=None):
        if (repository, config, split) not in HUB: raise ConnectionError(f"no {repository}, {config}, {split}\nsecond line")
        return HUB[repository, config, split]
    monkeypatch.setattr(compare, "load_dataset", load_dataset)


@pytest.mark.parametrize("name", ["scifact", "beir/scifact"])
def test_beir_from_the_hub(hub, name):
    assert load_task(name) == ({"4983": {"title": "Cells", "text": "stem cells grow"}, "5836": {"title": "", "text": "mice sleep"}}, {"1": "do cells grow"}, {"1": {"4983": 1}}, {})


@pytest.mark.parametrize("name", ["codesearchnet-ccr-python", "coir/CodeSearchNet-ccr-python"])
def test_coir_from_the_hub(hub, name):
    corpus, queries, qrels, excluded = load_task(name)
    assert corpus["d2"] == {"title": "", "text": "print(x)"} and queries == {"q1": "def print"} and qrels == {"q1": {"d2": 1}} and not excluded


def test_bright_from_the_hub_without_excluded_documents(hub):
    corpus, queries, qrels, excluded = load_task("bright/biology")
    assert excluded == {"0": {"b/0.txt"}, "1": set()} and qrels == {"0": {"b/1.txt": 1}, "1": {"b/2.txt": 1}}
    run = bm25_run(corpus, queries)
    assert next(iter(run["0"])) == "b/0.txt" and score_queries(run, qrels)["0"]["ndcg@10"] < 1
    assert score_run(remove_excluded(run, excluded, 10), qrels)["ndcg@10"] == 1


def test_hub_faults_are_named(hub, monkeypatch):
    with pytest.raises(FileNotFoundError, match="BeIR/nowhere.*no BeIR/nowhere, corpus, corpus$"): load_task("nowhere")
    with pytest.raises(FileNotFoundError, match="split dev"): load_task("scifact", split="dev")
    with pytest.raises(ValueError, match="beir, coir and bright"): load_task("trec/robust")
    monkeypatch.setitem(HUB, ("BeIR/scifact-qrels", None, "test"), numbers("qid", "did", [(1, 2, 1)], "int64"))
    with pytest.raises(ValueError, match="BeIR/scifact-qrels.*no column query-id, corpus-id.*qid"): load_task("scifact")
    monkeypatch.setitem(HUB, ("BeIR/scifact", "corpus", "corpus"), text_table(["_id", "text"], [{"_id": "1", "text": "a"}, {"_id": "1", "text": "b"}]))
    with pytest.raises(ValueError, match="1 of 2 rows repeat"): load_task("scifact")


def test_a_folder_comes_before_the_hub(hub, tmp_path):
    folder = tmp_path / "arguana"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "q", "text": "mine"}\n{"_id": "d", "text": "answer"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "mine"}\n')
    (folder / "qrels" / "test.tsv").write_text("q\td\t1\n")
    assert load_task("arguana", tmp_path) == (*load_beir(folder), {"q": {"q"}})
    assert load_task("scifact", tmp_path)[2] == {"1": {"4983": 1}}


def test_mteb_gives_the_same_ndcg():
    "One task built here, one random run, scored by mteb's own function and by ours."
    pytest.importorskip("mteb")
    from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores
    rng = np.random.default_rng(0)
    qrels = {f"q{i}": {f"d{j}": int(rng.integers(1, 3)) for j in rng.choice(50, 4, replace=False)} for i in range(20)}
    run = {q: {f"d{j}": float(s) for j, s in enumerate(rng.random(50))} for q in qrels}
    theirs = calculate_retrieval_scores(run, qrels, [10, 100])
    assert score_run(run, qrels)["ndcg@10"] == pytest.approx(theirs.ndcg["NDCG@10"], abs=1e-5)


def zip_of(folder, target):
    with zipfile.ZipFile(target, "w") as packed:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()): packed.write(path, f"arguana/{path.relative_to(folder)}")
    return target


def test_a_task_by_the_path_of_a_zip_or_a_folder(tmp_path):
    folder = tmp_path / "arguana"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "q", "text": "mine"}\n{"_id": "d", "text": "answer"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "mine"}\n')
    (folder / "qrels" / "test.tsv").write_text("q\td\t1\n")
    (tmp_path / "zips").mkdir()
    packed = zip_of(folder, tmp_path / "zips" / "arguana.zip")
    assert load_task(str(folder)) == load_task(str(packed)) == load_task("arguana", tmp_path / "zips") == (*load_beir(folder), {"q": {"q"}})


@pytest.mark.parametrize("name, excluded", [("arguana", True), ("arguana.v2", True), ("ArguAna.2024-01.v2", True), ("Quora.test", True), ("my.arguana", False), ("arguana2", False)])
def test_a_dot_in_a_path_hides_no_name(tmp_path, name, excluded):
    folder = tmp_path / name
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "q", "text": "mine"}\n{"_id": "d", "text": "answer"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "mine"}\n')
    (folder / "qrels" / "test.tsv").write_text("q\td\t1\n")
    expected = (*load_beir(folder), {"q": {"q"}} if excluded else {})
    (tmp_path / "zips.d").mkdir()
    packed = zip_of(folder, tmp_path / "zips.d" / f"{name}.zip")
    assert load_task(str(folder)) == load_task(f"{folder}/") == load_task(name, tmp_path) == expected
    assert load_task(str(packed)) == load_task(name, tmp_path / "zips.d") == expected


def test_the_weight_is_chosen_on_the_questions_given():
    good, bad = {"q": {"a": 2., "b": 1.}}, {"q": {"b": 2., "c": 1.}}
    assert choose_weight(good, bad, {"q": {"a": 1}}) == .6 and choose_weight(bad, good, {"q": {"a": 1}}) == .4
    assert choose_weight(good, good, {"q": {"a": 1}}) == .5


def test_known_items_leave_no_copy_of_the_question():
    corpus = {f"d{i}": {"title": f"Number {i} is", "text": f"Number {i} is a fine number. It comes after {i - 1} and some."} for i in range(9)} | {"x": {"title": "", "text": "Short."}}
    left, queries, qrels = known_items(corpus, 5)
    assert len(queries) == 5 and qrels == {q: {q: 1} for q in queries} and list(left) == list(corpus) and "x" not in queries
    assert all(queries[q] not in left[q]["text"] and left[q]["title"] == "" and queries[q] + " " + left[q]["text"] == corpus[q]["text"] for q in queries)
    assert all(left[i] == corpus[i] for i in corpus.keys() - queries.keys()) and known_items(corpus, 5)[1] == queries
