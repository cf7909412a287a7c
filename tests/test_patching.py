"""The in-batch stream in real architectures: invariances, LoRA, checkpointing, refusals, and the model left as it was found."""
import copy
from functools import partial

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from revela_nb import attention, patching
from revela_nb.attention import in_batch_weights
from revela_nb.bench import attention_by, authors_attention
from revela_nb.loss import reported_loss, trained_loss
from revela_nb.patching import compile_layers, in_batch_forward
from conftest import read_by_triton
from test_attention import Written

SMALL = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)), "smollm": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL)), "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SMALL)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SMALL, sliding_window=4)), "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SMALL, sliding_window=4)),
}


ONE = {**SMALL, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
NARROW = {**MODELS, "narrow": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**ONE)), "sliding": lambda: tf.MistralForCausalLM(tf.MistralConfig(**ONE, sliding_window=4))}
WAYS = [*((name, path) for path in ("matmul", "sdpa") for name in MODELS), ("narrow", "triton"), ("sliding", "streams")]           # Triton's interpreter is slow
on_every_path = pytest.mark.parametrize("lm, path", WAYS, indirect=True)


@pytest.fixture(params=MODELS)
def lm(request):
    torch.manual_seed(0)
    return NARROW[request.param]().train()


def rows(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 50, (n,), generator=g) for n in lengths]


def pad(rows, total, left=False, fill=0):
    ids, mask = torch.full((len(rows), total), fill), torch.zeros(len(rows), total, dtype=torch.long)
    for i, r in enumerate(rows):
        s = slice(total - len(r), total) if left else slice(0, len(r))
        ids[i, s], mask[i, s] = r, 1
    return ids, mask


def weights(n=3, seed=3, **kwargs): return in_batch_weights(torch.rand(n, n, generator=torch.Generator().manual_seed(seed)), 0.2, **kwargs)


def gradients(model, ids, mask, w, **kwargs):
    model.zero_grad()
    w = w.clone().requires_grad_()
    out = in_batch_forward(model, ids, mask, w, **kwargs)
    out.loss.backward()
    return out.loss.detach(), torch.cat([w.grad.flatten()] + [p.grad.flatten() for p in model.parameters() if p.grad is not None])


@on_every_path
def test_padding_changes_nothing(lm, path):
    texts = rows([6, 3, 5])
    loss, grad = gradients(lm, *pad(texts, 6), weights())
    for total, left, fill in ((9, False, 7), (6, True, 0), (11, True, 9)):
        loss2, grad2 = gradients(lm, *pad(texts, total, left, fill), weights())
        torch.testing.assert_close(loss2, loss, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grad2, grad, atol=2e-5, rtol=1e-4)


@on_every_path
def test_order_permutes_and_groups_do_not_mix(lm, path):
    ids, mask = pad(rows([6, 3, 5]), 6)
    w, order = weights(), torch.tensor([2, 0, 1])
    out = in_batch_forward(lm, ids, mask, w, return_logits=True)
    permuted = in_batch_forward(lm, ids[order], mask[order], w[order][:, order], return_logits=True)
    real = mask.bool()
    torch.testing.assert_close(permuted.logits[mask[order].bool()], out.logits[order][real[order]], atol=1e-5, rtol=1e-4)
    ids2, mask2 = pad(rows([4, 6, 2], seed=1), 6)
    both = in_batch_forward(lm, torch.cat([ids, ids2]), torch.cat([mask, mask2]), torch.block_diag(w, weights(seed=4)), return_logits=True)
    alone = in_batch_forward(lm, ids2, mask2, weights(seed=4), return_logits=True)
    torch.testing.assert_close(both.logits[:3][real], out.logits[real], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both.logits[3:][mask2.bool()], alone.logits[mask2.bool()], atol=1e-5, rtol=1e-4)


