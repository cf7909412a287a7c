"""Documents in, chunks out: every source, every fault of real files, and what must hold for any text."""
import csv
import gzip
import io
import json
import logging
import os
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings, strategies as st

import revela_nb.reading as reading
from revela_nb.corpus import chunk_corpus, chunk_text, looks_like_code, split_sentences
from revela_nb.reading import load_corpus, module_files

SHARED = Path(__file__).parents[2] / "shared" / "data"


def rows(corpus):
    return list(zip(corpus["_id"], corpus["title"], corpus["text"]))


def write(folder, **files):
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# sources

def test_python_corpus_is_unique_sorted_and_repeatable():
    one, two = load_corpus("python:stdlib"), load_corpus("python:stdlib")
    assert one.column_names == ["_id", "title", "text"] and rows(one) == rows(two)
    titles = set(one["title"])
    assert {"json.decoder", "argparse", "asyncio"} <= titles and len(set(one["_id"])) == len(one)
    assert not any({"test", "tests", "idlelib", "lib2to3"} & set(title.split(".")) for title in titles)
    assert all(200 <= len(text) <= 400_000 for text in one["text"])
    assert one["text"][:][one["title"][:].index("json.decoder")] == Path(json.decoder.__file__).read_text(encoding="utf-8")


def test_module_files_prunes_and_names(tmp_path):
    for name in ["pkg/__init__.py", "pkg/sub/mod.py", "pkg/tests/test_a.py", "pkg/_vendor/x.py", "pkg/test_b.py", "pkg/conftest.py", "not-a-package/y.py", "top.py", "pkg/data.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    assert [name for name, _ in module_files(str(tmp_path))] == ["top", "pkg", "pkg.sub.mod"]


def test_python_is_both_halves(tmp_path, monkeypatch):
    for half in ("std", "site"):
        (tmp_path / half).mkdir()
        (tmp_path / half / "same.py").write_text(f"# {half}\n" + "x = 1\n" * 50)
    monkeypatch.setattr(reading.sysconfig, "get_path", lambda name: str(tmp_path / ("std" if name == "stdlib" else "site")))
    assert load_corpus("python")["_id"][:] == ["stdlib:same", "packages:same"]
    assert load_corpus("python:packages")["text"][0].startswith("# site")


def test_types_of_files(tmp_path):
    write(tmp_path, **{
        "a.md": "# Head\n\nText.", "b.rst": "Head\n====\n\nText.", "c.TXT": "Plain text.\r\nTwo.", "d.py": "# no heading\nx = 1\n",
        "e.html": "<title>T &amp; U</title><style>.x{}</style><p>One<br>two<script>bad()</script></p><pre>  kept\n    so</pre>",
        "f.csv": 'docid,title,text\n9,T,"two\nlines"\n', "g.jsonl": '{"id": 0, "text": "zero"}\n', "h.jsonl.gz": gzip.compress(b'{"text": "no id"}\n')})
    pq.write_table(pa.table({"text": ["p"], "vector": [[1.0]], "title": [None]}), tmp_path / "i.parquet")
    got = {i: (t, x) for i, t, x in rows(load_corpus(tmp_path))}
    assert got["a.md"] == ("Head", "# Head\n\nText.") and got["b.rst"][0] == "Head" and got["c.TXT"] == ("c.TXT", "Plain text.\nTwo.")
    assert got["d.py"] == ("d.py", "# no heading\nx = 1\n") and got["9"] == ("T", "two\nlines") and got["0"] == ("", "zero")
    assert got["h.jsonl.gz:1"] == ("", "no id") and got["i.parquet:1"] == ("", "p")
    title, text = got["e.html"]
    assert title == "T & U" and "bad" not in text and ".x" not in text and "One\ntwo" in text and "  kept\n    so" in text


def test_nested_folder_in_order_without_hidden_files(tmp_path):
    for name in ["b.txt", "a/z.txt", "a/.hidden.txt", ".git/x.txt", "a/b/c.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert load_corpus(tmp_path)["_id"][:] == ["b.txt", "a/z.txt", "a/b/c.txt"]


def test_published_revela_formats(tmp_path):
    path = tmp_path / "groups.jsonl"
    path.write_text(json.dumps(["one", "two"]) + "\n" + json.dumps({"src": "wiki", "text": ["three", "", 4]}) + "\n")
    assert [x for _, _, x in rows(load_corpus(path))] == ["one", "two", "three"]


def test_folders_passed_over_are_counted_and_named(tmp_path, monkeypatch, caplog):
    "Hidden, compiled, linked, closed: with a folder everything in it is lost, so it is said."
    for name in ["a/x.txt", ".git/y.txt", "a/.cache/z.txt", "b/__pycache__/m.txt", "closed/w.txt"]:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text("Some words.")
    (tmp_path / "tree/a/round").symlink_to(tmp_path / "tree") # a circle
    scan = os.scandir
    def refuse(path):                                         # chmod does not keep root out
        if Path(path).name == "closed": raise PermissionError(13, "Permission denied", str(path))
        return scan(path)
    monkeypatch.setattr(os, "scandir", refuse)
    assert load_corpus(tmp_path / "tree")["_id"][:] == ["a/x.txt"]
    for line in ("2 hidden folders (.git, a/.cache)", "1 folders of compiled code (b/__pycache__)", "1 links to folders, which are not followed (a/round)"): assert line in caplog.text
    assert "1 folders that cannot be opened" in caplog.text and "closed: Permission denied" in caplog.text


def test_beir_folder_gives_no_queries(tmp_path):
    write(tmp_path, **{"corpus.jsonl": '{"_id": "d", "title": "T", "text": "document"}\n', "queries.jsonl": '{"_id": "q", "text": "question"}\n'})
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "notes.txt").write_text("judgements")
    assert rows(load_corpus(tmp_path)) == [("d", "T", "document")]


def test_changed_file_is_read_anew(tmp_path):
    write(tmp_path, **{"a.txt": "old"})
    load_corpus(tmp_path)
    write(tmp_path, **{"a.txt": "new"})
    assert load_corpus(tmp_path)["text"][:] == ["new"]


# faults: counted, named, skipped

@pytest.mark.parametrize("name, content, reason, place", [
    ("latin.txt", "é".encode("latin-1"), "not UTF-8", "latin.txt"),
    ("utf16.txt", "text".encode("utf-16"), "not UTF-8", "utf16.txt"),
    ("binary.txt", b"PK\0\1", "NUL", "binary.txt"),
    ("empty.md", b" \n\t\n", "empty documents", "empty.md"),
    ("x.jsonl", b'{"text": "ok2"}\n{"text"\n', "malformed JSON", "x.jsonl, line 2"),
    ("x.jsonl", b"[" * 100_000 + b"\n", "malformed JSON", "x.jsonl, line 1"),
    ("x.jsonl", b'{"text": "ok2"}\n\xff\n', "lines that are not UTF-8", "x.jsonl, line 2"),
    ("x.jsonl", b"3\n", "neither an object nor a list", "x.jsonl:1"),
    ("x.jsonl", b'{"body": "b"}\n', "without a column 'text'", "['body']"),
    ("x.jsonl", b'{"text": 7}\n', "no string", "x.jsonl:1"),
    ("x.jsonl", b'{"text": null}\n', "empty documents", "x.jsonl:1"),
    ("x.jsonl", b'{"text": "\\ud800"}\n', "not valid Unicode", "x.jsonl:1"),
    ("x.jsonl", b'{"_id": "good.txt", "text": "t"}\n', "id of an earlier one", "good.txt"),
    ("x.jsonl.gz", b"no gzip", "broken off", "x.jsonl.gz after line 0"),
    ("x.jsonl.gz", gzip.compress(b'{"text": "ok2"}\n' * 999)[:-12], "broken off", "x.jsonl.gz after line"),
    ("x.csv", b"id,text\n1,caf\xe9\n2,ok2\n", "not valid Unicode", "1"),
    ("x.csv", b"id,body\n1,b\n", "without a column 'text'", "['id', 'body']"),
    ("x.parquet", b"PAR1 no", "broken off", "x.parquet after row 0"),
    ("x.exe", b"MZ", "another type", "x.exe"),
])
def test_fault_is_skipped_and_named(tmp_path, caplog, name, content, reason, place):
    write(tmp_path, **{"good.txt": "Good text.", name: content})
    with caplog.at_level(logging.WARNING, "revela_nb.reading"): corpus = load_corpus(tmp_path)
    assert corpus["_id"][0] == "good.txt"
    assert [m for m in caplog.messages if reason in m and place in m], caplog.messages


def test_corrupt_gzip_inside(tmp_path, caplog):
    data = bytearray(gzip.compress(os.urandom(5000).hex().encode() + b"\n"))
    data[200:400] = bytes(200)
    write(tmp_path, **{"x.jsonl.gz": bytes(data), "good.txt": "Good text."})
    assert load_corpus(tmp_path)["_id"][:] == ["good.txt"]
    assert any("x.jsonl.gz" in m for m in caplog.messages)


def test_many_faults_are_counted_and_few_named(tmp_path, caplog):
    (tmp_path / "x.jsonl").write_text('{"text": "ok"}\n' + "{\n" * 50)
    load_corpus(tmp_path / "x.jsonl")
    message, = [m for m in caplog.messages if "malformed" in m]
    assert "50 lines" in message and message.count("line ") == 3


def test_bom_and_big_csv_field(tmp_path):
    limit = csv.field_size_limit()
    big = "word " * 60_000
    write(tmp_path, **{"b.txt": b"\xef\xbb\xbfText.", "c.csv": b"\xef\xbb\xbfid,text\n1,\"" + big.encode() + b'"\n', "d.jsonl": b'\xef\xbb\xbf{"_id": "j", "text": "Json."}\n'})
    assert rows(load_corpus(tmp_path)) == [("b.txt", "b.txt", "Text."), ("1", "", big), ("j", "", "Json.")]
    assert csv.field_size_limit() == limit


# sources that cannot work

@pytest.mark.parametrize("source", ["./nowhere", "/nowhere", "corpus.jsonl", "a/b/c", "python:nothing", "~/nowhere/at/all"])
def test_missing_path(source):
    with pytest.raises(FileNotFoundError, match="python:stdlib"): load_corpus(source)


def test_unknown_single_file_lists_what_can_be_read(tmp_path):
    write(tmp_path, **{"x.odt": "text"})
    with pytest.raises(ValueError, match=r"\.parquet"): load_corpus(tmp_path / "x.odt")


@pytest.mark.parametrize("files, match", [({}, "nothing"), ({"e.txt": ""}, "empty documents"), ({"x.csv": "id,body\n1,b\n"}, "body"), ({"x.bin": "b"}, "another type")])
def test_nothing_usable(tmp_path, files, match):
    with pytest.raises(ValueError, match=match): load_corpus(write(tmp_path, **files))


def test_empty_source():
    with pytest.raises(ValueError, match="empty"): load_corpus("")


def test_hub(monkeypatch):
    seen = []
    def fake(name, split):
        seen.append((name, split))
        return Dataset.from_dict({"id": ["7", "8"], "text": ["seven", ""], "url": ["u", "v"]})
    monkeypatch.setattr(reading, "load_dataset", fake)
    assert rows(load_corpus("someone/some-corpus_v1.1", split="validation")) == [("7", "", "seven")]
    assert seen == [("someone/some-corpus_v1.1", "validation")]


@pytest.mark.parametrize("error, expected", [(ConnectionError("offline"), FileNotFoundError), (ValueError("Unknown split"), ValueError), (RuntimeError("scripts"), ValueError)])
def test_hub_failure_is_a_sentence(monkeypatch, error, expected):
    def fake(name, split): raise error
    monkeypatch.setattr(reading, "load_dataset", fake)
    with pytest.raises(expected, match=f"someone/data.*{error}"): load_corpus("someone/data")


# PDF and Word, made here

def small_pdf(*pages, title="Cats"):
    "A PDF of a line of text a page, object by object."
    kids = " ".join(f"{5 + 2 * n} 0 R" for n in range(len(pages)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>", f"<< /Title ({title}) >>"]
    for n, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET"
        objects += [f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {6 + 2 * n} 0 R /Resources << /Font << /F1 3 0 R >> >> >>", f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream"]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    return out + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n<< /Size {len(objects) + 1} /Root 1 0 R /Info 4 0 R >>\nstartxref\n{len(out)}\n%%EOF\n".encode()


def test_pdf(tmp_path, caplog):
    pypdf = pytest.importorskip("pypdf")
    whole = small_pdf("The cat sat on the warm mat.", "It purred.")
    writer = pypdf.PdfWriter()
    writer.append(io.BytesIO(whole))
    writer.encrypt("secret")
    locked = io.BytesIO()
    writer.write(locked)
    write(tmp_path, **{"cats.pdf": whole, "packed.PDF.gz": gzip.compress(whole), "torn.pdf": whole[:80], "scanned.pdf": small_pdf("", ""), "locked.pdf": locked.getvalue()})
    with caplog.at_level(logging.WARNING, "revela_nb.reading"): got = rows(load_corpus(tmp_path))
    assert got == [(name, "Cats", "The cat sat on the warm mat.\n\nIt purred.") for name in ("cats.pdf", "packed.PDF.gz")]
    assert any("2 files that cannot be parsed" in m and "torn.pdf" in m and "locked.pdf" in m for m in caplog.messages) and any("1 empty documents (scanned.pdf)" in m for m in caplog.messages)


def test_docx(tmp_path, caplog):
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.core_properties.title = " Lists "
    document.add_heading("How lists grow", 1)
    document.add_paragraph("Append adds one item.")
    table = document.add_table(rows=1, cols=2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "tuple", "cannot grow"
    document.add_paragraph("That is all.")
    document.save(tmp_path / "lists.docx")
    document.core_properties.title = ""
    document.save(tmp_path / "untitled.docx")
    write(tmp_path, **{"torn.docx": (tmp_path / "lists.docx").read_bytes()[:500]})
    with caplog.at_level(logging.WARNING, "revela_nb.reading"): got = rows(load_corpus(tmp_path))
    text = "How lists grow\n\nAppend adds one item.\n\ntuple\tcannot grow\n\nThat is all."
    assert got == [("lists.docx", "Lists", text), ("untitled.docx", "untitled.docx", text)] and "torn.docx" in caplog.text


@pytest.mark.parametrize("name, module, package", [("a.pdf", "pypdf", "pypdf"), ("a.docx", "docx", "python-docx")])
def test_missing_library_is_a_reason(tmp_path, monkeypatch, caplog, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    write(tmp_path, **{name: b"x", "b.txt": "Text."})
    with caplog.at_level(logging.WARNING, "revela_nb.reading"): assert load_corpus(tmp_path)["_id"][:] == ["b.txt"]
    assert f"pip install {package}" in caplog.text


# published corpora: the real loading code on small files of exactly their shapes; only the address is changed

PUBLISHED = {
    "trumancai/revela_training_corpus": ("train.jsonl", [["one\u2028line", "two"], ["three", "four"]], ["one\u2028line", "two", "three", "four"]),
    "trumancai/revela_code_training_corpus": ("train.jsonl", [{"src": "so", "text": ["one", "two"]}, {"src": "docs", "text": ["three"]}], ["one", "two", "three"]),
    "Tevatron/wikipedia-nq-corpus": ("corpus.jsonl.gz", [{"docid": "7", "title": "Cats", "text": "They purr."}], ["They purr."]),
    "code-rag-bench/stackoverflow-posts": ("data.jsonl", [{"text": "How do lists grow?\nBy append.", "meta": {"id": 1}}], ["How do lists grow?\nBy append."]),
    "code-rag-bench/online-tutorials": ("data.jsonl", [{"title": "Lists", "url": "u", "text": "Append."}], ["Append."]),
    "code-rag-bench/library-documentation": ("data.parquet", [{"doc_id": "list.append", "doc_content": "Append one item."}], ["Append one item."]),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("streaming", [False, True])
def test_published_shapes(tmp_path, monkeypatch, name, streaming):
    file, lines, texts = PUBLISHED[name]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    folder = tmp_path / "hub"
    folder.mkdir()
    if file.endswith("parquet"): pq.write_table(pa.Table.from_pylist(lines), folder / file)
    else: (folder / file).write_bytes(gzip.compress(content) if file.endswith("gz") else content)
    def load_here(source, **options): return datasets.load_dataset(str(folder) if source == name else source, cache_dir=str(tmp_path / "cache"), **options)
    monkeypatch.setattr(reading, "load_dataset", load_here)
    if name in reading.HUB_LINES:
        assert reading.HUB_LINES[name] == f"hf://datasets/{name}/*.json*"
        monkeypatch.setitem(reading.HUB_LINES, name, str(folder / "*.json*"))
    got = list(reading.stream_documents(name, skipped := reading.Skipped(), streaming=streaming))
    assert [text for _, _, text in got] == texts and not skipped.counts and len({id for id, _, _ in got}) == len(got)
    if "docid" in str(lines): assert got[0][:2] == ("7", "Cats")
    if "doc_id" in str(lines): assert got[0][0] == "list.append"


# chunks

TEXTS = st.text(alphabet=st.sampled_from("ab A.!? \n\t。é(:\r\"1"), max_size=300)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, max_words=st.integers(1, 30))
def test_chunks_hold_all_of_any_text(text, max_words):
    chunks = list(chunk_text(text, max_words))
    assert all(chunk.strip() and chunk in text and len(chunk.split()) <= max_words for chunk in chunks)
    assert "".join("".join(chunks).split()) == "".join(text.split())
    assert "".join(split_sentences(text)) == text


def test_whole_sentences():
    text = "Dr. Smith came, e.g. on Monday. He left! \"Why?\" she asked. It rained in the U.S. again. Done."
    assert [u.strip() for u in split_sentences(text)] == ["Dr. Smith came, e.g. on Monday.", "He left!", "\"Why?\" she asked.", "It rained in the U.S. again.", "Done."]
    assert list(chunk_text(text, 8)) == ["Dr. Smith came, e.g. on Monday. He left!", "\"Why?\" she asked.", "It rained in the U.S. again. Done."]


def test_long_sentence_is_cut_at_words():
    words = [f"w{i}" for i in range(25)]
    assert list(chunk_text(" ".join(words), 10)) == [" ".join(words[i:i + 10]) for i in (0, 10, 20)]


def test_code_keeps_its_layout():
    code = "\n\ndef f(x):\n    if x:\n\n        return [x,\n                x]\n\n\nclass A:\n    y = 1\n"
    assert looks_like_code(code) and list(chunk_text(code, 100)) == [code.strip("\n")]
    assert list(chunk_text(code, 4)) == ["def f(x):\n    if x:", "        return [x,\n                x]", "class A:\n    y = 1"[:8], "    y = 1"]


def test_text_without_spaces_makes_no_giant_chunk():
    for text in ["x" * 50_000, "猫" * 50_000, "猫坐在垫子上。" * 5_000]:
        assert max(map(len, chunk_text(text, 120))) <= 120 * 20


def test_chunk_corpus_order_ids_and_errors():
    corpus = Dataset.from_dict({"_id": ["b", "a", "blank"], "title": ["B", "A", ""], "text": ["One two. Three four.", "Five.", " \n"]})
    chunks = chunk_corpus(corpus, 2)
    assert chunks.column_names == ["_id", "doc_id", "title", "text"]
    assert list(zip(chunks["_id"], chunks["doc_id"], chunks["title"], chunks["text"])) == [
        ("b#0", "b", "B", "One two."), ("b#1", "b", "B", "Three four."), ("a#0", "a", "A", "Five.")]
    with pytest.raises(ValueError, match="at least 1"): chunk_corpus(corpus, 0)
    with pytest.raises(ValueError, match="title"): chunk_corpus(corpus.remove_columns("title"))


def test_real_code_chunks_are_pieces_of_their_modules():
    corpus = load_corpus("python:stdlib").select(range(0, 500, 25))
    texts = dict(zip(corpus["_id"], corpus["text"]))
    chunks = chunk_corpus(corpus, 50)
    together = {doc_id: "" for doc_id in texts}
    for chunk in chunks:
        assert chunk["text"] in texts[chunk["doc_id"]] and len(chunk["text"].split()) <= 50
        together[chunk["doc_id"]] += chunk["text"]
    assert all("".join(together[i].split()) == "".join(texts[i].split()) for i in texts)


@pytest.mark.skipif(not SHARED.exists(), reason="no shared data")
def test_shared_data():
    assert len(load_corpus(SHARED / "scifact")) == 5183                       # the BEIR corpus, not its queries
    wiki = load_corpus(SHARED / "wiki_small" / "training_corpus.jsonl.gz")
    assert len(wiki) == 8014 and not any(map(looks_like_code, wiki["text"]))
    chunks = chunk_corpus(wiki)
    assert len(chunks) > 8014 and max(len(text.split()) for text in chunks["text"]) <= 120
