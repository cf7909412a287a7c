"""Large corpora in stages: the same bytes after any kill, every loss counted, every option guarded, groups against brute force."""
import gzip
import json
import os
import signal
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

import revela_nb.prepare as prepare
import revela_nb.shards as shards
from revela_nb.corpus import chunk_text
from revela_nb.copies import bucket_pairs, estimate_overlap, find_copies, fingerprint_texts, shingles
from revela_nb.grouping import VectorIndex, WordIndex, cluster_groups, greedy_groups, parse_strategy
from revela_nb.prepare import check_folder, first_of_each, prepare_corpus, prepare_share
from revela_nb.shards import PrepareOptions, clean_text, stage_bar

ROOT = Path(__file__).parents[1]
NO_BAR = stage_bar("", None, "", False)


def sentence(n, k): return f"Note {n} says that thing number {k} of {n * k} lies in room {k % 7} of house{n % 5}."


@pytest.fixture
def notes(tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    for n in range(30): (tmp_path / "notes" / f"{n:02}.txt").write_text(" ".join(sentence(n, k) for k in range(12 + n)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


OPTIONS = PrepareOptions("notes", max_words=30, group_size=4, run_length=2, shard_groups=20)


def content(folder): return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
def rows(folder): return [row for path in sorted(Path(folder).glob("groups-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_every_chunk_once_and_the_counts_add_up(notes):
    manifest = prepare_corpus(OPTIONS, "out")
    counts, groups = manifest["counts"], rows("out")
    names = [shard["file"] for shard in manifest["shards"]]
    assert sorted(os.listdir("out")) == sorted(names + ["manifest.json", "left_out.jsonl"]) and names[0] == f"groups-00000-of-{len(names):05}.parquet" and len(names) > 2
    assert json.loads(Path("out/manifest.json").read_text()) == manifest
    ids = [i for row in groups for i in row["ids"]]
    text_of = {f"{n:02}.txt#{k}": chunk for n in range(30) for k, chunk in enumerate(chunk_text(Path(f"notes/{n:02}.txt").read_text(), 30))}
    assert len(set(ids)) == len(ids) == counts["groups"] * 4 and all(text_of[i] == t for row in groups for i, t in zip(row["ids"], row["texts"]))
    assert counts["documents read"] == 30 and counts["chunks cut"] == len(text_of)
    assert counts["chunks cut"] - counts["exact copies"] - counts["near copies"] == counts["chunks kept"] == len(ids) + counts["chunks that fill no group"]


def test_three_kinds_of_copies(notes):
    own = prepare_corpus(OPTIONS, "own")["counts"]
    Path("notes/x.jsonl").write_text(json.dumps({"_id": "00.txt", "text": " ".join(sentence(99, k) for k in range(12))}) + "\n" + json.dumps({"_id": "c", "text": Path("notes/01.txt").read_text().replace(" ", "\n")}) + "\n")
    long = " ".join(f"word{k}" for k in range(28))
    Path("notes/y.txt").write_text(long + " one.")
    Path("notes/z.txt").write_text(long + " two.")
    counts = prepare_corpus(OPTIONS, "more")["counts"]
    assert counts["documents with an earlier id"] == 1 and counts["exact copies"] == own["exact copies"] + len(list(chunk_text(Path("notes/01.txt").read_text(), 30)))
    assert counts["near copies"] == own["near copies"] + 1 and counts["chunks kept"] == own["chunks kept"] + 1
    assert prepare_corpus(replace(OPTIONS, near=0), "exact only")["counts"]["near copies"] == 0


KILLED = """
import os, signal, sys
import revela_nb.prepare as prepare
import revela_nb.shards as shards
shards.SHARD_TEXT = 5000
save, left = prepare.save_file, int(sys.argv[1])
def save_and_die(path, write):
    global left
    left -= 1
    if left == 0:                                # in the middle of a file
        write(path.with_name("." + path.name + ".partial"))
        os.kill(os.getpid(), signal.SIGKILL)
    return save(path, write)
prepare.save_file = shards.save_file = save_and_die
prepare.prepare_corpus(prepare.PrepareOptions("notes", max_words=30, group_size=4, run_length=2, shard_groups=20, strategy=sys.argv[2]), sys.argv[3])
"""


def run_killed(at, strategy, out):
    return subprocess.run([sys.executable, "-c", KILLED, str(at), strategy, out], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


@pytest.mark.parametrize("strategy, step", [("document", 13), ("document:0.5,bm25:0.5", 17)])
def test_killed_anywhere_the_result_is_the_same_bytes(notes, strategy, step):
    whole = run_killed(10**6, strategy, "whole")
    assert whole.returncode == 0, whole.stderr
    kills = 0
    while (done := run_killed(step, strategy, "killed")).returncode:                     # each try dies at its step-th file
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
        assert kills < 20
    assert kills >= 2 and content(Path("killed")) == content(Path("whole"))


@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_killed_early(notes, monkeypatch, at):
    monkeypatch.setattr(shards, "SHARD_TEXT", 5000)
    assert run_killed(at, "document", "killed").returncode == -signal.SIGKILL
    assert prepare_corpus(OPTIONS, "killed") == prepare_corpus(OPTIONS, "whole") and content(Path("killed")) == content(Path("whole"))


def test_damaged_intermediate_file_is_made_again(notes, monkeypatch, caplog):
    prepare_corpus(OPTIONS, "whole")
    monkeypatch.setattr(shards, "SHARD_TEXT", 5000)
    def stop(*args): raise KeyboardInterrupt
    for name, damaged in [("write_shards", "chunks-00003.arrow"), ("write_shards", "groups.npy"), ("make_manifest", "kept.npy")]:
        with monkeypatch.context() as patch:
            patch.setattr(prepare, name, stop)
            with pytest.raises(KeyboardInterrupt): prepare_corpus(OPTIONS, "out")
        path = Path("out/work") / damaged
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    manifest = prepare_corpus(OPTIONS, "out")
    assert all(any(name in message for message in caplog.messages) for name in ("chunks-00003", "groups.npy", "kept.npy"))
    assert content(Path("out")) == content(Path("whole")) and manifest["shards"]


@pytest.mark.parametrize("strategy", ["document", "bm25:0.5,random:0.5"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_shares_give_the_same_bytes(notes, monkeypatch, strategy, n):
    monkeypatch.setattr(shards, "SHARD_TEXT", 5000)
    options = replace(OPTIONS, strategy=strategy)
    manifest = prepare_corpus(options, "whole")
    made = [prepare_share(options, "shared", (k, n)) for k in reversed(range(n))]
    stamps = {path.name: path.stat().st_mtime_ns for path in Path("shared/work").glob("chunks-*")}
    with monkeypatch.context() as patch:
        patch.setattr(shards, "chunk_text", None)                                        # nothing is cut twice
        assert prepare_corpus(options, "shared") == manifest and content(Path("shared")) == content(Path("whole"))
    assert sum(made) == len(stamps) / 2 and max(made) - min(made) <= 1 and (n < 7 or len(made) == 7)
    assert prepare_share(options, "shared", (0, n)) == 0 and content(Path("shared")) == content(Path("whole"))


def test_a_lost_share_is_made_up_for(notes, monkeypatch, caplog):
    monkeypatch.setattr(shards, "SHARD_TEXT", 5000)
    prepare_corpus(OPTIONS, "whole")
    for k in (0, 2): prepare_share(OPTIONS, "shared", (k, 3))
    damaged = Path("shared/work/chunks-00002.arrow")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    prepare_corpus(OPTIONS, "shared")
    assert content(Path("shared")) == content(Path("whole")) and damaged.name in caplog.text


def test_workers(notes):
    prepare_corpus(OPTIONS, "whole")
    prepare_corpus(OPTIONS, "two", workers=2)
    assert content(Path("two")) == content(Path("whole"))


def test_shares_guard_themselves(notes, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TEXT", 5000)
    for share in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="share is K/N"): prepare_share(OPTIONS, "out", share)
    with pytest.raises(FileNotFoundError): prepare_share(replace(OPTIONS, source="./nowhere"), "out", (0, 2))
    assert not Path("out").exists()
    prepare_share(OPTIONS, "out", (0, 2))
    with pytest.raises(ValueError, match="max_words is 30 there and 40 now"): prepare_share(replace(OPTIONS, max_words=40), "out", (1, 2))
    Path("notes/29.txt").unlink()                                                         # shorter: the shard behind the end is noticed
    with pytest.raises(ValueError, match="has changed"): prepare_corpus(OPTIONS, "out")


def test_datatrove_runs_shares(notes):
    executor = pytest.importorskip("datatrove.executor")
    options = OPTIONS
    def step(data, rank, world_size):
        from revela_nb.prepare import prepare_share
        prepare_share(options, "shared", (rank, world_size))
    executor.LocalPipelineExecutor(pipeline=[step], tasks=2, workers=1, logging_dir="logs").run()
    prepare_corpus(OPTIONS, "whole")
    prepare_corpus(OPTIONS, "shared")
    assert content(Path("shared")) == content(Path("whole"))


def test_finished_folder_is_left_alone_and_a_damaged_one_made_again(notes, caplog):
    prepare_corpus(OPTIONS, "out")
    before = content(Path("out"))
    stamps = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    prepare_corpus(OPTIONS, "out")
    assert stamps == {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    Path("out/groups-00001-of-00004.parquet").unlink(missing_ok=True)
    victim = sorted(Path("out").glob("groups-*"))[0]
    victim.write_bytes(b"?")
    prepare_corpus(OPTIONS, "out")
    assert content(Path("out")) == before and victim.name in caplog.text


def test_changed_source_is_refused(notes, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TEXT", 5000)
    assert run_killed(8, "document", "out").returncode == -signal.SIGKILL
    Path("notes/00.txt").write_text("Something else now.")
    with pytest.raises(ValueError, match="has changed"): prepare_corpus(OPTIONS, "out")


def test_all_that_is_left_out_is_listed_whatever_was_killed(notes):
    "Five broken lines, three in the log and the manifest, five in the file beside it; the same bytes after kills, and with names that are no Unicode."
    Path("notes/rows.jsonl").write_text("".join('{"text"\n' for _ in range(5)) + '{"text": "half a pair \\ud800"}\n')
    with open(os.fsencode("notes/") + b"caf\xe9.txt", "wb") as file: file.write(b"A name in Latin-1.")
    with open("notes/latin.txt", "wb") as file: file.write("caf\u00e9".encode("latin-1"))
    manifest = prepare_corpus(OPTIONS, "whole")
    listed = [json.loads(line) for line in Path("whole/left_out.jsonl").read_text().splitlines()]
    counts = {reason: entry["count"] for reason, entry in manifest["left out"].items()}
    assert counts == {reason: sum(row["reason"] == reason for row in listed) for reason in counts} and sum(counts.values()) == len(listed) == manifest["left out, all"]["lines"] == 8
    assert [row["place"] for row in listed if row["reason"] == "lines of malformed JSON"] == [f"notes/rows.jsonl, line {n}" for n in range(1, 6)] and len(manifest["left out"]["lines of malformed JSON"]["places"]) == 3
    assert manifest["left out, all"]["sha256"] == shards.hash_file(Path("whole/left_out.jsonl")) and json.loads(Path("whole/manifest.json").read_text()) == manifest
    for step in (1, 9, 13):
        while (done := run_killed(step, "document", "killed")).returncode == -signal.SIGKILL and step > 8: pass
    assert done.returncode == 0 and content(Path("killed")) == content(Path("whole"))


def test_damaged_list_of_what_was_left_out_is_made_again(notes, monkeypatch, caplog):
    Path("notes/rows.jsonl").write_text("[\n")
    whole = prepare_corpus(OPTIONS, "whole")
    def stop(*args): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "make_manifest", stop)
        with pytest.raises(KeyboardInterrupt): prepare_corpus(OPTIONS, "out")
    Path("out/work/left_out.jsonl").write_text("")
    assert prepare_corpus(OPTIONS, "out") == whole and content(Path("out")) == content(Path("whole")) and "left_out.jsonl" in caplog.text


def test_manifest_knows_the_source(notes, monkeypatch):
    "Its text by a key that other text does not have, and of a data set on the hub the commit; nothing without an answer."
    import revela_nb.reading as reading
    from xxhash import xxh3_64
    first, digest = prepare_corpus(OPTIONS, "first")["source"], xxh3_64()
    for n in range(30): digest.update(f"{n:02}.txt\0{Path(f'notes/{n:02}.txt').read_text()}\0".encode())
    assert first == {"xxh3_64 of ids and texts": digest.hexdigest(), "revision": None}
    Path("notes/00.txt").write_text(Path("notes/00.txt").read_text() + " More.")
    assert prepare_corpus(OPTIONS, "second")["source"] != first
    name = "trumancai/revela_training_corpus"
    Path("train.jsonl").write_text("".join(json.dumps([sentence(n, k) for k in range(4)]) + "\n" for n in range(20)))
    monkeypatch.setitem(reading.HUB_LINES, name, "train.json*")
    hub = replace(OPTIONS, source=name, near=0)
    assert prepare_corpus(hub, "offline", streaming=True)["source"]["revision"] is None
    monkeypatch.setattr(reading.HfApi, "dataset_info", lambda self, asked: type("Info", (), {"sha": f"commit of {asked}"}))
    assert prepare_corpus(hub, "online", streaming=True)["source"]["revision"] == f"commit of {name}"


def test_a_line_a_minute_where_nobody_watches(notes, monkeypatch, caplog):
    caplog.set_level("INFO", "revela_nb.shards")
    clock = iter(range(0, 10**6, 7))
    monkeypatch.setattr(shards.time, "monotonic", lambda: next(clock)) # every look at the clock is 7 seconds later
    prepare_corpus(OPTIONS, "out")
    said = [line for line in caplog.messages if line.startswith("read: ")]
    assert len(said) == 30 * 7 // 60 and "minutes left" in said[0] and "a second" in said[0] and " B of " in said[0]


@pytest.mark.parametrize("change", [dict(max_words=20), dict(seed=1), dict(strategy="random"), dict(near=0.0), dict(source="other")])
def test_other_options_are_refused_by_name(notes, change):
    prepare_corpus(OPTIONS, "out")
    with pytest.raises(ValueError, match=f"{list(change)[0]} is "): prepare_corpus(replace(OPTIONS, **change), "out")


def test_somebody_elses_folder_and_mistyped_sources(notes):
    Path("thesis").mkdir()
    Path("thesis/chapter1.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="thesis"): prepare_corpus(OPTIONS, "thesis")
    for source, error in [("nowhere/", FileNotFoundError), ("", ValueError)]:
        with pytest.raises(error, match="^(?!.*no room)"): prepare_corpus(replace(OPTIONS, source=source), "new/out")
        assert not Path("new/out").exists()
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="no usable text"): prepare_corpus(replace(OPTIONS, source="empty"), "nothing")
    with pytest.raises(ValueError, match="do not fill one group of 4000"): prepare_corpus(replace(OPTIONS, group_size=4000), "few")
    assert check_folder(Path("few"), replace(OPTIONS, group_size=4000)) == "begun"


@pytest.mark.parametrize("change, message", [(dict(max_words=0), "max_words"), (dict(group_size=1), "group_size"), (dict(run_length=3), "3 does not divide 4"), (dict(near=1.5), "near"),
                                             (dict(strategy="best"), "there are document, bm25"), (dict(strategy="document:x"), "number"), (dict(strategy="document:0"), "above 0"), (dict(strategy="cluster"), "--retriever")])
def test_bad_options(notes, change, message):
    with pytest.raises(ValueError, match=message): prepare_corpus(replace(OPTIONS, **change), "out")
    assert not Path("out").exists()


def test_seed_and_mixture(notes):
    first, other = (prepare_corpus(replace(OPTIONS, seed=seed), f"out{seed}") for seed in (0, 1))
    assert rows("out0") != rows("out1")
    mixed = prepare_corpus(replace(OPTIONS, strategy="document:1,random:1"), "mixed")["counts"]
    by = mixed["groups by strategy"]
    assert set(by) == {"document", "random"} and sum(by.values()) == mixed["groups"] and min(by.values()) > mixed["groups"] / 4
    assert len({i for row in rows("mixed") for i in row["ids"]}) == mixed["groups"] * 4


# parts

@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab \n\t\r\x0c\x00\u00ad\u200b\u00a0e\u0301é\u2028"), max_size=80))
def test_cleaning_twice_is_cleaning_once_and_words_stay(text):
    clean = clean_text(text)
    assert clean_text(clean) == clean and "\n\n\n" not in clean and "\x00" not in clean and "\u00ad" not in clean
    letters = lambda text: [c for c in unicodedata.normalize("NFD", text) if c in "abe"]
    assert letters(clean) == letters(text)


def test_first_of_each_and_shingles():
    assert first_of_each(np.array([3, 1, 3, 2, 1])).tolist() == [True, True, False, True, False]
    assert shingles("A b c d e f") == ["a b c d e", "b c d e f"] and shingles("") == [""]


def test_near_copies_against_all_pairs(notes):
    rng, vocabulary = np.random.default_rng(0), [f"w{i}" for i in range(300)]
    texts = []
    for n in range(60):
        words = list(rng.choice(vocabulary, 60))
        texts.append(" ".join(words))
        if n % 2: texts.append(" ".join(words[:-1] + ["other"]) if n % 4 == 1 else " ".join(list(rng.choice(vocabulary, 30)) + words[30:]))    # 0.96 alike, or 0.32
    Path("rows.jsonl").write_text("".join(json.dumps({"_id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    prepare_corpus(PrepareOptions("rows.jsonl", group_size=2, run_length=1, near=0.8), "out")
    kept = {int(i.split("#")[0]) for row in rows("out") for i in row["ids"]}
    sets = [set(shingles(text)) for text in texts]
    copies = {j for j in range(len(texts)) for i in range(j) if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) > 0.8}
    assert len(copies) == 15 and not kept & copies and len(set(range(len(texts))) - kept - copies) <= 1    # one may fill no group


def test_estimate_and_buckets():
    rng = np.random.default_rng(0)
    base = [f"w{i}" for i in range(300)]
    texts = [" ".join(base[:k] + [f"x{k}y{i}" for i in range(300 - k)]) for k in range(0, 301, 20)]
    prints, sets = fingerprint_texts(texts), [set(shingles(text)) for text in texts]
    i, j = np.triu_indices(len(texts))
    true = np.array([len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in zip(i, j)])
    error = estimate_overlap(prints[i], prints[j]) - true
    assert abs(error.mean()) < .03 and np.abs(error).max() < .15 and prints.shape == (16, 192)
    keys = rng.integers(0, 5, 200).astype(np.uint32)
    later, earlier = np.divmod(bucket_pairs(keys), 200)
    members = [np.flatnonzero(keys == key) for key in range(5)]
    expected = {(m[b], m[a]) for m in members for b in range(len(m)) for a in range(b) if a == 0 or b - a <= 8}
    assert set(zip(later.tolist(), earlier.tolist())) == expected and (np.diff(bucket_pairs(keys)) > 0).all()


def test_copies_of_copies_stay():
    "Against the rule written as two loops, on chains of small changes."
    rng = np.random.default_rng(1)
    texts = []
    for chain in range(12):
        words = [f"c{chain}w{k}" for k in range(80)]
        for step in range(6):
            texts.append(" ".join(words))
            for place in rng.integers(0, 80, 2): words[place] = f"new{chain}{step}{place}"
    prints = fingerprint_texts(texts)
    found = find_copies(lambda b: np.ascontiguousarray(prints[:, 4 * b:4 * b + 4]).view(np.uint32)[:, 0], lambda rows: prints[rows], .7, NO_BAR)
    alike = np.array([[estimate_overlap(prints[i:i + 1], prints[j:j + 1])[0] >= .7 for i in range(72)] for j in range(72)])
    met = np.array([[(prints[i, :64].reshape(16, 4) == prints[j, :64].reshape(16, 4)).all(1).any() for i in range(72)] for j in range(72)])
    expected = np.zeros(72, dtype=bool)
    for j in range(72): expected[j] = (alike[j, :j] & met[j, :j] & ~expected[:j]).any()
    assert (found == expected).all() and 10 < found.sum() < 60


def test_rare_words_find_what_full_bm25_finds():
    texts = [f"topic{t} alpha{t} beta{t} gamma{t} the same common words here number{i}" for t in range(20) for i in range(8)]
    index = WordIndex([texts[:50], texts[50:]])
    for seed in (0, 77, 159):
        found = index.nearest(np.array([seed]), np.ones(160, bool), 7)[0]
        assert set(found) == set(range(seed // 8 * 8, seed // 8 * 8 + 8)) - {seed}
    groups = greedy_groups(index.nearest, 160, 8, np.random.default_rng(0), NO_BAR)
    assert sorted(groups.ravel()) == list(range(160)) and all(len({i // 8 for i in group}) == 1 for group in groups)


def test_no_words():
    with pytest.raises(ValueError, match="'document' or 'random'"): WordIndex([["( )", "..."], ["{}"]])


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 120), size=st.integers(2, 9), seed=st.integers(0, 9), at_once=st.sampled_from([1, 7, 256]))
def test_greedy_groups_use_every_chunk_once(n, size, seed, at_once):
    rng = np.random.default_rng(seed)
    near = [rng.permutation(n)[:rng.integers(0, n + 1)] for _ in range(n)]
    nearest = lambda seeds, free, k: [row[free[row] & (row != s)][:k] for s, row in ((s, near[s]) for s in seeds)]
    groups = greedy_groups(nearest, n, size, rng, NO_BAR, at_once)
    assert groups.shape == (n // size, size) and len(set(groups.ravel())) == groups.size


def test_vector_index_is_exact_when_small_and_good_when_large():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(22_000, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    free = rng.random(22_000) < .5
    small, large = VectorIndex(vectors[:2000]), VectorIndex(vectors)
    for index, n, share in ((small, 2000, 1.), (large, 22_000, .4)):
        seeds = np.flatnonzero(free[:n])[:20]
        hits = []
        for seed, found in zip(seeds, index.nearest(seeds, free[:n], 10)):
            scores = np.where(free[:n], vectors[:n] @ vectors[seed], -2)
            scores[seed] = -2
            assert free[found].all() and seed not in found
            hits.append(len(set(found) & set(np.argsort(-scores)[:10])) / 10)
        assert np.mean(hits) >= share


def test_clusters_are_balanced_and_seeded():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(330, 8)).astype(np.float32)
    one, two = (cluster_groups(vectors, 16, np.random.default_rng(3)) for _ in range(2))
    assert one.shape == (20, 16) and len(set(one.ravel())) == 320 and (one == two).all()


def test_memory_does_not_follow_the_texts(tmp_path):
    "Four times the text, at the same number of bytes a chunk, must cost little more memory."
    code = ("import resource, sys, revela_nb.prepare as p, revela_nb.shards as s; s.SHARD_TEXT = 10**6\n"
            "p.prepare_corpus(p.PrepareOptions(sys.argv[1], max_words=100, near=0, shard_groups=50), sys.argv[2]); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    rng, peaks = np.random.default_rng(0), []
    for n in (40, 400):
        with gzip.open(tmp_path / f"{n}.jsonl.gz", "wt", compresslevel=1) as file:
            for i in range(n): file.write(json.dumps({"_id": str(i), "text": " ".join(f"word{w} is here." for w in rng.integers(0, 10**6, 4000))}) + "\n")
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / f"{n}.jsonl.gz"), str(tmp_path / f"out{n}")], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 60, peaks                                                # MiB; the text itself grows by 25 MB, and by 3 times that as Python strings


def test_command_line_and_back(notes, capsys):
    from revela_nb.cli import main
    from revela_nb.training import read_groups
    words = ["prepare", "notes", "--out", "groups", "--max-words", "30", "--group-size", "4", "--run-length", "2"]
    assert main(words) == 0 and "groups of 4 chunks in groups" in capsys.readouterr().out
    assert read_groups("groups")["ids"][:] == [row["ids"] for row in rows("groups")]
    assert main([*words, "--near", "0"]) == 2 and "near is 0.8 there and 0.0 now" in capsys.readouterr().err
    victim = next(Path("groups").glob("groups-*"))
    victim.write_bytes(b"?")
    with pytest.raises(ValueError, match=victim.name): read_groups("groups")
    with pytest.raises(FileNotFoundError, match="not finished"): read_groups("notes")


@pytest.mark.parametrize("strategy", ["cluster", "remine"])
def test_groups_by_the_shipped_retriever(tmp_path, monkeypatch, strategy):
    "The real backbone embeds: cats go to cats and lists to lists; shares make the same bytes, and nothing is embedded twice."
    from revela_nb.retriever import Retriever
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shards, "SHARD_TEXT", 1500)
    cats = [f"The {a} cat {b} on the {c} mat and purrs." for a in ("old", "grey", "fat", "shy") for b in ("sat", "sleeps", "lies", "eats") for c in ("warm", "red")]
    code = [f"def {a}_{b}(items): return [{a}({b}) for {b} in items]" for a in ("load", "save", "check", "print") for b in ("row", "name", "key", "line", "file", "url", "cell", "tag")]
    Path("rows.jsonl").write_text("".join(json.dumps({"_id": f"{kind}{n}", "text": text}) + "\n" for n in range(32) for kind, text in (("cat", cats[n]), ("code", code[n]))))
    options = PrepareOptions("rows.jsonl", group_size=4, min_words=1, near=0, strategy=strategy, retriever=str(Path(prepare.__file__).parent / "backbone"))
    prepare_corpus(options, "whole")
    kinds = [[id[:3] for id in row["ids"]] for row in rows("whole")]
    assert len(kinds) == 16 and sum(len(set(kind)) == 1 for kind in kinds) >= 14               # by chance: 2
    for k in (1, 0): prepare_share(options, "shared", (k, 2))
    assert len(list(Path("shared/work").glob("vectors-*.npy"))) >= 2
    def refuse(*args, **kwargs): raise AssertionError("embedded again")
    monkeypatch.setattr(Retriever, "from_pretrained", refuse)
    prepare_corpus(options, "shared")
    assert content(Path("shared")) == content(Path("whole"))


def test_command_line_of_shares(notes, capsys):
    from revela_nb.cli import main
    words = ["prepare", "notes", "--max-words", "30", "--group-size", "4", "--run-length", "2", "--out"]
    assert main([*words, "whole"]) == 0 and main([*words, "two", "--workers", "2"]) == 0
    for k in range(3): assert main([*words, "shared", "--share", f"{k}/3"]) == 0
    assert "share 2/3" in capsys.readouterr().out and main([*words, "shared"]) == 0
    assert content(Path("shared")) == content(Path("whole")) == content(Path("two"))
    for share in ("3/3", "1", "a/b"):
        assert main([*words, "bad", "--share", share]) == 2
        assert "a share is K/N" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--near", "0.5"], ["--min-words", "1"], ["--retriever", "x"], ["--share", "0/2"], ["--workers", "2"], ["--streaming"], ["--split", "test"],
                                    ["--shard-groups", "9"], ["--strategy", "cluster"], ["--strategy", "document:0.5,bm25:0.5"]])
def test_a_file_refuses_what_only_a_folder_has(notes, capsys, option):
    from revela_nb.cli import main
    assert main(["prepare", "notes", "--out", "groups.jsonl", *option]) == 2
    said = capsys.readouterr().err
    assert option[-1 if option[0] == "--strategy" else 0] in said and "--out FOLDER" in said and not Path("groups.jsonl").exists()