@on_every_path
def test_zero_weights_are_the_unpatched_model(lm, path):
    ids, mask = pad(rows([6, 3, 5]), 6)
    labels = ids.masked_fill(mask == 0, -100)
    loss, grad = gradients(lm, ids, mask, torch.zeros(3, 3), labels=labels)
    lm.zero_grad()
    own = lm(input_ids=ids, attention_mask=mask, labels=labels).loss
    own.backward()
    torch.testing.assert_close(loss, own.detach(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(grad[9:], torch.cat([p.grad.flatten() for p in lm.parameters()]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_left_as_found(lm, implementation):
    lm.set_attn_implementation(implementation)
    ids, mask = pad(rows([6, 3, 5]), 6)
    with torch.no_grad(): before = lm(input_ids=ids, attention_mask=mask).logits
    in_batch_forward(lm, ids, mask, weights()).loss.backward()
    with pytest.raises(ValueError): in_batch_forward(lm, ids, mask, weights(), value_norm="nonsense")
    with torch.no_grad(): assert torch.equal(lm(input_ids=ids, attention_mask=mask).logits, before)
    assert lm.config._attn_implementation == implementation and not lm.get_output_embeddings()._forward_pre_hooks


@pytest.mark.filterwarnings("ignore::FutureWarning")
@on_every_path
def test_gradient_checkpointing_and_lora(lm, path):
    ids, mask = pad(rows([6, 3, 5]), 6)
    lora = get_peft_model(copy.deepcopy(lm), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False))
    for model in (lm, lora):
        loss, grad = gradients(model, ids, mask, weights())
        base = model.get_base_model() if model is lora else model
        base.gradient_checkpointing_enable({"use_reentrant": False})
        if model is lora: model.enable_input_require_grads()
        loss2, grad2 = gradients(model, ids, mask, weights())
        torch.testing.assert_close((loss2, grad2), (loss, grad), atol=1e-6, rtol=1e-5)
        assert grad[:9].abs().max() > 0
        base.gradient_checkpointing_disable()


def test_eval_mode_single_chunk_and_empty_rows():
    torch.manual_seed(0)
    lm = MODELS["llama"]().eval()
    ids, mask = pad(rows([6]), 6)
    out = in_batch_forward(lm, ids, mask, in_batch_weights(torch.ones(1, 1), 0.2))
    assert out.loss.isfinite() and torch.allclose(out.loss, out.plain_loss)
    ids, mask = pad(rows([6, 1, 4]), 6)
    mask[1] = 0  # a chunk without any token
    loss, grad = gradients(lm, ids, mask, weights())
    assert loss.isfinite() and grad.isfinite().all()
    nothing = in_batch_forward(lm, ids, torch.zeros_like(mask), weights())
    assert nothing.loss.item() == 0


def test_labels_choose_where_the_loss_is():
    torch.manual_seed(0)
    lm = MODELS["llama"]().eval()
    ids, mask = pad(rows([6, 3, 5]), 6)
    labels = torch.full_like(ids, -100)
    labels[0, 4] = ids[0, 4]
    out = in_batch_forward(lm, ids, mask, weights(), labels=labels, return_logits=True)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits[0, 3][None], ids[0, 4][None]))


def test_refusals_say_why():
    ids, mask = pad(rows([6, 3, 5]), 6)
    bloom = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(TypeError, match="Bloom.*cannot be patched"): in_batch_forward(bloom, ids, mask, weights())
    gemma2 = tf.Gemma2ForCausalLM(tf.Gemma2Config(**SMALL))
    with pytest.raises(ValueError, match="softcap"): in_batch_forward(gemma2, ids, mask, weights())
    assert gemma2.config._attn_implementation != "revela_in_batch"
    lm = MODELS["llama"]()
    with pytest.raises(ValueError, match="weights must be"): in_batch_forward(lm, ids, mask, weights(4))
    with pytest.raises(ValueError, match="attention_mask has shape"): in_batch_forward(lm, ids, mask[:, :3], weights())


def test_trains_under_bf16_autocast(lm):
    "Autocast hands over bf16 values beside float32 queries; loss and gradients stay within bf16's rounding of float32's."
    ids, mask = pad(rows([6, 3, 5]), 6)
    loss, grad = gradients(lm, ids, mask, weights())
    with torch.autocast("cpu", torch.bfloat16): loss2, grad2 = gradients(lm, ids, mask, weights())
    assert abs(loss2 - loss) < 0.02
    assert torch.nn.functional.cosine_similarity(grad2, grad, dim=0) > 0.999
    assert 0.98 < grad2.norm() / grad.norm() < 1.02


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("lora", [False, True])
def test_bf16_weights_learn_what_float32_learns(lm, lora):
    "However the chunks lie in the batch; checkpointing changes no bit. Both models have the same, rounded, weights."
    if lora: lm = get_peft_model(lm, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, lora_alpha=1))
    rounded = lm.bfloat16()
    exact, order = copy.deepcopy(rounded).float(), torch.tensor([2, 0, 1, 5, 4, 3])
    texts, w = [rows([6, 3, 5, 4, 6, 2], seed=n) for n in range(4)], [weights(6, seed=n) for n in range(3)]
    (ids, mask), groups = pad(texts[2], 6), torch.block_diag(weights(seed=3), weights(seed=4))
    settings = [(*pad(texts[0], 6), w[0]), (*pad(texts[1], 9, True, 7), w[1]), (ids[order], mask[order], w[2][order][:, order]), (*pad(texts[3], 6), groups)]
    bf16, fp32 = ([gradients(model, *given) for given in settings] for model in (rounded, exact))
    assert {p.grad.dtype for p in rounded.parameters() if p.grad is not None} == {torch.bfloat16}
    for (loss, _), (loss32, _) in zip(bf16, fp32): assert abs(loss / loss32 - 1) < 0.003                      # measured: 0.0021
    for part in (slice(36), slice(36, None)):                                                                # of the in-batch weights, of the parameters
        a, b = (torch.cat([grad[part] for _, grad in found]) for found in (bf16, fp32))
        assert (a - b).norm() < (0.02 if "gemma3" in rounded.config.model_type else 0.015) * b.norm()         # measured over 5 seeds: 0.0179, 0.0113
    (rounded.get_base_model() if lora else rounded).gradient_checkpointing_enable({"use_reentrant": False})
    if lora: rounded.enable_input_require_grads()
    torch.testing.assert_close(gradients(rounded, *settings[-1]), bf16[-1], atol=0, rtol=0)


