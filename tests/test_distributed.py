"""Several gloo processes on the CPU against one: groups that span devices, groups of each device's own, FSDP2."""
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

import test_trainer as toy
from revela_nb.model import GatherRows, Revela, pad_to_ranks
from revela_nb.retriever import Retriever
from revela_nb.trainer import predicted_tokens

ROWS = [toy.CHUNKS[:3], [c.split(".")[0] for c in toy.CHUNKS[3:]], ["cat", "cat mat warm", "warm list"], [toy.CHUNKS[0], "list", "append order one item"]]


def in_process(rank, world, port, function, args):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    function(rank, world, *args)
    if dist.is_initialized(): dist.destroy_process_group()


def run(function, world, *args):
    "Run in fresh processes, forked so that nothing is imported again; with world 1 there is no process group."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    if world > 1: mp.start_processes(in_process, (world, port, function, args), world, start_method="fork")
    else: mp.start_processes(alone, (function, args), 1, start_method="fork")


def alone(rank, function, args):
    torch.set_num_threads(1)
    function(0, 1, *args)


def make_model(**options):
    config = LlamaConfig(**toy.SMALL | {"attention_dropout": 0.0}, tie_word_embeddings=True)
    torch.manual_seed(0)
    return Revela(Retriever(LlamaModel(config), toy.TOKENIZER, pooling="mean"), LlamaForCausalLM(config), **{"temperature": 0.05} | options)


# ------------------------------------------------------------------ one forward and backward

def forward_backward(rank, world, out, checkpointing, options):
    "This rank's share of the four rows; the loss weighted by tokens, as the trainer does."
    if world > 1: dist.init_process_group("gloo")
    model = make_model(gather_chunks=True, **options)
    if checkpointing: model.activation_checkpointing_enable()
    share = len(ROWS) // world
    batch = toy.COLLATOR([{"texts": t} for t in ROWS[rank * share:(rank + 1) * share]])
    tokens = predicted_tokens(batch).float()
    mean = tokens.clone()
    if world > 1:
        dist.all_reduce(mean)
        mean /= world
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    result = wrapped(**batch)
    loss = result.loss * tokens / mean
    loss.backward()
    loss = loss.detach()
    if world > 1:
        dist.all_reduce(loss)
        loss /= world
    assert result.weights.shape == (3 * share, 12) and result.similarity.shape == (3 * share, 12)
    if rank == 0: save_file({"loss": loss} | {n: p.grad for n, p in model.named_parameters()}, out)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("checkpointing,options", [(False, {}), (True, {"dual_loss": True}), (False, {"value_norm": "rescaled", "temperature": 0.01}), (False, {"learn_temperature": True, "value_norm": "none"})],
                         ids=["plain", "checkpointing", "sharp", "learnt"])
def test_gathered_chunks_are_one_group(tmp_path, world, checkpointing, options):
    run(forward_backward, 1, tmp_path / "one", checkpointing, options)
    run(forward_backward, world, tmp_path / "many", checkpointing, options)
    one, many = load_file(tmp_path / "one"), load_file(tmp_path / "many")
    assert one.keys() == many.keys() and any(n.startswith("retriever") and g.abs().max() > 1e-7 for n, g in one.items())
    for name in one: torch.testing.assert_close(many[name], one[name], atol=min(1e-5, 1e-3 * one[name].abs().max().item() + 1e-9), rtol=0, msg=lambda m: f"{name}: {m}")


def gather_numbers(rank, world, out):
    dist.init_process_group("gloo")
    x = torch.full((2, 1), float(rank), dtype=torch.float64, requires_grad=True)
    everyone = GatherRows.apply(x)
    assert everyone[:, 0, 0].tolist() == [0.0, 1.0]
    (everyone * torch.tensor([10.0, 1.0]).view(2, 1, 1) * (rank + 1)).sum().backward()
    assert x.grad.unique().item() == (10.0, 1.0)[rank] * 3 # both ranks' wishes: 1 + 2
    try: pad_to_ranks(torch.ones(2 + rank, 3, dtype=torch.long), torch.ones(2 + rank, 3, dtype=torch.long))
    except ValueError as error: Path(f"{out}.{rank}").write_text(str(error))


def test_gradient_of_a_gather_and_unequal_shares(tmp_path):
    run(gather_numbers, 2, tmp_path / "error")
    assert all("[2, 3]" in Path(f"{tmp_path / 'error'}.{rank}").read_text() for rank in (0, 1))


# ------------------------------------------------------------------ the trainer

def train_run(rank, world, folder, gather, rows, options):
    model = make_model(gather_chunks=gather)
    trainer = toy.train(folder, model, rows=rows, per_device_train_batch_size=4 // world, **dict(max_steps=4, max_grad_norm=0.0, save_strategy="steps", save_steps=4) | options)
    assert trainer.args.world_size == world
    if rank == 0:
        save_file({n: p.detach().contiguous() for n, p in model.named_parameters() if n != "lm.lm_head.weight"} | {"loss": torch.tensor(toy.curve(trainer)), "norm": torch.tensor(toy.curve(trainer, "grad_norm"))}, Path(folder) / "result")


EIGHT = toy.Dataset.from_dict({"texts": [t[i:] + t[:i] for t in ROWS for i in (0, 1)]})


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("gather", [False, True], ids=["own_groups", "spanning"])
def test_many_processes_train_like_one(tmp_path, world, gather):
    "SGD, because Adam's first steps turn rounding of tiny gradients into the sign of a step."
    options = dict(optim="sgd", learning_rate=0.1, warmup_steps=0, logging_steps=1)
    run(train_run, 1, tmp_path / "one", gather, EIGHT, options)
    run(train_run, world, tmp_path / "many", gather, EIGHT, options)
    one, many = load_file(tmp_path / "one/result"), load_file(tmp_path / "many/result")
    assert one["loss"][-1] < one["loss"][0]
    for name in one: torch.testing.assert_close(many[name], one[name], atol=1e-5, rtol=1e-5 if name == "norm" else 0, msg=lambda m: f"{name}: {m}")


def counted_run(rank, world, folder):
    with pytest.MonkeyPatch.context() as patch: trainer = toy.train(folder, make_model(), rows=toy.Dataset.from_dict({"texts": ROWS}), max_steps=2, callbacks=[toy.Clock(patch)], train_sampling_strategy="sequential")
    (Path(folder) / f"speed{rank}").write_text(str(toy.curve(trainer, "tokens_per_second")))


def test_tokens_per_second_are_those_of_all_processes(tmp_path):
    run(counted_run, 2, tmp_path)
    tokens = [toy.COLLATOR([{"texts": texts}])["attention_mask"].sum().item() for texts in ROWS]
    assert tokens[0] != tokens[1]
    assert all((tmp_path / f"speed{rank}").read_text() == str([round((tokens[i] + tokens[i + 1]) / 3, 1) for i in (0, 2)]) for rank in (0, 1))
