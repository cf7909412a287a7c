"""Models that others can load: sentence-transformers, the authors' adapters and evaluation recipe, cards and the hub."""
import json, shutil

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_retriever import SMALL, TEXTS, make_backbone
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from revela_nb.loading import LORA_TARGETS, replacing_folder
from revela_nb.retriever import Retriever

LONG = ["warm cats and dogs " * n for n in (1, 60, 3, 200)]
ALL = TEXTS + LONG + ["  spaces at both ends \n", "query: twice", "<eos> in the middle <eos>", "héllo 日本 🐈"]


def trained(folder, **options):
    "A retriever whose adapter, if any, does something."
    retriever = Retriever.from_pretrained(folder, **options)
    torch.manual_seed(1)
    with torch.no_grad(): [p.normal_(std=0.1) for name, p in retriever.named_parameters() if "lora_B" in name]
    return retriever


@pytest.fixture(scope="module")
def toy(tmp_path_factory): return make_backbone(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("pooling", ["eos", "mean"])
def test_sentence_transformer(toy, tmp_path, pooling, lora):
    st = pytest.importorskip("sentence_transformers")
    ours = trained(toy, pooling=pooling, lora=lora, max_length=24)
    before = ours.encode_queries(ALL, progress=False)
    ours.export_sentence_transformer(tmp_path / "out")
    theirs = st.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    for batch_size in (1, 3, 64):
        torch.testing.assert_close(torch.from_numpy(theirs.encode_query(ALL, batch_size=batch_size)), before, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.from_numpy(theirs.encode(ALL, prompt_name="document", batch_size=batch_size)), ours.encode_passages(ALL, progress=False), atol=1e-5, rtol=0)
    assert theirs.prompts == {"query": "query: ", "document": "passage: "} and theirs.max_seq_length == 24 and theirs.similarity_fn_name == "cosine"
    ids = theirs.tokenizer("query: " + LONG[3], truncation=True)["input_ids"]
    assert len(ids) == 24 and ids[-1] == theirs.tokenizer.eos_token_id
    assert torch.equal(ours.encode_queries(ALL, progress=False), before), "exporting changed the retriever"
    again = Retriever.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again.encode_queries(ALL, progress=False), before, atol=1e-5, rtol=0)
    assert (again.pooling, again.max_length) == (pooling, 24)


def test_truncate_dim(toy, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    ours = Retriever.from_pretrained(toy, pooling="mean")
    ours.export_sentence_transformer(tmp_path / "out")
    theirs = st.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode_document(TEXTS, truncate_dim=8, normalize_embeddings=True)
    short = ours.encode_passages(TEXTS, progress=False, truncate_dim=8)
    torch.testing.assert_close(torch.from_numpy(theirs), short, atol=1e-5, rtol=0)
    torch.testing.assert_close(short.norm(dim=-1), torch.ones(len(TEXTS)))
    assert torch.equal(ours.encode_queries(TEXTS, progress=False, truncate_dim=32), F.normalize(ours.encode_queries(TEXTS, progress=False)))
    for wrong in (0, 33, -1):
        with pytest.raises(ValueError, match="truncate_dim must be 1 to 32"): ours.encode_queries(TEXTS, progress=False, truncate_dim=wrong)


def test_export_with_prefixes_and_special_tokens(toy, tmp_path):
    "Other prefixes, none at all, and a tokenizer that puts a token of its own first."
    st = pytest.importorskip("sentence_transformers")
    folder = shutil.copytree(toy, tmp_path / "bos")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 1)])
    tokenizer.save_pretrained(folder)
    for special in (False, True):
        ours = Retriever(AutoModel.from_pretrained(folder), Retriever.from_pretrained(folder).tokenizer, query_prefix="Q ", passage_prefix="", max_length=9, add_special_tokens=special)
        ours.export_sentence_transformer(tmp_path / "out") # twice into one folder
        theirs = st.SentenceTransformer(str(tmp_path / "out"), device="cpu")
        torch.testing.assert_close(torch.from_numpy(theirs.encode_query(ALL)), ours.encode_queries(ALL, progress=False), atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.from_numpy(theirs.encode_document(ALL)), ours.encode_passages(ALL, progress=False), atol=1e-5, rtol=0)
        ids = theirs.tokenizer(LONG[3], truncation=True)["input_ids"]
        assert (ids[0] == 1) == special and len(ids) == 9 and Retriever.from_pretrained(tmp_path / "out").add_special_tokens == special


def test_files_have_the_usual_permissions(toy, tmp_path):
    "What the umask gives to others, the weights give, too: safetensors alone would make them their owner's."
    import os
    retriever, before = Retriever.from_pretrained(toy), os.umask(0o027)
    try:
        retriever.save_pretrained(tmp_path / "own")
        retriever.export_sentence_transformer(tmp_path / "st")
    finally: os.umask(before)
    modes = {p.name: oct(p.stat().st_mode & 0o777) for name in ("own", "st") for p in (tmp_path / name).rglob("*") if p.is_file()}
    assert "model.safetensors" in modes and set(modes.values()) == {"0o640"}, modes