def test_a_head_that_scales_its_logits_is_run_in_whole():
    "Granite divides its logits: the loss head's shortcut must notice, and the loss must be that of the model's own logits."
    torch.manual_seed(0)
    granite = tf.GraniteForCausalLM(tf.GraniteConfig(**SMALL, logits_scaling=4.0))
    ids, mask = pad(rows([6, 3, 5]), 6)
    quick, whole = (in_batch_forward(granite, ids, mask, weights(), return_logits=r) for r in (False, True))
    torch.testing.assert_close((quick.loss, quick.plain_loss), (whole.loss, whole.plain_loss))
    granite.config.logits_scaling = 1.0
    assert abs(in_batch_forward(granite, ids, mask, weights()).loss - quick.loss) > 1e-4


@pytest.mark.parametrize("path, value_norm", [*((p, norm) for p in ("matmul", "sdpa", "streams") for norm in ("unit", "rescaled", "none")), ("triton", "unit")], indirect=["path"])
def test_groups_in_one_batch_learn_what_they_learn_one_by_one(path, value_norm):
    "Loss and every gradient, of different chunks at different volumes: `rescaled` takes its mean over each group."
    torch.manual_seed(0)
    model = NARROW["narrow" if path in ("triton", "streams") else "qwen3"]().train()
    texts = [rows([6, 6, 6], seed=0), [r % 9 + 5 for r in rows([6, 6, 6], seed=1)]]
    with torch.no_grad(): model.model.embed_tokens.weight[14:] *= 3                                                  # tokens that only the first group has
    pairs = [weights(seed=3), weights(seed=4)]
    together, grad = gradients(model, *pad(texts[0] + texts[1], 6), torch.block_diag(*pairs), value_norm=value_norm, group_size=3)
    (loss0, grad0), (loss1, grad1) = (gradients(model, *pad(t, 6), w, value_norm=value_norm, group_size=g) for t, w, g in zip(texts, pairs, (3, None)))
    if value_norm == "rescaled": assert abs(gradients(model, *pad(texts[0] + texts[1], 6), torch.block_diag(*pairs), value_norm=value_norm)[0] - together) > 1e-5     # as one group
    torch.testing.assert_close(together, (loss0 + loss1) / 2, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad[36:], (grad0[9:] + grad1[9:]) / 2, atol=2e-5, rtol=1e-4)
    block = grad[:36].view(6, 6)
    others = ~torch.eye(3, dtype=torch.bool)                                                                        # a weight of zero is a pair left out
    for part, alone in ((block[:3, :3], grad0), (block[3:, 3:], grad1)): torch.testing.assert_close(part[others], alone[:9].view(3, 3)[others] / 2, atol=2e-6, rtol=1e-4)
    assert block[:3, 3:].abs().max() == 0 and block[3:, :3].abs().max() == 0


