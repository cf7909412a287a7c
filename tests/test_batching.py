"""Groups of chunks and the tensors made from them, against lists made by hand."""
import copy
import logging
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from revela_nb.batching import GroupCollator, make_groups, nearest_groups

SIX_CHUNKS = ["The cat sat on the warm mat. It purred.", "A cat purrs when it is warm and calm.", "Dogs bark at cats that sit on mats.",
              "Python lists grow with append. A list keeps order.", "Append adds one item to the end of a list.", "A tuple is a list that cannot grow."]
STRATEGIES = ["document", "bm25", "random"]


def make_chunks(lengths):
    ids = [f"{d}#{k}" for d, n in enumerate(lengths) for k in range(n)]
    return Dataset.from_dict({"_id": ids, "doc_id": [i.split("#")[0] for i in ids], "title": [""] * len(ids),
                              "text": [f"topic{i.split('#')[0]} number{i.split('#')[1]} words" for i in ids]})


def make_tokenizer(words, **special):
    vocab = {w: i for i, w in enumerate(dict.fromkeys(["<eos>", "<pad>", "<bos>", "<unk>"] + words))}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


WORDS = "query: passage: a b c d e f g h".split()


@pytest.fixture
def tokenizer(): return make_tokenizer(WORDS, eos_token="<eos>", pad_token="<pad>")


def ids(tokenizer, text): return tokenizer.convert_tokens_to_ids(text.split())


# groups

@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lengths", [[16], [40, 3, 3, 3, 20], [1] * 37, [5] * 11, [100]])
def test_every_chunk_once_and_only_a_remainder_lost(strategy, lengths):
    chunks = make_chunks(lengths)
    groups = make_groups(chunks, group_size=8, strategy=strategy, run_length=4)
    text_of = dict(zip(chunks["_id"], chunks["text"]))
    used = [i for row in groups for i in row["ids"]]
    assert groups.column_names == ["ids", "texts"] and len(groups) == len(chunks) // 8
    assert all(len(row["ids"]) == len(row["texts"]) == 8 for row in groups)
    assert len(set(used)) == len(used) and set(used) <= set(text_of)
    assert all(text_of[i] == t for row in groups for i, t in zip(row["ids"], row["texts"]))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_seed(strategy):
    chunks = make_chunks([9, 7, 30, 4, 12])
    one, two, other = (make_groups(chunks, 4, strategy, seed=s, run_length=2)["ids"][:] for s in (3, 3, 4))
    assert one == two and one != other


def test_leftover_is_logged(caplog):
    with caplog.at_level(logging.INFO, "revela_nb.batching"): groups = make_groups(make_chunks([21]), group_size=8)
    assert len(groups) == 2 and any("5 of 21 chunks fill no group" in m for m in caplog.messages)


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=12), run_length=st.integers(1, 4), per_group=st.integers(1, 4), seed=st.integers(0, 99))
def test_document_groups(lengths, run_length, per_group, seed):
    size = run_length * per_group
    if size < 2 or sum(lengths) < size: return
    groups = make_groups(make_chunks(lengths), size, "document", seed, run_length)["ids"][:]
    assert len(groups) == sum(lengths) // size
    runs = {d: n // run_length for d, n in enumerate(lengths)}
    for group in groups:
        whole = []
        for k in range(0, size, run_length):
            run = [tuple(map(int, i.split("#"))) for i in group[k:k + run_length]]
            assert run == sorted(run)                                                      # corpus order inside a run
            if all(c < runs[d] * run_length for d, c in run):                             # not a pooled run
                assert len({d for d, _ in run}) == 1 and [c for _, c in run] == list(range(run[0][1], run[0][1] + run_length))
                whole.append(run[0][0])
        repeated = [d for d, n in Counter(whole).items() if n > 1]
        assert all(runs[d] > len(groups) for d in repeated)                                # different documents wherever possible


def test_one_document_a_group():
    groups = make_groups(make_chunks([16, 32, 16]), 16, run_length=16)["ids"][:]
    assert all(len({i.split("#")[0] for i in group}) == 1 for group in groups) and len(groups) == 4


def test_rows_of_a_document_need_not_lie_together():
    chunks = make_chunks([8, 8])
    mixed = chunks.select([i for pair in zip(range(8), range(8, 16)) for i in pair])
    assert sorted(map(sorted, make_groups(mixed, 4, run_length=4)["ids"][:])) == sorted(map(sorted, make_groups(chunks, 4, run_length=4)["ids"][:]))


def test_bm25_finds_the_topics():
    for seed in range(5):
        assert {frozenset(g.tolist()) for g in nearest_groups(SIX_CHUNKS, 3, np.random.default_rng(seed))} == {frozenset([0, 1, 2]), frozenset([3, 4, 5])}


def test_bm25_takes_the_nearest_free_chunks():
    rng = np.random.default_rng(0)
    words = [[f"word{w}" for w in rng.zipf(1.5, size=12) % 40] for _ in range(60)]
    df, mean = Counter(w for ws in words for w in set(ws)), np.mean([len(ws) for ws in words])
    def score(query, text, k1=1.5, b=.75):                                                 # Lucene's BM25, written out
        return sum(np.log(1 + (60 - df[w] + .5) / (df[w] + .5)) * (tf := text.count(w)) / (tf + k1 * (1 - b + b * len(text) / mean)) for w in query)
    free = set(range(60))
    for seed, *others in nearest_groups([" ".join(ws) for ws in words], 6, rng):
        free.remove(seed)
        best = sorted((score(words[seed], words[j]) for j in free), reverse=True)[:5]
        assert np.allclose([score(words[seed], words[j]) for j in others], best, atol=1e-4)
        free -= set(others)
    assert not free


def test_bm25_with_chunks_of_no_words():
    chunks = Dataset.from_dict({"_id": list("abcdef"), "doc_id": list("abcdef"), "text": ["( )", "the of", "...", "{}", "word", "!"]})
    assert sorted(i for g in make_groups(chunks, 3, "bm25")["ids"] for i in g) == list("abcdef")
    with pytest.raises(ValueError, match="'document' or 'random'"): make_groups(chunks.select([0, 1, 2]), 3, "bm25")


@pytest.mark.parametrize("options, match", [
    (dict(group_size=16), "12 chunks do not fill one group of 16"), (dict(group_size=8, run_length=3), "3 does not divide 8"), (dict(group_size=8, run_length=0), "run_length"),
    (dict(group_size=1), "at least 2"), (dict(group_size=0), "at least 2"), (dict(group_size=4, strategy="best"), "document, bm25, random")])
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match): make_groups(make_chunks([12]), **options)