def test_export_replaces_and_refuses(toy, tmp_path):
    pytest.importorskip("sentence_transformers")
    trained(toy, lora=2).save_pretrained(tmp_path / "out")
    trained(toy, lora=2).export_sentence_transformer(tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists() and (tmp_path / "out" / "modules.json").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError): Retriever.from_pretrained(toy).export_sentence_transformer(tmp_path / "file")
    retriever = Retriever.from_pretrained(toy)
    class Slow: is_fast = False
    retriever.tokenizer = Slow()
    with pytest.raises(ValueError, match="slow tokenizer"): retriever.export_sentence_transformer(tmp_path / "slow")
    assert not (tmp_path / "slow").exists()


# ---- the authors' layout

def authors_adapter(folder, base, head=False, targets=tuple(LORA_TARGETS), rank=4):
    "A PEFT folder as their script writes it (LoRA on the headless model), or as trained on the model with its head."
    model = (AutoModelForCausalLM if head else AutoModel).from_pretrained(base)
    config = LoraConfig(r=rank, lora_alpha=rank / 4, lora_dropout=0.1, target_modules=list(targets), task_type="CAUSAL_LM" if head else "FEATURE_EXTRACTION")
    model = get_peft_model(model, config)
    torch.manual_seed(2)
    with torch.no_grad(): [p.normal_(std=0.2) for name, p in model.named_parameters() if "lora_B" in name]
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def recipe(base, adapter, texts, prefix, max_length=160):
    "The published evaluation recipe, written out: adapter merged into its base, prefix, eos, last token, unit length; one text at a time."
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter).merge_and_unload().eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [tokenizer(prefix + t, truncation=True, max_length=max_length - 1)["input_ids"] + [tokenizer.eos_token_id] for t in texts]
    with torch.no_grad(): states = [model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    return F.normalize(torch.stack(states), dim=-1)


FAMILIES = {"llama": LlamaConfig(**SMALL), "qwen2": Qwen2Config(**SMALL | {"vocab_size": 320}), "smollm2": LlamaConfig(**SMALL | {"tie_word_embeddings": True})}


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_authors_adapters_load(tmp_path, family, head):
    base = make_backbone(tmp_path / "base", FAMILIES[family])
    folder = authors_adapter(tmp_path / "Revela-135M", base, head)
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert all(name.startswith("base_model.model.model.layers." if head else "base_model.model.layers.") for name in names)
    retriever = Retriever.from_pretrained(folder)
    assert (retriever.pooling, retriever.query_prefix, retriever.passage_prefix, retriever.max_length) == ("eos", "query: ", "passage: ", 160)
    reference = folder if not head else authors_adapter(tmp_path / "same", base)
    if head: save_file({n.replace("model.model.model", "model.model"): x for n, x in load_file(folder / "adapter_model.safetensors").items()}, reference / "adapter_model.safetensors")
    torch.testing.assert_close(retriever.encode_queries(ALL, progress=False), recipe(base, reference, ALL, "query: "), atol=1e-5, rtol=0)
    torch.testing.assert_close(retriever.encode_passages(ALL, progress=False), recipe(base, reference, ALL, "passage: "), atol=1e-5, rtol=0)
    plain = Retriever.from_pretrained(base).encode_queries(ALL, progress=False)
    assert (retriever.encode_queries(ALL, progress=False) - plain).abs().max() > 1e-2, "the adapter does nothing"


def test_authors_llama_keeps_its_bos(tmp_path):
    base = make_backbone(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 1)])
    tokenizer.save_pretrained(base)
    folder = authors_adapter(tmp_path / "Revela-1b", base)
    retriever = Retriever.from_pretrained(folder)
    torch.testing.assert_close(retriever.encode_queries(ALL, progress=False), recipe(base, folder, ALL, "query: "), atol=1e-5, rtol=0)
    retriever.save_pretrained(tmp_path / "ours")
    assert Retriever.from_pretrained(tmp_path / "ours").add_special_tokens and not Retriever.from_pretrained(base).add_special_tokens


def test_ours_load_in_their_recipe(toy, tmp_path):
    ours = trained(toy, lora=4)
    ours.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(toy)
    for texts, prefix, encode in [(ALL, "query: ", ours.encode_queries), (ALL, "passage: ", ours.encode_passages)]:
        torch.testing.assert_close(recipe(toy, tmp_path / "out", texts, prefix), encode(texts, progress=False), atol=1e-5, rtol=0)