def test_min_weight_reaches_every_layer(monkeypatch):
    "As an option of `Revela`, through checkpointing too; an option out of range is an error."
    from revela_nb.model import Revela
    from test_trainer import VOCAB, make_model
    toy = make_model()
    model = Revela(toy.retriever, toy.lm, temperature=1.0, min_weight=0.3)
    seen = []
    read = patching.read_chunks
    monkeypatch.setattr(patching, "read_chunks", lambda *a: seen.append(a[7]) or read(*a))
    ids, mask = pad(rows([6, 3, 5, 4]), 6)
    batch = {f"{role}{name}": x for role in ("query_", "passage_", "") for name, x in (("input_ids", ids % len(VOCAB)), ("attention_mask", mask))}
    model(**batch).loss.backward()
    assert seen == [0.3] * model.lm.config.num_hidden_layers
    model.activation_checkpointing_enable()
    model(**batch).loss.backward()
    assert seen == [0.3] * model.lm.config.num_hidden_layers * 3                                                              # forward, and again in backward
    with pytest.raises(ValueError, match="min_weight must be in"): Revela(model.retriever, model.lm, min_weight=-0.1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_learn_the_same(monkeypatch, checkpointing):
    "Forward and backward of every layer are traced by Dynamo and AOTAutograd, around our attention, which is run as it is; only the code generator is left out."
    graphs = []
    def backend(graph, inputs): return graphs.append(graph) or torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.manual_seed(0)
    lm = NARROW["narrow"]().train()
    ids, mask = pad(rows([6, 3, 5]), 6)
    if checkpointing: lm.gradient_checkpointing_enable({"use_reentrant": False})
    loss, grad = gradients(lm, ids, mask, weights())
    plain = lm(ids, attention_mask=mask).logits
    assert compile_layers(lm) == lm.config.num_hidden_layers and compile_layers(MODELS["llama"]()) == 2 and not graphs
    try:
        torch.testing.assert_close(gradients(lm, ids, mask, weights()), (loss, grad), atol=1e-6, rtol=1e-5)
        found = len(graphs)
        gradients(lm, ids, mask, weights())
        assert len(graphs) == found > 1                                                                      # around our attention; a second step adds none
        torch.testing.assert_close(lm(ids, attention_mask=mask).logits, plain, atol=1e-6, rtol=1e-5)
    finally: torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_the_kernels_a_compiled_layer_is_one_graph(monkeypatch, checkpointing):
    "The kernels are an operation the compiler knows: it does not stop at our attention, nor begin anew when there are other pairs or chunks."
    pytest.importorskip("triton", reason="needs triton: pip install triton (Linux)")
    if torch.cuda.is_available(): pytest.skip("everything is on the CPU here")
    graphs, Reading = [], patching.Reading
    def backend(graph, inputs): return graphs.append(graph) or torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
    def listed(weights, key_mask, *given, **options):
        return Reading(weights, key_mask, *given, pairs=patching.double_pairs(patching.list_pairs(weights, key_mask)), **options)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(patching, "Reading", listed)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    lm = tf.LlamaForCausalLM(tf.LlamaConfig(**{**SMALL, **small})).train()
    if checkpointing: lm.activation_checkpointing_enable({"use_reentrant": False})
    ids, mask = pad(rows([6, 3, 5]), 6)
    batches = [(ids, mask, w) for w in (weights(), weights() * torch.tensor([[0, 1, 1], [1, 0, 0], [1, 0, 0]]))]
    batches += [(*pad(rows([9, 3, 5, 7][:n] + [4] * (n - 4)), 9), weights(n)) for n in (4, 5, 2)]
    stock = [gradients(lm, *batch) for batch in batches]
    monkeypatch.setattr(patching, "runs_triton", lambda query: True)
    try:
        compile_layers(lm)
        found = []
        for batch, expected in zip([*batches, batches[0]], [*stock, stock[0]]):
            torch.testing.assert_close(gradients(lm, *batch), expected, atol=1e-5, rtol=1e-4)
            found.append(len(graphs))
        assert found[0] == 1 and found[-1] == found[2] <= 3, found                                           # other numbers of pairs; of rows and tokens; and no more
    finally: torch._dynamo.reset()


@pytest.mark.parametrize("path", ["matmul", "streams"], indirect=True)
def test_a_layer_that_was_not_reached_is_missed(path, monkeypatch):
    "By the kernels of GPUs, and where they read neighbours alone: nothing is counted twice."
    torch.manual_seed(0)
    lm = tf.LlamaForCausalLM(tf.LlamaConfig(**{**SMALL, "attention_dropout": 0.1})).train()
    class Passes(torch.nn.Module):
        def forward(self, hidden_states, **kwargs): return hidden_states, None
    lm.model.layers[1].self_attn = Passes()
    ids, mask = pad(rows([6, 3, 5]), 6)
    if path == "streams":
        monkeypatch.setattr(patching, "read_chunks", read_by_triton)                                              # with dropout the kernels read neighbours alone
        with pytest.raises(TypeError, match="only 1 of 2 layers"): in_batch_forward(lm, ids, mask, weights())
    for layer in lm.model.layers[:1]: layer.self_attn.attention_dropout = 0.0
    with pytest.raises(TypeError, match="only 1 of 2 layers"): in_batch_forward(lm, ids, mask, weights())


def test_values_of_another_size_are_refused():
    from revela_nb.patching import Reading, in_batch_attention
    q, v = torch.randn(2, 1, 3, 8), torch.randn(2, 1, 3, 4)
    with pytest.raises(ValueError, match="values of another size"):
        in_batch_attention(torch.nn.Identity(), q, q, v, None, revela_reading=Reading(torch.zeros(1, 1), torch.ones(1, 3, dtype=torch.bool), "unit"))


@pytest.mark.parametrize("loss_of", [trained_loss, reported_loss])
def test_loss_in_bfloat16_is_added_up_in_float32(loss_of):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6000, 16, generator=g).bfloat16(), torch.randn(200, 16, generator=g).bfloat16()
    targets = torch.randint(0, 200, (6000,), generator=g)
    exact = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, targets)
    loss = loss_of(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert loss.dtype == torch.float32 and abs(loss.item() - exact.item()) < 2e-3 * exact.item()


def test_labels_of_32_bits():
    lm = NARROW["narrow"]()
    ids, mask = pad(rows([6, 3, 5]), 6)
    short, long = (in_batch_forward(lm, ids.to(t), mask, weights()).loss for t in (torch.int32, torch.int64))
    assert short == long


def step(lm, chunks, group_size, length=24):
    "One forward of chunks without padding."
    g = torch.Generator().manual_seed(0)
    ids, w = torch.randint(5, 50, (chunks, length), generator=g), in_batch_weights(torch.rand(chunks, chunks, generator=g), 1.0, group_size)
    return in_batch_forward(lm, ids, torch.ones_like(ids), w.requires_grad_()).loss


def bytes_kept(lm, chunks, group_size):
    "What a forward keeps for its backward, each storage once; without the model's weights, and without the (N, N) weights and who reads whom."
    kept, parameters = {}, {p.data_ptr() for p in lm.parameters()}
    def pack(x):
        if x.data_ptr() not in parameters and x.shape != (chunks, chunks): kept[x.untyped_storage().data_ptr()] = x     # held, so that no address comes twice
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): step(lm, chunks, group_size)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def test_memory_grows_with_chunks_and_not_with_pairs(path):
    torch.manual_seed(0)
    lm = NARROW["narrow"]().train()
    kept = {given: bytes_kept(lm, *given) for given in ((4, 2), (8, 2), (12, 2), (8, 4), (8, 8))}
    assert kept[12, 2] - kept[8, 2] == kept[8, 2] - kept[4, 2] > 0
    a_pair = {"matmul": 0, "sdpa": 16, "triton": 28 + 4 * 2 * 24, "streams": 36 + 4 * 2 * 24}[path]                                         # reader and read; and their order, weight and row in the doubled batch, and a number for each of 2 heads and 24 tokens
    assert kept[8, 8] - kept[8, 4] == a_pair * 8 * (7 - 3) and kept[8, 4] - kept[8, 2] == a_pair * 8 * (3 - 1)
    with attention_by(authors_attention): assert bytes_kept(lm, 8, 4) - kept[8, 4] > 4 * 8 * 8 * 2 * 24 * 24       # what is counted would show (N, N, H, L, L)


