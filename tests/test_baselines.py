"""Baselines: the same call contract as Revela, losses against loops, gradients, groups of one."""
import math, random

import pytest
import torch
from revela_nb.baselines import Contrastive, Replug, SimCSE, continuation_scores, counting_reads, crop, pick_others, replug_loss, second_halves
from revela_nb.batching import GroupCollator
from revela_nb.retriever import Retriever
from revela_nb.trainer import RevelaArguments, RevelaTrainer
from datasets import Dataset
from test_retriever import make_backbone
from transformers import AutoModelForCausalLM, GPT2Config

CHUNKS = ["The cat sat on the mat.", "A cat purrs when warm.", "Lists grow with append.", "x", "Append adds an item at the end.", ""]
ALL = (Replug, Contrastive, SimCSE)


@pytest.fixture(scope="module")
def toy(tmp_path_factory): return make_backbone(tmp_path_factory.mktemp("toy"))


def build(kind, toy, **options): return kind(Retriever.from_pretrained(toy, pooling="mean"), AutoModelForCausalLM.from_pretrained(toy), **options)


def collate(model, *groups): return GroupCollator(model.retriever.tokenizer, model.retriever.tokenizer)([{"texts": g} for g in groups])


def test_replug_gradients():
    torch.manual_seed(0)
    similarity, scores = torch.rand(6, 6, dtype=torch.double, requires_grad=True), torch.rand(6, 6, dtype=torch.double)
    loss = replug_loss(similarity, scores, 3, 0.5, 0.5)
    for i in range(6):
        others = [j for j in range(6) if j // 3 == i // 3 and j != i]
        p = [math.exp(similarity[i, j].item() / 0.5) for j in others]; q = [math.exp(scores[i, j].item() / 0.5) for j in others]
        kl = sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q))
        assert loss[i].item() == pytest.approx(kl, abs=1e-6)
    # the loss is computed in float32: finite differences with a step to match
    assert torch.autograd.gradcheck(lambda s: replug_loss(s, scores, 3, 0.5, 0.5).sum(), similarity, eps=1e-2, atol=1e-2)
    grad, = torch.autograd.grad(loss.sum(), similarity)
    outside = torch.ones(6, 6, dtype=torch.bool); outside[:3, :3] = outside[3:, 3:] = False
    assert (grad[outside] == 0).all() and (grad.diag() == 0).all() and pick_others(grad, 3).abs().max() > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_against_one_pair_at_a_time(toy, side):
    model = build(Replug, toy)
    batch = collate(model, CHUNKS[:3], CHUNKS[3:])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows = [i[m.bool()].tolist() for i, m in zip(ids, mask)]
    if side == "left": ids, mask = ids.flip(1), mask.flip(1); ids = torch.stack([torch.tensor([0] * (ids.shape[1] - len(r)) + r) for r in rows])
    scores = continuation_scores(model.lm, ids, mask, second_halves(mask, ids), 3, batch_size=4)
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            half, expected = max(1, len(a) // 2), 0.
            if i != j and i // 3 == j // 3 and len(a) > half:
                with torch.no_grad(): told = model.lm(input_ids=torch.tensor([b + a])).logits[0].log_softmax(-1)
                expected = sum(told[len(b) + t - 1, a[t]].item() for t in range(half, len(a))) / (len(a) - half)
            assert scores[i, j].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_contract(toy, kind, tmp_path):
    model = build(kind, toy)
    before = {n: p.clone() for n, p in model.named_parameters()}
    args = RevelaArguments(output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, warmup_steps=0, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1)
    trainer = RevelaTrainer(model=model, args=args, train_dataset=Dataset.from_list([{"texts": CHUNKS}] * 2), data_collator=GroupCollator(model.retriever.tokenizer, model.retriever.tokenizer))
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(n.startswith("retriever.") for n in moved), "the language model must stay"
    assert all(math.isfinite(r["gain"]) for r in trainer.state.log_history if "gain" in r)


@pytest.mark.parametrize("kind", ALL)
def test_a_group_of_one(toy, kind):
    model = build(kind, toy).train()
    for text in ("one chunk only", ""):
        out = model(**collate(model, [text]))
        out.loss.backward()
        assert out.loss.item() == 0 and out.similarity.shape == (1, 1) and math.isfinite(out.plain_loss.item())
        assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_costs(toy):
    for size in (2, 5):
        for kind, rows in ((Replug, size * (size - 1)), (Contrastive, 0), (SimCSE, 0)):
            model = build(kind, toy)
            with counting_reads(model.lm) as reads: model(**collate(model, CHUNKS[:size]))
            assert reads["rows"] == rows
            with counting_reads(model.lm) as reads: model(**collate(model, CHUNKS[:size], CHUNKS[:size]))
            assert reads["rows"] == 2 * rows


def test_crops():
    random.seed(0)
    assert crop([]) == [] and crop([5]) == [5]
    text = list(range(30))
    pieces = [crop(text) for _ in range(300)]
    assert all(p == text[p[0]:p[0] + len(p)] for p in pieces) and {len(p) for p in pieces} == set(range(3, 15))
    assert min(p[0] for p in pieces) == 0 and max(p[-1] for p in pieces) == 29


def test_simcse_needs_dropout(toy, tmp_path):
    model = build(SimCSE, toy, dropout=0.5).train()
    batch = collate(model, CHUNKS[:3])
    assert not torch.equal(model(**batch).similarity, model(**batch).similarity)
    model.eval()
    assert torch.equal(model(**batch).similarity, model(**batch).similarity)
    folder = make_backbone(tmp_path, GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match="attention_dropout"): build(SimCSE, folder)