@pytest.mark.parametrize("change, message", [
    ({"num_hidden_layers": 3}, "lacks '.*layers.2"), ({"num_hidden_layers": 1}, "no place for '.*layers.1"),
    ({"hidden_size": 48, "head_dim": 12}, r"has the shape .* the base needs")])
def test_adapter_for_another_base(toy, tmp_path, change, message):
    folder = authors_adapter(tmp_path / "adapter", toy)
    other = make_backbone(tmp_path / "other", LlamaConfig(**SMALL | change))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    with pytest.raises(ValueError, match="made for another base model.*" + message): Retriever.from_pretrained(folder)


def test_adapter_for_another_architecture(toy, tmp_path):
    from test_retriever import CONFIGS
    folder = authors_adapter(tmp_path / "adapter", toy)
    other = make_backbone(tmp_path / "other", CONFIGS["gpt2"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    with pytest.raises(ValueError, match="cannot be put on .*other"): Retriever.from_pretrained(folder)


# ---- cards, the hub, the command

REPORT = {"before": {"ndcg@10": .02, "mrr@10": .01}, "after": {"ndcg@10": .1366, "mrr@10": .11}, "steps": 80, "seed": 7, "queries": 500, "functions": 2500,
          "backbone": "shipped", "versions": {"torch": "2.13.0"}, "log": [{"step": 5, "ndcg@10": 1}]}


def test_card_says_what_the_report_says(toy):
    from revela_nb.export import model_card
    card = str(model_card(Retriever.from_pretrained(toy, pooling="mean", query_prefix="Q: ", max_length=33), REPORT))
    for part in ("| before | 0.020 | 0.010 |", "| after | 0.137 | 0.110 |", "* steps: 80", "* seed: 7", "500 questions over 2500", "torch 2.13.0", "'Q: '", "mean pooling", "33 tokens", "## Limits"): assert part in card, part
    bare = str(model_card(Retriever.from_pretrained(toy), {"max_steps": 5, "corpus": "notes/"}))
    assert "no figures are known" in bare and bare.endswith("on your own texts first.\n")
    assert not any(word in bare for word in ("if any", "unknown", "None", "Versions", "questions over")), "what is not known is not spoken of"
    assert "Versions: torch 2.13.0." in card


@pytest.mark.parametrize("form", ["sentence-transformers", "peft"])
def test_push(toy, monkeypatch, form):
    pytest.importorskip("sentence_transformers")
    from pathlib import Path
    from types import SimpleNamespace
    from revela_nb import export
    calls = {}
    class Api:
        def create_repo(self, repo_id, private, exist_ok): calls["repo"] = (repo_id, private)
        def upload_folder(self, repo_id, folder_path, commit_message):
            calls["files"] = {p.name for p in Path(folder_path).iterdir()}
            calls["card"] = (Path(folder_path) / "README.md").read_text(encoding="utf-8")
            return SimpleNamespace(commit_url="https://hub/commit/1")
    monkeypatch.setattr(export, "HfApi", Api)
    assert export.push_to_hub(trained(toy, lora=2), "me/tiny", REPORT, form) == "https://hub/commit/1"
    assert calls["repo"] == ("me/tiny", True) and "| after | 0.137" in calls["card"]
    assert ("modules.json" in calls["files"]) == (form != "peft") and ("adapter_model.safetensors" in calls["files"]) == (form == "peft")
    calls.clear()
    with pytest.raises(ValueError, match="no adapter"): export.push_to_hub(Retriever.from_pretrained(toy), "me/tiny", REPORT, "peft")
    assert not calls, "something was sent"


def test_command(toy, tmp_path, capsys):
    st = pytest.importorskip("sentence_transformers")
    from revela_nb.cli import main
    run = tmp_path / "run"
    ours = trained(toy, lora=2)
    ours.save_pretrained(run / "retriever")
    (run / "report.json").write_text(json.dumps(REPORT))
    for form in ("sentence-transformers", "peft"): assert main(["export", str(run / "retriever"), "--out", str(tmp_path / form), "--format", form]) == 0
    assert "| after | 0.137" in (tmp_path / "peft" / "README.md").read_text(encoding="utf-8")
    theirs = st.SentenceTransformer(str(tmp_path / "sentence-transformers"), device="cpu").encode_query(TEXTS)
    torch.testing.assert_close(torch.from_numpy(theirs), ours.encode_queries(TEXTS, progress=False), atol=1e-5, rtol=0)
    capsys.readouterr()
    (tmp_path / "peft" / "notes.txt").write_text("mine")
    before = (tmp_path / "peft" / "README.md").stat().st_mtime_ns
    again = ["export", str(run / "retriever"), "--out", str(tmp_path / "peft"), "--format", "peft"]
    assert main(again) == 2 and "not empty" in (said := capsys.readouterr().err) and "--overwrite" in said
    assert (tmp_path / "peft" / "README.md").stat().st_mtime_ns == before
    assert main([*again, "--overwrite"]) == 0 and (tmp_path / "peft" / "README.md").stat().st_mtime_ns > before and (tmp_path / "peft" / "notes.txt").exists()
    capsys.readouterr()
    assert main(["export", str(toy), "--out", str(tmp_path / "x"), "--format", "peft"]) == 2 and "no adapter" in capsys.readouterr().err
    (run / "report.json").write_text("[1")
    assert main(["export", str(run / "retriever"), "--out", str(tmp_path / "x")]) == 2 and "report.json" in capsys.readouterr().err


# ---- mteb

@pytest.fixture
def toy_task():
    "A retrieval task for mteb, built here: corpus with and without titles, graded judgements."
    mteb = pytest.importorskip("mteb", reason="needs mteb: pip install -e '.[mteb]'")
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    words = ["warm", "cat", "mat", "dog", "list", "append", "tuple", "river"]
    corpus = {f"d{i}": {"title": words[i % 8] if i % 2 else "", "text": " ".join(words[(i * k) % 8] for k in range(1, 6)) + f" {i}"} for i in range(30)}
    queries = {f"q{i}": f"{words[i]} {words[(i * 3) % 8]}" for i in range(8)}
    qrels = {q: {f"d{(3 * i + 7 * j) % 30}": 1 + j % 2 for j in range(4)} for i, q in enumerate(queries)}
    class Toy(AbsTaskRetrieval):
        metadata = TaskMetadata(name="RevelaToy", dataset={"path": "local/toy", "revision": "1"}, description="toy", reference=None, type="Retrieval", category="t2t", eval_splits=["test"],
            eval_langs=["eng-Latn"], main_score="ndcg_at_10", modalities=["text"], date=None, domains=None, task_subtypes=None, license=None, annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation=None)
        def load_data(self, **named):
            rows = lambda texts: Dataset.from_list([{"id": i} | (x if isinstance(x, dict) else {"text": x}) for i, x in texts.items()])
            self.dataset = {"default": {"test": {"corpus": rows(corpus), "queries": rows(queries), "relevant_docs": qrels, "top_ranked": None}}}
            self.data_loaded = True
    return mteb, Toy, corpus, queries, qrels


@pytest.mark.filterwarnings("ignore")
def test_mteb_gives_our_figures(toy_task, toy, tmp_path):
    "The exported folder in mteb.evaluate, and by its registered name as `mteb run` loads it: prompts applied, nDCG@10 equal to ours."
    from revela_nb.evaluation import evaluate
    from revela_nb.export import register_mteb
    mteb, Toy, corpus, queries, qrels = toy_task
    ours = trained(toy, pooling="mean", lora=2, query_prefix="query: ", passage_prefix="passage: ")
    ours.export_sentence_transformer(tmp_path / "out")
    expected = evaluate(ours, corpus, queries, qrels)["ndcg@10"]
    assert evaluate(Retriever.from_pretrained(toy, pooling="eos"), corpus, queries, qrels)["ndcg@10"] != pytest.approx(expected, abs=1e-3), "the task tells no models apart"
    revision = register_mteb(tmp_path / "out", "me/tiny")
    model = mteb.get_model("me/tiny", device="cpu")
    assert model.model_prompts == {"query": "query: ", "document": "passage: "} and model.mteb_model_meta.revision == revision
    found = mteb.evaluate(model, Toy(), cache=None, encode_kwargs={"batch_size": 8}, show_progress_bar=False)
    assert found[0].scores["test"][0]["ndcg_at_10"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_mteb_run_command(toy_task, toy, tmp_path, monkeypatch):
    "The command `mteb run` itself, by the registered name, on a task known to it: the figure in its results file is ours."
    from mteb.cli import main
    from mteb.get_tasks import _TASKS_REGISTRY
    from revela_nb.evaluation import evaluate
    from revela_nb.export import register_mteb
    _, Toy, corpus, queries, qrels = toy_task
    monkeypatch.setitem(_TASKS_REGISTRY, "RevelaToy", Toy)
    ours = trained(toy, pooling="mean", lora=2, query_prefix="query: ", passage_prefix="passage: ")
    ours.export_sentence_transformer(tmp_path / "out")
    register_mteb(tmp_path / "out", "me/tiny")
    monkeypatch.setattr("sys.argv", ["mteb", "run", "-m", "me/tiny", "-t", "RevelaToy", "--output-folder", str(tmp_path / "results"), "--batch-size", "8", "-v", "0"])
    main()
    found, = (tmp_path / "results").rglob("RevelaToy.json")
    assert json.loads(found.read_text())["scores"]["test"][0]["ndcg_at_10"] == pytest.approx(evaluate(ours, corpus, queries, qrels)["ndcg@10"], abs=1e-5)