@pytest.mark.parametrize("path", ["matmul", "sdpa"], indirect=True)
def test_no_tensor_is_larger_than_the_mlps(path, monkeypatch):
    "Forward and backward, all pairs: 2N rows of 24 tokens and 48 numbers, where (N, N, H, L, L) would have eight times as many."
    torch.manual_seed(0)
    lm = NARROW["narrow"]().train()
    monkeypatch.setattr(attention, "PAIRS", 32)
    with Written() as ours: step(lm, 16, 16).backward()
    with attention_by(authors_attention), Written() as einsum: step(lm, 16, 16).backward()
    assert ours.largest == 2 * 16 * 24 * 48 and einsum.largest == 16 * 16 * 2 * 24 * 24 == 8 * ours.largest


def test_another_groups_values_do_not_change_my_volume():
    "Three times longer values in the second group: the first group's output stays to the last bit, through `Revela`, too, unless all chunks are one group."
    torch.manual_seed(0)
    values, mask = torch.randn(6, 2, 5, 8), torch.rand(6, 5) < 0.8
    louder = torch.cat([values[:3], 3 * values[3:]])
    one, other = (attention.value_scale(v, mask, "rescaled", 3) for v in (values, louder))
    assert one.shape == (6, 1, 1, 1) and torch.equal(one[:3], other[:3]) and torch.allclose(3 * one[3:], other[3:])
    for part, m, alone in zip(one.split(3), mask.split(3), values.split(3)): torch.testing.assert_close(part, attention.value_scale(alone, m, "rescaled").expand(3, 1, 1, 1))
    assert torch.equal(attention.value_scale(values, mask, "rescaled", 6), attention.value_scale(values, mask, "rescaled"))
    from test_trainer import COLLATOR, GROUPS, make_model
    model, batch = make_model(), COLLATOR([GROUPS[0], {"texts": ["Python lists grow", "A list", "Dogs bark", "Append", "A tuple", "order"]}])
    model.value_norm, share = "rescaled", [(batch["attention_mask"][i:i + 6].sum(1) - 1).sum() for i in (0, 6)]
    alone = [model(**COLLATOR([g])).loss for g in (GROUPS[0], {"texts": ["Python lists grow", "A list", "Dogs bark", "Append", "A tuple", "order"]})]
    torch.testing.assert_close(model(**batch).loss, sum(n * x for n, x in zip(share, alone)) / sum(share), atol=1e-6, rtol=0)
    model.gather_chunks = True
    assert abs(model(**batch).loss - sum(n * x for n, x in zip(share, alone)) / sum(share)) > 1e-6


