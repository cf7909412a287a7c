"""The published groups, on files of their shapes: the real loading code, memory that does not follow the corpus, one reader among many processes, no network."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest

import revela_nb.prepared as prepared
import revela_nb.reading as reading
from revela_nb.training import read_groups

ROOT = Path(__file__).parents[1]
NAMES = ("trumancai/revela_training_corpus", "trumancai/revela_code_training_corpus")
BARE, OBJECT = ["one\u2028line", "two"], {"src": "stackoverflow", "text": ["three", "four"]}


def lines(*rows): return "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    "The published name, at another address; what is kept goes to a folder of the test."
    monkeypatch.setitem(reading.HUB_LINES, NAMES[1], str(tmp_path / "train.json*"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "train.jsonl"


def kept(folder): return sorted((folder / "cache" / prepared.KEPT).glob("*"))


@pytest.mark.parametrize("name", NAMES)
def test_both_line_formats(corpus, monkeypatch, name):
    "The real loading code on files of the published shapes; only the address is changed."
    monkeypatch.setitem(reading.HUB_LINES, name, str(corpus.with_name("train.json*")))
    corpus.write_text(lines(BARE, OBJECT))
    groups = read_groups(name, 2)
    assert groups["texts"][:] == [BARE, OBJECT["text"]] and groups["src"][:] == [None, "stackoverflow"] and groups["ids"][:] == [["0.0", "0.1"], ["1.0", "1.1"]]
    assert [list(reading.hub_rows(name, "train", streaming)) for streaming in (False, True)] == [[BARE, OBJECT]] * 2
    corpus.write_text(lines(BARE))
    assert read_groups(name, 2).column_names == ["ids", "texts"] # no source, no column


def test_a_bad_line_costs_only_itself(corpus, caplog):
    corpus.write_text(lines(BARE, [], "", ["alone"], ["blank", " \n"], {"text": ["a", 3]}, {"body": 1}, '["cut', ["only two", "texts"], [*"abcde"], {"src": "x", "text": [*"fgh"]}))
    groups = read_groups(NAMES[1], 3)
    assert groups["texts"][:] == [[*"abc"], [*"fgh"]] # of the longer one the first three, as the authors take them
    said = "\n".join(caplog.messages)
    assert "5 rows that are no list of two or more texts (line 2, line 4, line 5, ...)" in said and "1 lines of malformed JSON (line 8)" in said and "2 groups of fewer than 3 texts (line 1, line 9)" in said
    corpus.write_text(lines([], ["alone"]))
    caplog.clear()
    with pytest.raises(ValueError, match="holds no group"): read_groups(NAMES[1])
    assert "2 rows that are no list" in caplog.text
    assert len(kept(corpus.parent)) == 1 # nothing half written


def test_read_once_and_again_only_when_changed(corpus, monkeypatch):
    corpus.write_text(lines(BARE, OBJECT))
    first = read_groups(NAMES[1], 2)[:]
    def refuse(*args): raise AssertionError("read again")
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "group_texts", refuse)
        assert read_groups(NAMES[1], 2)[:] == first
    time.sleep(.05)
    corpus.write_text(lines(OBJECT))
    assert read_groups(NAMES[1], 2)["texts"][:] == [OBJECT["text"]]
    with pytest.raises(ValueError, match="no group"): read_groups(NAMES[1], 3)


def test_a_file_is_read_once_and_known_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "groups.jsonl"
    for texts in (["a", "b"], ["c", "d"], ["a", "b"]):
        path.write_text(lines({"src": "stackoverflow", "text": texts})) # same size, perhaps in the same tick of the clock
        assert read_groups(path)["texts"][:] == [texts] and read_groups(path)["src"][:] == ["stackoverflow"]
    assert len(kept(tmp_path)) == 2


def test_without_network(corpus, monkeypatch, caplog):
    "What to do instead is said; what was read before is taken, and that is said, too."
    corpus.write_text(lines(BARE, OBJECT))
    address = f"hf://datasets/{NAMES[1]}/*.json*"
    with monkeypatch.context() as patch:
        patch.setitem(reading.HUB_LINES, NAMES[1], address)
        with pytest.raises(FileNotFoundError, match="could be reached.*--groups FILE.jsonl"): read_groups(NAMES[1], 2)
    first = read_groups(NAMES[1], 2)[:]
    monkeypatch.setitem(reading.HUB_LINES, NAMES[1], address)
    assert read_groups(NAMES[1], 2)[:] == first and "read here before" in caplog.text and "could be reached" in caplog.text
    with pytest.raises(FileNotFoundError): read_groups(NAMES[1], 16) # those were of another size


@pytest.mark.parametrize("form", ["published", "file"])
def test_whole_posts_are_queries_by_the_recipe(corpus, monkeypatch, caplog, form):
    "METHOD: for StackOverflow posts the query is the whole chunk, for all else its first half; through the recipe's option and the collator."
    import yaml
    from transformers import AutoTokenizer
    from revela_nb.batching import GroupCollator
    from revela_nb.training import TrainOptions, training_groups
    caplog.set_level("INFO")
    texts, recipe = [f"How do I append {n} items to a list that is long?" for n in ("two", "three")], yaml.safe_load((ROOT / "configs/smollm2-135m-code.yaml").read_text())
    corpus.write_text(lines(texts, {"src": "stackoverflow", "text": texts}, {"src": "tutorials", "text": texts}))
    if form == "published": assert recipe["groups"] == NAMES[1]
    options = TrainOptions(groups=NAMES[1] if form == "published" else str(corpus), group_size=2, whole_query_sources=recipe["whole_query_sources"])
    groups, tokenizer = training_groups(options, 0), AutoTokenizer.from_pretrained(ROOT / "revela_nb" / "backbone")
    assert groups["query_fraction"][:] == [.5, 1., .5] and "1 of 3 groups (source stackoverflow)" in caplog.text
    batch = GroupCollator(tokenizer, tokenizer, query_prefix="", passage_prefix="")([groups[i] for i in range(3)])
    queries, passages = (batch[f"{kind}_attention_mask"].sum(1) - 1 for kind in ("query", "passage"))   # without eos
    assert queries.tolist() == [n if i in (2, 3) else n // 2 for i, n in enumerate(passages.tolist())]
    options.whole_query_sources = ["stackoverflow", "blogs"]
    with pytest.raises(ValueError, match="source blogs .whole_query_sources.; there are: stackoverflow, tutorials"): training_groups(options, 0)
    options.groups, options.whole_query_sources, options.run_length = None, ["stackoverflow"], 2
    (corpus.parent / "notes.txt").write_text("A list grows. " * 400)
    options.corpus = str(corpus.parent / "notes.txt")
    with pytest.raises(ValueError, match="there are: none"): training_groups(options, 0)


CHILD = """
import sys, threading, time
import datasets, revela_nb.prepared as prepared, revela_nb.reading as reading
from revela_nb.training import read_groups
peak, name = 0, "trumancai/revela_training_corpus"
def anonymous(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
def watch():
    global peak
    while True: peak = max(peak, anonymous()); time.sleep(.002)
reading.HUB_LINES[name] = sys.argv[1]
datasets.disable_progress_bars()
start = anonymous()
threading.Thread(target=watch, daemon=True).start()
groups = read_groups(name if sys.argv[1].endswith("*") else sys.argv[1])
count = sum(len(texts) for texts in groups["texts"])
print(peak - start, count, *[file["filename"] for file in groups.cache_files])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("address", ["groups.json*", "groups.jsonl"])
def test_memory_does_not_follow_the_groups(tmp_path, address):
    "Memory of its own, so without what is mapped from a file and can be dropped: half as many groups again, no more memory."
    chunk, peaks = "A sentence of some words, as long as others are. " * 12, []
    for n in (8000, 12_000):
        folder = tmp_path / str(n)
        folder.mkdir()
        with open(folder / "groups.jsonl", "w") as file:
            for i in range(n): file.write(json.dumps([f"{i} {j} {chunk}" for j in range(16)]) + "\n")
        env = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}     # else a peak differs by 40 MiB from run to run
        def read(cache):
            done = subprocess.run([sys.executable, "-c", CHILD, str(folder / address)], capture_output=True, text=True, env=env | {"HF_DATASETS_CACHE": str(folder / cache)})
            assert done.returncode == 0, done.stderr
            more, count, path = done.stdout.split()
            assert int(count) == 16 * n
            return int(more) / 1024, path, Path(path).stat().st_mtime_ns
        first, again, other = read("cache"), read("cache"), read("other")
        assert again[1:] == first[1:]                                                          # made once
        peaks.append(min(first[0], other[0]))
    assert peaks[1] - peaks[0] < 30, peaks # MiB; as a table in memory 209 MiB more were measured


RANKS = """
import os, sys
import revela_nb.prepared as prepared, revela_nb.reading as reading, revela_nb.training as training
from revela_nb.cli import main
folder, rank, rows = sys.argv[1], os.environ["RANK"], prepared.published_rows
def counted(*args):
    open(f"{folder}/read-by-{rank}", "w").close()
    yield from rows(*args)
prepared.published_rows = counted
reading.HUB_LINES["trumancai/revela_training_corpus"] = f"{folder}/*.json*"
def stop(options): raise ValueError(f"rank {rank} has its groups")
training.build_training = stop
assert main(["train", "--groups", "trumancai/revela_training_corpus", "--group_size", "2", "--output_dir", f"{folder}/run", "--use_cpu", "true"]) == 2
"""


def test_one_of_two_processes_reads(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(BARE, OBJECT))
    (tmp_path / "ranks.py").write_text(RANKS)
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "ranks.py"), str(tmp_path)], env=env, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"rank {rank} has its groups" in done.stderr for rank in (0, 1)) and [path.name for path in tmp_path.glob("read-by-*")] == ["read-by-0"]