def test_run_length_matters_to_document_only():
    assert len(make_groups(make_chunks([12]), 6, "random")) == 2


def test_missing_columns_and_empty():
    with pytest.raises(ValueError, match="chunk_corpus"): make_groups(Dataset.from_dict({"_id": ["a"], "text": ["b"]}))
    with pytest.raises(ValueError, match="0 chunks"): make_groups(make_chunks([12]).select([]))


# batches

def test_contract_by_hand(tokenizer):
    eos, pad = 0, 1
    q, p, a, b, c, d, e = ids(tokenizer, "query: passage: a b c d e")
    batch = GroupCollator(tokenizer, tokenizer)([{"texts": ["a b c d e", "a"]}])
    assert batch["query_input_ids"].tolist() == [[q, a, b, eos], [q, eos, pad, pad]]                     # int(.5 * 6) = 3, int(.5 * 2) = 1
    assert batch["query_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["passage_input_ids"].tolist() == [[p, a, b, c, d, e, eos], [p, a, eos, pad, pad, pad, pad]]
    assert batch["passage_attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 0, 0, 0, 0]]
    assert batch["input_ids"].tolist() == [[a, b, c, d, e], [a, pad, pad, pad, pad]]                     # no bos, no prefix, no eos
    assert batch["labels"].tolist() == [[a, b, c, d, e], [a, -100, -100, -100, -100]]
    assert batch["group_size"] == 2 and isinstance(batch["group_size"], int)
    assert all(v.dtype == torch.int64 for v in batch.values() if torch.is_tensor(v))


def test_the_half_is_of_what_is_left_after_cutting(tokenizer):
    q, p, a, b, c = ids(tokenizer, "query: passage: a b c")
    batch = GroupCollator(tokenizer, tokenizer, max_length=5)([{"texts": ["a b c d e f g h"]}])
    assert batch["passage_input_ids"].tolist() == [[p, a, b, c, 0]]                                       # five, eos counted
    assert batch["query_input_ids"].tolist() == [[q, a, 0]]                                               # int(.5 * 4)
    assert batch["input_ids"].shape == (1, 5)


@pytest.mark.parametrize("fraction, n", [(0.01, 1), (0.5, 3), (0.99, 5), (1.0, 6)])
def test_query_fraction(tokenizer, fraction, n):
    whole = ids(tokenizer, "query: a b c d e")
    by_option = GroupCollator(tokenizer, tokenizer, query_fraction=fraction)([{"texts": ["a b c d e"]}])
    by_row = GroupCollator(tokenizer, tokenizer)([{"texts": ["a b c d e"], "query_fraction": fraction}])
    assert by_option["query_input_ids"].tolist() == by_row["query_input_ids"].tolist() == [whole[:n] + [0]]


def test_two_groups_are_stacked_in_order(tokenizer):
    collate = GroupCollator(tokenizer, tokenizer)
    groups = [{"texts": ["a b", "c"]}, {"texts": ["d e f", "g"]}]
    both, alone = collate(groups), [collate([g]) for g in groups]
    assert both["group_size"] == 2 and both["input_ids"].shape[0] == 4
    for kind in ("query_", "passage_", ""):
        for n in range(4):
            one = alone[n // 2]
            real = one[kind + "input_ids"][n % 2][one[kind + "attention_mask"][n % 2].bool()]
            assert both[kind + "input_ids"][n][both[kind + "attention_mask"][n].bool()].equal(real)


def test_pad_is_eos_where_there_is_none_and_real_eos_stays_a_label():
    tokenizer = make_tokenizer(WORDS, eos_token="<eos>")
    batch = GroupCollator(tokenizer, tokenizer)([{"texts": ["a <eos> b", "a"]}])
    a, b = ids(tokenizer, "a b")
    assert batch["input_ids"].tolist() == [[a, 0, b], [a, 0, 0]]
    assert batch["labels"].tolist() == [[a, 0, b], [a, -100, -100]]
    assert tokenizer.pad_token is None


def test_tokenizers_are_not_changed():
    tokenizer = make_tokenizer(WORDS, eos_token="<eos>", padding_side="left", truncation_side="left")
    before = tokenizer.backend_tokenizer.to_str(), copy.deepcopy(tokenizer.special_tokens_map)
    batch = GroupCollator(tokenizer, tokenizer, max_length=3)([{"texts": ["a b c d", "a"]}])
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map) == before
    assert batch["input_ids"].tolist()[0] == ids(tokenizer, "a b c") and batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]   # right side, whatever the tokenizer's


@pytest.mark.parametrize("text", ["", "   ", "\n\n"])
def test_chunk_without_tokens(tokenizer, text):
    for prefix in ("query: ", ""):
        batch = GroupCollator(tokenizer, tokenizer, query_prefix=prefix, passage_prefix=prefix)([{"texts": [text, "a b"]}])
        assert batch["input_ids"][0, 0] == 0 and batch["attention_mask"].sum(1).tolist() == [1, 2]
        for kind in ("query_", "passage_"):
            row, mask = batch[kind + "input_ids"][0], batch[kind + "attention_mask"][0]
            assert row[mask.bool()].tolist() == ids(tokenizer, prefix) + [0]
        assert (batch["labels"] == -100).equal(batch["attention_mask"] == 0)


def test_two_different_tokenizers(tokenizer):
    other = make_tokenizer(list(reversed(WORDS)), eos_token="<eos>", pad_token="<pad>")
    batch = GroupCollator(tokenizer, other)([{"texts": ["a b", "h"]}])
    assert batch["input_ids"][0].tolist() == ids(other, "a b") and batch["passage_input_ids"][0].tolist() == ids(tokenizer, "passage: a b <eos>")


def test_bad_collator_input(tokenizer):
    no_eos = make_tokenizer(WORDS, pad_token="<pad>")
    with pytest.raises(ValueError, match="retriever's tokenizer has no eos"): GroupCollator(no_eos, tokenizer)
    with pytest.raises(ValueError, match="language model's tokenizer has no eos"): GroupCollator(tokenizer, no_eos)
    with pytest.raises(ValueError, match="max_length"): GroupCollator(tokenizer, tokenizer, max_length=1)
    for fraction in (0, 1.5):
        with pytest.raises(ValueError, match="query_fraction"): GroupCollator(tokenizer, tokenizer, query_fraction=fraction)
    collate = GroupCollator(tokenizer, tokenizer)
    for batch in ([{"texts": ["a"]}, {"texts": ["a", "b"]}], [{"texts": []}], []):
        with pytest.raises(ValueError, match="one size"): collate(batch)


def test_the_retriever_reads_passages_the_same_way(tokenizer):
    from revela_nb.retriever import tokenize_texts
    batch = GroupCollator(tokenizer, tokenizer, max_length=4)([{"texts": ["a b c d e", "a", ""]}])
    real = [row[mask.bool()].tolist() for row, mask in zip(batch["passage_input_ids"], batch["passage_attention_mask"])]
    assert real == tokenize_texts(tokenizer, ["a b c d e", "a", ""], "passage: ", max_length=4)


def test_in_a_data_loader(tokenizer):
    groups = make_groups(make_chunks([8, 8]), 4, run_length=2)
    loader = torch.utils.data.DataLoader(groups, batch_size=2, collate_fn=GroupCollator(tokenizer, tokenizer))
    assert [batch["input_ids"].shape[0] for batch in loader] == [8, 8]