def counting_runs(model):
    runs = []
    (model.get_base_model() if hasattr(model, "get_base_model") else model).model.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


def test_a_nan_does_not_run_the_model_again():
    "NaN is not equal to itself: compared by value, logits of NaN would look as if the model had changed them, and whole logits may not fit."
    torch.manual_seed(0)
    lm = MODELS["smollm"]()
    lm.model.norm.weight.data[0] = torch.nan
    runs = counting_runs(lm)
    out = in_batch_forward(lm, *pad(rows([6, 3, 5]), 6), weights())
    assert len(runs) == 1 and out.loss.isnan() and out.plain_loss.isnan()
    lm.model.norm.weight.data[0] = 1
    assert in_batch_forward(lm, *pad(rows([6, 3, 5]), 6), weights()).loss.isfinite() and len(runs) == 2


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("kind, expected", [("granite", [2, 1, 1]), ("lora", [1, 1, 1]), ("bias", [1, 1, 1]), ("smollm", [1, 1, 1])])
def test_a_head_that_is_more_than_a_matrix_runs_once_a_step(kind, expected, plain):
    "Only logits that the model changes are found out by a trial, once; losses and gradients are those of whole logits at every step."
    torch.manual_seed(0)
    model = tf.GraniteForCausalLM(tf.GraniteConfig(**SMALL, logits_scaling=4.0)) if kind == "granite" else MODELS["smollm" if kind == "smollm" else "qwen2"]()
    if kind == "bias": model.lm_head = torch.nn.Linear(32, 50)
    if kind == "lora": model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    ids, mask = pad(rows([6, 3, 5]), 6)
    runs, counts, whole = counting_runs(model), [], gradients(copy.deepcopy(model), ids, mask, weights(), return_logits=True)
    for _ in range(3):
        before = len(runs)
        torch.testing.assert_close(gradients(model, ids, mask, weights(), plain=plain), whole, atol=1e-6, rtol=1e-5)
        counts.append(len(runs) - before)
    assert counts == expected
    plain_losses = [in_batch_forward(model, ids, mask, weights(), return_logits=r).plain_loss for r in (False, True)]
    torch.testing.assert_close(*plain_losses)
    assert in_batch_forward(model, ids, mask, weights(), plain=False).plain_loss is None


