"""Retriever: pooling, padding, the tokenisation contract, loading and saving."""
import json, os, shutil, signal, subprocess, sys, textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen3Config, T5Config, T5Model)

from revela_nb.loading import LORA_TARGETS
from revela_nb.retriever import Retriever, evaluating, length_batches, pad_rows, pool_hidden, tokenize_texts

TEXTS = ["The cat sat on the warm mat. It purred.", "A cat purrs.", "", "Dogs bark at cats that sit on mats. " * 5, "x = get_userName()"]
SMALL = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
CONFIGS = {"llama": LlamaConfig(**SMALL), "mistral": MistralConfig(**SMALL), "qwen2": Qwen2Config(**SMALL), "qwen3": Qwen3Config(**SMALL),
           "gemma2": Gemma2Config(**SMALL), "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=256)}


def make_tokenizer(**special):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>", "<pad>"], show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def make_backbone(folder, config=CONFIGS["llama"], **special):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer(**(special or {"eos_token": "<eos>"})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory): return make_backbone(tmp_path_factory.mktemp("toy"))


def padded(rows, side="right", extra=0, fill=None):
    length = max(map(len, rows)) + extra
    input_ids = torch.zeros(len(rows), length, dtype=torch.long) if fill is None else torch.randint(0, 256, (len(rows), length), generator=torch.Generator().manual_seed(fill))
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        input_ids[i, place], mask[i, place] = torch.tensor(row), 1
    return input_ids, mask


@pytest.mark.parametrize("pooling", ["eos", "mean"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_padding_changes_nothing(tmp_path, name, pooling):
    retriever = Retriever.from_pretrained(make_backbone(tmp_path, CONFIGS[name]), pooling=pooling).eval()
    rows = tokenize_texts(retriever.tokenizer, TEXTS, "passage: ")
    with torch.no_grad():
        alone = torch.cat([retriever(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)) for row in rows])
        for side, extra, fill in [("right", 0, None), ("left", 0, None), ("right", 5, 1), ("left", 5, 2)]:
            torch.testing.assert_close(retriever(*padded(rows, side, extra, fill)), alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(alone.norm(dim=-1), torch.ones(len(rows)))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**20))
@settings(max_examples=40, deadline=None)
def test_pooling_against_a_loop(lengths, left, right, seed):
    total = max(lengths) + left + right
    hidden = torch.randn(len(lengths), total, 3, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(len(lengths), total, dtype=torch.long)
    for i, n in enumerate(lengths): mask[i, left:left + n] = 1
    hidden[mask == 0] = float("nan") # what a model leaves at padding must not leak
    torch.testing.assert_close(pool_hidden(hidden, mask), torch.stack([h[left + n - 1] for h, n in zip(hidden, lengths)]))
    torch.testing.assert_close(pool_hidden(hidden, mask, "mean"), torch.stack([h[left:left + n].mean(0) for h, n in zip(hidden, lengths)]))


def test_row_of_padding_only(toy):
    retriever = Retriever.from_pretrained(toy)
    with pytest.raises(ValueError, match="Row 1 of the batch has no real token"):
        retriever(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 0, 0], [0, 0, 0]]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradient_reaches_every_weight(toy, side):
    retriever = Retriever.from_pretrained(toy).train()
    embeddings = retriever(*padded(tokenize_texts(retriever.tokenizer, TEXTS), side, 2))
    retriever.similarity(embeddings, embeddings)[0, 1:].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in retriever.parameters())


def test_bfloat16_weights_give_float32_embeddings(toy):
    retriever = Retriever.from_pretrained(toy, dtype=torch.bfloat16)
    embeddings = retriever(*padded(tokenize_texts(retriever.tokenizer, TEXTS)))
    assert next(retriever.parameters()).dtype == torch.bfloat16 and embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(len(TEXTS)))


def test_encode_order_batches_and_modes(toy):
    retriever = Retriever.from_pretrained(toy, lora=LoraConfig(r=4, lora_dropout=0.5, target_modules=LORA_TARGETS)).train()
    retriever.encoder.base_model.model.embed_tokens.eval()
    modes = [m.training for m in retriever.modules()]
    many = [t + f" {i % 7}" * (i % 11) for i, t in enumerate(TEXTS * 8)]
    reference = torch.cat([retriever.encode_passages([t], progress=False) for t in many])
    for batch_size in (1, 3, 64):
        torch.testing.assert_close(retriever.encode_passages(many, batch_size, progress=False), reference, atol=1e-5, rtol=0)
    assert [m.training for m in retriever.modules()] == modes
    assert reference.dtype == torch.float32 and not reference.is_inference() and not reference.requires_grad
    assert retriever.encode_queries([], progress=False).shape == (0, 32)
    assert retriever.encode_queries([""], progress=False).isfinite().all()


def test_modes_restored_after_an_error(toy):
    retriever = Retriever.from_pretrained(toy).train()
    with pytest.raises(RuntimeError), evaluating(retriever): raise RuntimeError
    assert all(m.training for m in retriever.modules())


