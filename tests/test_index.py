"""Embeddings kept on disk, the index chosen by size, and what is refused."""
import json, os

import numpy as np
import pytest
import torch

from revela_nb.index import build_index, cached_chunks, choose_kind, chunk_line, dense_searcher, encode_cached, load_index, model_fingerprint, read_shards, save_index
from revela_nb.retriever import Retriever


@pytest.fixture(scope="module")
def retriever():
    "A tiny random Llama with the package's tokenizer."
    from pathlib import Path
    from transformers import LlamaConfig, LlamaModel, set_seed
    from revela_nb.loading import load_tokenizer
    set_seed(0)
    tokenizer = load_tokenizer(Path(__file__).parents[1] / "revela_nb" / "backbone")
    model = LlamaModel(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2))
    return Retriever(model, tokenizer, pooling="mean")


@pytest.fixture
def vectors():
    draw = np.random.default_rng(0)
    x = draw.standard_normal((10, 32), np.float32)[draw.integers(0, 10, 1500)] + 0.5 * draw.standard_normal((1500, 32), np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def count_encoded(retriever, monkeypatch):
    "The texts that are really encoded from now on."
    seen, encode = [], Retriever.encode_passages
    def spy(self, texts, *rest, **named):
        seen.extend(texts)
        return encode(self, texts, *rest, **named)
    monkeypatch.setattr(Retriever, "encode_passages", spy)
    return seen


def test_only_new_texts_are_encoded_and_rows_are_right(retriever, tmp_path, monkeypatch):
    texts = [f"number {i}" for i in range(10)] + ["number 3", ""]
    expected = retriever.encode_passages(texts, progress=False).numpy()
    seen = count_encoded(retriever, monkeypatch)
    assert np.allclose(encode_cached(retriever, texts, tmp_path, shard_size=4), expected, atol=1e-5) and len(seen) == 11
    assert np.allclose(encode_cached(retriever, texts[::-1], tmp_path), expected[::-1], atol=1e-5) and len(seen) == 11
    encode_cached(retriever, [*texts, "new"], tmp_path)
    assert seen[11:] == ["new"]
    assert encode_cached(retriever, [], tmp_path).shape == (0, 32)


def test_a_kill_loses_one_shard_at_most(retriever, tmp_path, monkeypatch):
    texts, encode, calls = [f"number {i}" for i in range(10)], Retriever.encode_passages, []
    def killed(self, *args, **named):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return encode(self, *args, **named)
    with monkeypatch.context() as patch:
        patch.setattr(Retriever, "encode_passages", killed)
        with pytest.raises(KeyboardInterrupt): encode_cached(retriever, texts, tmp_path, shard_size=4)
    seen = count_encoded(retriever, monkeypatch)
    encode_cached(retriever, texts, tmp_path, shard_size=4)
    assert seen == texts[8:]


@pytest.mark.parametrize("damage", ["cut", "flip", "pickle", "json", "gone"])
def test_damaged_shards_are_encoded_again(retriever, tmp_path, caplog, damage):
    texts = [f"number {i}" for i in range(8)]
    expected = encode_cached(retriever, texts, tmp_path, shard_size=4)
    folder = tmp_path / model_fingerprint(retriever)
    shard = sorted(folder.glob("*.npy"))[0]
    if damage == "cut": os.truncate(shard, 150)
    elif damage == "flip":
        data = bytearray(shard.read_bytes()); data[-1] ^= 1; shard.write_bytes(data)
    elif damage == "pickle": np.save(shard, np.array([{"a": 1}] * 4, dtype=object), allow_pickle=True)
    elif damage == "json": shard.with_suffix(".json").write_text("[")
    else: shard.unlink()
    assert len(read_shards(folder)[0]) == 1 and "damaged" in caplog.text
    assert np.allclose(encode_cached(retriever, texts, tmp_path), expected, atol=1e-5)


def test_fingerprint_sees_weights_and_settings(retriever):
    first = model_fingerprint(retriever)
    retriever.encode_queries(["a text that the tokenizer cuts and pads", "short"], progress=False)
    assert first == model_fingerprint(retriever), "encoding left a trace in the fingerprint"
    retriever.pooling = "eos"; other = model_fingerprint(retriever); retriever.pooling = "mean"
    weight = next(retriever.parameters())
    with torch.no_grad(): weight[0, 0] += 1
    moved = model_fingerprint(retriever)
    with torch.no_grad(): weight[0, 0] -= 1
    assert len({first, other, moved}) == 3


def test_kinds_and_recall(vectors):
    assert [choose_kind(n) for n in (1, 199_999, 200_000, 499_999, 500_000, 5_000_000)] == ["flat", "flat", "hnsw", "hnsw", "ivfsq", "ivfpq"]
    recall = {kind: build_index(vectors, kind)[1] for kind in ("flat", "hnsw", "ivfsq", "ivfpq")}
    assert build_index(vectors, "ivfpq")[0].do_polysemous_training is False # with it, this test takes seconds and a real index minutes
    assert recall["flat"] == 1 and recall["hnsw"] > 0.9 and 0.1 < recall["ivfpq"] < 1 and recall["ivfsq"] > 0.1, recall
    with pytest.raises(ValueError, match="tree"): build_index(vectors, "tree")


def test_saved_index_is_loaded_or_refused(vectors, tmp_path):
    index, _ = build_index(vectors)
    ids = [f"d{i}" for i in range(len(vectors))]
    with pytest.raises(ValueError, match="ids"): save_index(index, ids[1:], "model", tmp_path / "x")
    save_index(index, ids, "model", tmp_path / "x")
    again, stored = load_index(tmp_path / "x", "model")
    assert stored == ids and (again.search(vectors[:5], 3)[1] == index.search(vectors[:5], 3)[1]).all()
    with pytest.raises(ValueError, match="another model"): load_index(tmp_path / "x", "other")
    with pytest.raises(FileNotFoundError): load_index(tmp_path / "y", "model")
    for name in ("index.faiss", "ids.json", "manifest.json"):
        save_index(index, ids, "model", tmp_path / "x")
        os.truncate(tmp_path / "x" / name, 20)
        with pytest.raises(ValueError, match="damaged"): load_index(tmp_path / "x", "model")
    assert not list(tmp_path.glob(".*.partial"))


def test_changed_files_are_read_again(retriever, tmp_path, monkeypatch):
    notes, kept = tmp_path / "notes", tmp_path / "kept"
    notes.mkdir()
    (notes / "a.txt").write_text("One thing here.\n"); (notes / "b.txt").write_text("Another thing there.\n")
    seen = count_encoded(retriever, monkeypatch)
    dense_searcher(retriever, cached_chunks(str(notes), 20, kept), kept)
    assert len(seen) == 2
    dense_searcher(retriever, cached_chunks(str(notes), 20, kept), kept)
    assert len(seen) == 2
    (notes / "b.txt").write_text("Something else altogether.\n")
    answer = dense_searcher(retriever, cached_chunks(str(notes), 20, kept), kept)
    assert len(seen) == 3 and "altogether" in seen[2] and len(answer("thing", 5)) == 2


def test_lines_of_repeated_chunks(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("Same words.\n\nSame words.\n\nOther words.\n")
    assert [chunk_line(path, i, 2) for i in range(4)] == [1, 3, 5, None]
    path.write_bytes(b"\xff\xfe")
    assert chunk_line(path, 0, 2) is None