def test_an_adapter_put_on_the_head_later_is_seen():
    torch.manual_seed(0)
    lm = MODELS["llama"]()
    ids, mask = pad(rows([6, 3, 5]), 6)
    before = in_batch_forward(lm, ids, mask, weights()).loss
    lora = get_peft_model(lm, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    after, whole = (in_batch_forward(lora, ids, mask, weights(), return_logits=r).loss for r in (False, True))
    torch.testing.assert_close(after, whole)
    assert abs(after - before) > 1e-3


def test_rows_that_are_not_wanted_do_not_reach_the_head():
    "Where the head runs in whole, it reads one stream if nobody asks for the other's loss."
    torch.manual_seed(0)
    granite = tf.GraniteForCausalLM(tf.GraniteConfig(**SMALL, logits_scaling=4.0))
    ids, mask = pad(rows([6, 3, 5]), 6)
    in_batch_forward(granite, ids, mask, weights())
    read = []
    granite.lm_head.register_forward_hook(lambda head, args, out: read.append(out.shape[1]))
    for plain in (True, False): in_batch_forward(granite, ids, mask, weights(), plain=plain)
    assert read == [22, 11]                                                                                                    # 5 + 2 + 4 predicted tokens a stream


@pytest.mark.parametrize("kind, sizes", [("smollm", [1]), ("granite", [1, 22, 22])])
def test_a_spanning_group_holds_no_logits_either(kind, sizes):
    "In a world of one process: the head reads one token, the losses and gradients are those of `in_batch_forward`; where the model changes its logits, it reads all after the trial."
    import torch.distributed as dist
    from revela_nb.model import spanning_forward
    torch.manual_seed(0)
    lm = tf.GraniteForCausalLM(tf.GraniteConfig(**SMALL, logits_scaling=4.0)) if kind == "granite" else MODELS[kind]()
    (ids, mask), read = pad(rows([6, 3, 5]), 6), []
    labels = ids.masked_fill(mask == 0, -100)
    expected, grad = gradients(copy.deepcopy(lm), ids, mask, weights())
    without = in_batch_forward(copy.deepcopy(lm), ids, mask, weights()).plain_loss
    lm.lm_head.register_forward_hook(lambda head, args, out: read.append(out.shape[1]))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        w = weights().requires_grad_()
        out = spanning_forward(lm, ids, mask, w, labels)
        out.loss.backward()
        if kind == "granite": spanning_forward(lm, ids, mask, weights(), labels)
    finally: dist.destroy_process_group()
    assert read == sizes
    torch.testing.assert_close((out.loss.detach(), out.plain_loss), (expected, without))
    torch.testing.assert_close(torch.cat([w.grad.flatten()] + [p.grad.flatten() for p in lm.parameters()]), grad, atol=1e-6, rtol=1e-5)