def test_encode_bad_input(toy):
    retriever = Retriever.from_pretrained(toy)
    with pytest.raises(TypeError, match="Text 2 is int"): retriever.encode_queries(["a", "b", 3], progress=False)
    with pytest.raises(TypeError, match="single string"): retriever.encode_passages("a", progress=False)
    with pytest.raises(ValueError, match="batch_size must be at least 1"): retriever.encode_passages(["a"], batch_size=0, progress=False)
    with torch.no_grad(): retriever.encoder.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="2 of 2 embeddings are not finite"): retriever.encode_passages(["a", "b"], progress=False)


def test_length_batches_hold_every_text_once():
    lengths = [5, 1, 9, 5, 5, 2, 9]
    batches = length_batches(lengths, 3)
    assert batches == [[2, 6, 0], [3, 4, 5], [1]]


def test_contract(toy):
    retriever = Retriever.from_pretrained(toy, max_length=12)
    rows = tokenize_texts(retriever.tokenizer, TEXTS, "query: ", 12)
    eos = retriever.tokenizer.eos_token_id
    assert all(row[-1] == eos and len(row) <= 12 for row in rows) and len(rows[3]) == 12
    bare = retriever.tokenizer("query: " + TEXTS[3], add_special_tokens=False)["input_ids"]
    assert rows[3] == bare[:11] + [eos]
    assert tokenize_texts(retriever.tokenizer, [""], "") == [[eos]]


def test_contract_equals_the_collators(toy):
    batching = pytest.importorskip("revela_nb.batching")
    retriever = Retriever.from_pretrained(toy)
    texts = [t for t in TEXTS if t]
    batch = batching.GroupCollator(retriever.tokenizer, retriever.tokenizer, max_length=20, query_fraction=1.0)([{"texts": texts}])
    for kind, prefix in [("query", "query: "), ("passage", "passage: ")]:
        input_ids, mask = pad_rows(tokenize_texts(retriever.tokenizer, texts, prefix, 20), retriever.tokenizer.pad_token_id)
        assert torch.equal(batch[f"{kind}_input_ids"] * mask, input_ids * mask) and torch.equal(batch[f"{kind}_attention_mask"], mask)


def test_tokenizer_side_and_stored_truncation_do_not_matter(toy, tmp_path):
    folder = shutil.copytree(toy, tmp_path / "odd")
    tokenizer = make_tokenizer(eos_token="<eos>", pad_token="<pad>", padding_side="left", truncation_side="left")
    tokenizer.backend_tokenizer.enable_truncation(3); tokenizer.backend_tokenizer.enable_padding()
    tokenizer.save_pretrained(folder)
    ours, odd = Retriever.from_pretrained(toy, max_length=16), Retriever.from_pretrained(folder, max_length=16)
    assert odd.tokenizer.pad_token == "<pad>"
    assert torch.equal(odd.encode_passages(TEXTS, progress=False), ours.encode_passages(TEXTS, progress=False))


def test_tokenizer_without_eos(tmp_path):
    with pytest.raises(ValueError, match="no eos token"): Retriever.from_pretrained(make_backbone(tmp_path, pad_token="<pad>"))


def test_full_round_trip(toy, tmp_path):
    one = Retriever.from_pretrained(toy, pooling="mean", query_prefix="q: ", passage_prefix="", max_length=40)
    one.save_pretrained(tmp_path / "deep" / "saved")
    assert not list((tmp_path / "deep").glob(".*"))
    two = Retriever.from_pretrained(tmp_path / "deep" / "saved")
    assert (two.pooling, two.query_prefix, two.passage_prefix, two.max_length) == ("mean", "q: ", "", 40)
    assert torch.equal(one.encode_queries(TEXTS, progress=False), two.encode_queries(TEXTS, progress=False))
    assert Retriever.from_pretrained(tmp_path / "deep" / "saved", pooling="eos").pooling == "eos"


@pytest.mark.parametrize("relative", [False, True])
def test_lora_round_trip(toy, tmp_path, monkeypatch, relative):
    monkeypatch.chdir(toy.parent)
    one = Retriever.from_pretrained(toy.name if relative else toy, lora=4)
    config = one.encoder.peft_config["default"]
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (4, 8, set(LORA_TARGETS))
    assert all(("lora_" in name) == p.requires_grad for name, p in one.named_parameters())
    with torch.no_grad(): [p.normal_(std=0.1) for name, p in one.named_parameters() if "lora_B" in name]
    one.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    monkeypatch.chdir(tmp_path)
    two = Retriever.from_pretrained("adapter")
    assert torch.equal(one.encode_queries(TEXTS, progress=False), two.encode_queries(TEXTS, progress=False))
    assert {n for n, p in two.named_parameters() if p.requires_grad} == {n for n, p in one.named_parameters() if p.requires_grad}
    two.save_pretrained("again")
    assert torch.equal(one.encode_queries(TEXTS, progress=False), Retriever.from_pretrained("again").encode_queries(TEXTS, progress=False))


def test_adapter_of_the_authors_layout(toy, tmp_path):
    "Only the adapter's two files, no tokenizer and no settings: as the released checkpoints may come."
    Retriever.from_pretrained(toy, lora=4).save_pretrained(tmp_path / "a")
    for path in (tmp_path / "a").iterdir():
        if not path.name.startswith("adapter"): path.unlink()
    assert Retriever.from_pretrained(tmp_path / "a").encode_queries(["x"], progress=False).shape == (1, 32)


def test_bad_folders(toy, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder"): Retriever.from_pretrained(tmp_path / "missing")
    (tmp_path / "run/retriever").mkdir(parents=True)
    (tmp_path / "run/revela_run.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="'.*run' is not finished"): Retriever.from_pretrained(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="No model can be loaded"): Retriever.from_pretrained(tmp_path / "empty")
    corrupt = shutil.copytree(toy, tmp_path / "corrupt")
    os.truncate(corrupt / "model.safetensors", 3000)
    with pytest.raises(ValueError, match="No model can be loaded"): Retriever.from_pretrained(corrupt)
    pickled = shutil.copytree(toy, tmp_path / "pickled")
    torch.save({}, pickled / "pytorch_model.bin"); (pickled / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="No model can be loaded"): Retriever.from_pretrained(pickled)
    deeper = shutil.copytree(toy, tmp_path / "deeper")
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(ValueError, match="lack .* tensors"): Retriever.from_pretrained(deeper)
    t5 = tmp_path / "t5"
    T5Model(T5Config(vocab_size=300, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(t5)
    with pytest.raises(ValueError, match="encoder-decoder"): Retriever.from_pretrained(t5)
    settings = shutil.copytree(toy, tmp_path / "settings")
    (settings / "retriever_config.json").write_text("{half")
    with pytest.raises(ValueError, match="retriever_config.json"): Retriever.from_pretrained(settings)
    with pytest.raises(ValueError, match="'eos' or 'mean'"): Retriever.from_pretrained(toy, pooling="max")


def test_bad_adapters(toy, tmp_path):
    Retriever.from_pretrained(toy, lora=4).save_pretrained(tmp_path / "good")
    with pytest.raises(ValueError, match="already holds a LoRA adapter"): Retriever.from_pretrained(tmp_path / "good", lora=4)
    orphan = shutil.copytree(tmp_path / "good", tmp_path / "orphan")
    settings = json.loads((orphan / "retriever_config.json").read_text())
    (orphan / "retriever_config.json").write_text(json.dumps(settings | {"base_model": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match="needs its base model .*gone"): Retriever.from_pretrained(orphan)
    foreign = make_backbone(tmp_path / "foreign", LlamaConfig(**SMALL | {"num_hidden_layers": 3}))
    (orphan / "retriever_config.json").write_text(json.dumps(settings | {"base_model": str(foreign)}))
    with pytest.raises(ValueError, match="cannot be put on"): Retriever.from_pretrained(orphan) # a layer without adapter
    os.truncate(tmp_path / "good" / "adapter_model.safetensors", 100)
    with pytest.raises(ValueError, match="cannot be put on"): Retriever.from_pretrained(tmp_path / "good")
    (tmp_path / "good" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="no adapter_model.safetensors"): Retriever.from_pretrained(tmp_path / "good")


def test_failed_save_leaves_the_old_one(toy, tmp_path, monkeypatch):
    retriever = Retriever.from_pretrained(toy)
    def fail(*args, **kwargs): raise OSError("disk full")
    monkeypatch.setattr(type(retriever.tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"): retriever.save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    retriever.save_pretrained(tmp_path / "new")
    before = {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()}
    monkeypatch.setattr(type(retriever.tokenizer), "save_pretrained", fail)
    with torch.no_grad(): retriever.encoder.norm.weight.add_(1)
    with pytest.raises(OSError, match="disk full"): retriever.save_pretrained(tmp_path / "new")
    assert {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()} == before


def test_killed_save_leaves_no_half_folder(toy, tmp_path):
    code = textwrap.dedent(f"""
        import os, signal
        from revela_nb.retriever import Retriever
        retriever = Retriever.from_pretrained({str(toy)!r})
        retriever.tokenizer.save_pretrained = lambda folder: os.kill(os.getpid(), signal.SIGKILL) # the weights are written, the rest is not
        retriever.save_pretrained({str(tmp_path / "new")!r})""")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert not (tmp_path / "new").exists()
    Retriever.from_pretrained(toy).save_pretrained(tmp_path / "new") # and the next save clears up
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_saving_over_an_older_save(toy, tmp_path):
    Retriever.from_pretrained(toy).save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "report.json").write_text("{}")
    Retriever.from_pretrained(toy, lora=2).save_pretrained(tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "report.json" in names and "adapter_model.safetensors" in names and "model.safetensors" not in names
    Retriever.from_pretrained(toy).save_pretrained(tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "adapter_config.json" not in names and "model.safetensors" in names
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError): Retriever.from_pretrained(toy).save_pretrained(tmp_path / "file")


def test_loading_is_quiet(toy, capfd, recwarn):
    Retriever.from_pretrained(toy, lora=2).encode_queries(["a"], progress=False)
    assert "LOAD REPORT" not in "".join(capfd.readouterr()) and not [w for w in recwarn if issubclass(w.category, FutureWarning)]
