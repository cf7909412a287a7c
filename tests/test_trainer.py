"""Training: accumulation, two rates, schedules, NaN, evaluation, and checkpoints that survive a SIGKILL."""
import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, T5Config, T5ForConditionalGeneration, TrainerCallback
from transformers.trainer_callback import PrinterCallback

import revela_nb.launch as launch_module
import revela_nb.trainer as trainer_module
from revela_nb.batching import GroupCollator
from revela_nb.launch import ReportHistogram, watch_run
from revela_nb.model import Revela
from revela_nb.loading import LORA_TARGETS
from revela_nb.retriever import Retriever
from revela_nb.checkpoints import SEAL, checkpoint_fault, last_checkpoint, trainable_state
from revela_nb.trainer import RevelaArguments, RevelaTrainer, build_lm, scheduled_temperature

CHUNKS = ["The cat sat on the warm mat. It purred.", "A cat purrs when it is warm and calm.", "Dogs bark at cats.",
          "Python lists grow with append. A list keeps order.", "Append adds one item.", "A tuple is a list that cannot grow."]
VOCAB = {w: i for i, w in enumerate(["<unk>", "<eos>", "<pad>"] + sorted({w for c in CHUNKS for w in c.replace(".", " .").split()} | {"query", "passage", ":"}))}
SMALL = dict(vocab_size=len(VOCAB), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, attention_dropout=0.1)


def make_tokenizer():
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


TOKENIZER = make_tokenizer()
COLLATOR = GroupCollator(TOKENIZER, TOKENIZER, max_length=16)
GROUPS = Dataset.from_dict({"texts": [[CHUNKS[(i * k) % 6 if k in (1, 5) else (i + k) % 6] for i in range(6)] for k in range(8)]})


def make_model(tied=True, dropout=0.0, temperature=0.05, freeze_lm=False):
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"attention_dropout": dropout}, tie_word_embeddings=tied)
    return Revela(Retriever(LlamaModel(config), TOKENIZER, pooling="mean"), LlamaForCausalLM(config), temperature, freeze_lm=freeze_lm)


def train(folder, model=None, resume=None, rows=GROUPS, callbacks=None, start=True, trainer_class=RevelaTrainer, collator=COLLATOR, evaluate_retriever=None, eval_dataset=None, **options):
    options = dict(max_steps=6, learning_rate=5e-3, warmup_steps=2, logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True) | options
    trainer = trainer_class(model if model is not None else make_model(), RevelaArguments(output_dir=str(folder), **options), rows, collator, evaluate_retriever, eval_dataset, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    if start: trainer.train(resume_from_checkpoint=resume)
    return trainer


def curve(trainer, name="loss"): return [r[name] for r in trainer.state.log_history if name in r]
def same_weights(a, b, atol=0.0):
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True): torch.testing.assert_close(x, y, atol=atol, rtol=0, msg=lambda m: f"{name}: {m}")


class StopAt(TrainerCallback):
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step: raise KeyboardInterrupt


def stopped_and_resumed(folder, make, stop, **settings):
    with pytest.raises(KeyboardInterrupt): train(folder, make(), callbacks=[StopAt(stop)], **settings)
    return train(folder, make(), resume=True, **settings)


# ------------------------------------------------------------------ options

def test_options_reach_the_command_line():
    args, = HfArgumentParser(RevelaArguments).parse_args_into_dataclasses(["--output_dir", "x", "--retriever_learning_rate", "3e-4", "--temperature_end", "0.01", "--seed", "7"])
    assert (args.retriever_learning_rate, args.temperature_end, args.learning_rate, args.data_seed) == (3e-4, 0.01, 1e-4, 7)
    assert (args.warmup_steps, args.per_device_train_batch_size, args.num_train_epochs, args.remove_unused_columns, args.report_to) == (100, 1, 1.0, False, [])
    assert args.n_gpu <= 1
    for name in ("retriever_learning_rate", "temperature_end"):
        with pytest.raises(ValueError, match=f"{name} must be above 0"): RevelaArguments(output_dir="x", **{name: -1.0})


def test_only_revela_is_trained(tmp_path):
    with pytest.raises(TypeError, match="not a Linear"): train(tmp_path, torch.nn.Linear(2, 2))


# ------------------------------------------------------------------ the loop

def test_loss_falls_and_figures_are_logged(tmp_path):
    trainer = train(tmp_path, max_steps=24, retriever_learning_rate=1e-2)
    assert curve(trainer)[-1] < curve(trainer)[0] - 1
    record = trainer.state.log_history[0]
    assert {"in_batch_loss", "plain_loss", "gain", "effective_neighbours", "temperature", "tokens_per_second", "grad_norm"} <= set(record)
    assert record["loss"] == record["in_batch_loss"] and record["gain"] == pytest.approx(record["plain_loss"] - record["in_batch_loss"])
    assert all(1 <= x <= 5.001 for x in curve(trainer, "effective_neighbours"))
    assert not (tmp_path / "training_args.bin").exists()


def test_log_is_the_mean_since_the_last_line(tmp_path):
    every, third = train(tmp_path / "1"), train(tmp_path / "3", logging_steps=3)
    for name in ("loss", "plain_loss", "effective_neighbours"):
        assert curve(third, name) == pytest.approx([sum(curve(every, name)[i:i + 3]) / 3 for i in (0, 3)], abs=1e-6)


class Clock(TrainerCallback):
    "A clock that only moves where the test says: 3 seconds before every forward, 5 in every evaluation, 7 in every save."
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: self.now))
    def on_step_begin(self, *args, **kwargs): self.now += 3
    def on_evaluate(self, *args, **kwargs): self.now += 5
    def on_save(self, *args, **kwargs): self.now += 7


def test_tokens_per_second(tmp_path, monkeypatch):
    "All tokens of a log line over all its seconds, its first forward included; evaluating and saving are not among them."
    trainer = train(tmp_path, callbacks=[Clock(monkeypatch)], logging_steps=2, evaluate_retriever=lambda r: {"x": 0.0}, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=2)
    tokens = COLLATOR([GROUPS[0]])["attention_mask"].sum().item() # every group holds the same chunks
    assert curve(trainer, "tokens_per_second") == [round(2 * tokens / 6, 1)] * 3
    trainer.args.max_steps = 8 # and again: nothing of the first training counts
    trainer.train()
    assert curve(trainer, "tokens_per_second") == [round(2 * tokens / 6, 1)] * 4


def test_dual_loss_is_reported_apart(tmp_path):
    model = make_model()
    model.dual_loss = True
    record = train(tmp_path, model, max_steps=1).state.log_history[0]
    assert record["loss"] == pytest.approx(record["in_batch_loss"] + record["plain_loss"], abs=1e-5)


UNEVEN = Dataset.from_dict({"texts": [CHUNKS, [c.split(".")[0][:12] for c in CHUNKS]] * 3})


def test_accumulation_equals_one_batch(tmp_path):
    together = train(tmp_path / "a", rows=UNEVEN, max_steps=3, per_device_train_batch_size=2, train_sampling_strategy="sequential")
    in_turn = train(tmp_path / "b", rows=UNEVEN, max_steps=3, gradient_accumulation_steps=2, train_sampling_strategy="sequential")
    assert curve(together) == pytest.approx(curve(in_turn), abs=1e-5)
    assert curve(together, "grad_norm") == pytest.approx(curve(in_turn, "grad_norm"), rel=1e-4)
    same_weights(together.model, in_turn.model, 1e-5)


def test_logged_loss_is_trainers_own(tmp_path, monkeypatch):
    "Our running sums agree with the sum that Trainer keeps, also with accumulation."
    seen, log = [], RevelaTrainer.log
    monkeypatch.setattr(RevelaTrainer, "log", lambda self, logs, start_time=None: (seen.append(logs.get("loss")), log(self, logs, start_time))[1])
    trainer = train(tmp_path, rows=UNEVEN, max_steps=4, gradient_accumulation_steps=2, logging_steps=2)
    assert [x for x in seen if x is not None] == pytest.approx(curve(trainer), abs=1e-5)


def test_two_rates_and_no_decay_on_norms(tmp_path):
    trainer = train(tmp_path, max_steps=2, retriever_learning_rate=1e-2, weight_decay=0.1)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    seen = []
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            name = names[id(p)]
            seen.append(name)
            assert group["initial_lr"] == (1e-2 if name.startswith("retriever.") else 5e-3), name
            assert group["weight_decay"] == (0 if "norm" in name else 0.1), name
    assert sorted(seen) == sorted(names.values())


def test_retriever_rate_moves_the_retriever(tmp_path):
    before = make_model()
    after = train(tmp_path, learning_rate=1e-12, retriever_learning_rate=1e-2, max_steps=4).model
    moved = {name: (p - q).abs().max().item() for (name, p), (_, q) in zip(before.named_parameters(), after.named_parameters())}
    assert all((d > 1e-4) == name.startswith("retriever.") for name, d in moved.items() if "norm" not in name), moved


def test_freeze_lm_trains_the_retriever_alone(tmp_path):
    before = make_model()
    trainer = train(tmp_path, make_model(freeze_lm=True), save_strategy="steps", save_steps=6)
    same_weights(before.lm, trainer.model.lm)
    assert all(name.startswith("retriever.") for name in load_file(tmp_path / "checkpoint-6/model.safetensors"))


def test_temperature_schedule(tmp_path):
    trainer = train(tmp_path, make_model(temperature=0.2), max_steps=5, temperature_end=0.002)
    assert curve(trainer, "temperature") == pytest.approx([0.2 * 10 ** (-i / 2) for i in range(5)], rel=1e-9)
    assert curve(train(tmp_path), "temperature") == [0.05] * 6
    assert scheduled_temperature(0.1, 0.01, 0, 1) == 0.1


def test_a_learnt_temperature_has_no_schedule(tmp_path):
    model = make_model()
    learnt = Revela(model.retriever, model.lm, learn_temperature=True)
    with pytest.raises(ValueError, match="temperature_end"): train(tmp_path, learnt, temperature_end=0.01)
    train(tmp_path, learnt, max_steps=1)


def test_activation_checkpointing_changes_nothing(tmp_path):
    plain, recomputed = train(tmp_path / "a", make_model(dropout=0.1)), train(tmp_path / "b", make_model(dropout=0.1), activation_checkpointing=True)
    assert curve(plain) == pytest.approx(curve(recomputed), abs=1e-5)
    same_weights(plain.model, recomputed.model, 1e-5)


# ------------------------------------------------------------------ evaluation

def test_evaluation_figures(tmp_path):
    calls = []
    def figures(retriever):
        calls.append(retriever.training)
        return {"ndcg@10": 0.1 * len(calls), "recall@100": 0.5}
    trainer = train(tmp_path, evaluate_retriever=figures, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, metric_for_best_model="ndcg@10", load_best_model_at_end=True)
    assert curve(trainer, "eval_ndcg@10") == pytest.approx([0.1, 0.2, 0.3]) and calls == [False] * 3
    assert trainer.state.best_global_step == 6 and trainer.state.best_metric == pytest.approx(0.3)
    assert trainer.evaluate()["eval_recall@100"] == 0.5
    assert "eval_loss" not in trainer.state.log_history[-1]


def test_best_model_is_loaded_at_the_end(tmp_path):
    scores = iter([0.9, 0.1, 0.2])
    trainer = train(tmp_path, evaluate_retriever=lambda r: {"ndcg@10": next(scores)}, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
                    metric_for_best_model="ndcg@10", load_best_model_at_end=True)
    assert trainer.state.best_global_step == 2
    same_weights(trainer.model, train(tmp_path / "two", max_steps=6, callbacks=[StopAfter(2)]).model)


class StopAfter(TrainerCallback):
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = state.global_step == self.step


def test_eval_mode_gives_a_real_loss(tmp_path):
    trainer = train(tmp_path, make_model(dropout=0.1), eval_dataset=GROUPS.select(range(3)), eval_strategy="steps", eval_steps=3)
    model = trainer.model.eval()
    with torch.no_grad(): expected = sum(model(**COLLATOR([GROUPS[i]])).loss.item() for i in range(3)) / 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert len(curve(trainer, "eval_loss")) == 3 and not model.training


def test_evaluation_leaves_training_as_it_was(tmp_path):
    without = train(tmp_path / "a", make_model(dropout=0.1))
    with_it = train(tmp_path / "b", make_model(dropout=0.1), evaluate_retriever=lambda r: {"norm": r.encode_passages(CHUNKS, progress=False).norm().item()}, eval_strategy="steps", eval_steps=2)
    assert curve(without) == curve(with_it)


# ------------------------------------------------------------------ what one sees

class FakeWandb:
    def __init__(self): self.lines = []
    def Histogram(self, np_histogram): return np_histogram
    def log(self, line): self.lines.append(line)


def test_histogram_for_wandb_and_only_for_those_who_can():
    from transformers.integrations import WandbCallback
    able, state = object.__new__(WandbCallback), SimpleNamespace(is_world_process_zero=True, global_step=7, similarity_histogram=[0] * 19 + [6])
    able._wandb = FakeWandb()
    report = ReportHistogram([PrinterCallback(), able])
    report.on_log(None, state, None, logs={"loss": 1.0})
    report.on_log(None, state, None, logs={"eval_loss": 1.0}) # another line has no similarities
    line, = able._wandb.lines
    counts, edges = line["train/similarity"]
    assert line["train/global_step"] == 7 and counts[-1] == 6 and len(edges) == 21 and (edges[0], edges[-1]) == (-1, 1)


def test_bar_shows_speed_loss_and_gain_from_the_first_step(tmp_path, capsys, monkeypatch):
    bars, real = [], launch_module.tqdm
    def kept(**options):
        bars.append(real(**options, file=io.StringIO(), mininterval=0))
        return bars[-1]
    monkeypatch.setattr(launch_module, "tqdm", kept)
    def watched(resume=None, **options):
        trainer = train(tmp_path, start=False, disable_tqdm=options.pop("disable_tqdm", False), save_strategy="steps", save_steps=2, evaluate_retriever=lambda r: {"ndcg@10": 0.25}, eval_strategy="steps", eval_steps=3, **options)
        watch_run(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer
    trainer = watched(max_steps=4)
    shown, record = bars[0].fp.getvalue(), [r for r in trainer.state.log_history if "gain" in r][-1]
    assert "0/4 [00:00<?, ?step/s]" in shown and "4/4" in shown
    assert f"loss={record['loss']:.3f}, gain={record['gain']:+.3f}, tokens/s={record['tokens_per_second']:,.0f}, ndcg@10=0.250" in shown
    assert "{" not in shown + capsys.readouterr().out # no dictionaries
    watched(resume=True, max_steps=6)
    assert "4/6" in bars[1].fp.getvalue().split("\r")[1] # from where it goes on
    watched(max_steps=1, disable_tqdm=True)
    assert len(bars) == 2


# ------------------------------------------------------------------ NaN

class Spoil(TrainerCallback):
    def __init__(self, step): self.step = step
    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == self.step: model.lm.model.norm.weight.data[0] = math.nan


def test_nan_loss_stops_and_keeps_the_batch(tmp_path):
    with pytest.raises(FloatingPointError, match="At step 4 the loss is nan"): train(tmp_path, callbacks=[Spoil(3)], save_strategy="steps", save_steps=1)
    batch = load_file(tmp_path / "nan_batch.safetensors")
    assert set(batch) == {f"{p}{n}" for p in ("query_", "passage_", "") for n in ("input_ids", "attention_mask")} | {"labels"} and batch["labels"].shape[0] == 6
    newest = last_checkpoint(tmp_path)
    assert newest.name == "checkpoint-3"
    assert all(x.isfinite().all() for x in load_file(newest / "model.safetensors").values())


def test_nan_gradient_with_a_finite_loss_stops_before_the_step(tmp_path):
    model, weights = make_model(), []
    model.retriever.encoder.norm.weight.register_hook(lambda g: g * math.nan)
    before = make_model()
    with pytest.raises(FloatingPointError, match="At step 1 the norm of the gradient is nan"): train(tmp_path, model, warmup_steps=0)
    same_weights(before, model)
    assert (tmp_path / "nan_batch.safetensors").exists()


# ------------------------------------------------------------------ checkpoints and resume

SETTINGS = dict(max_steps=12, logging_steps=4, save_strategy="steps", save_steps=3, temperature_end=0.02, retriever_learning_rate=1e-2)


@pytest.mark.parametrize("tied", [True, False])
def test_full_fine_tuning_resumes_exactly(tmp_path, tied):
    "Dropout, schedule, log lines that straddle the stop; and a stop in the second epoch (8 groups)."
    make = lambda: make_model(tied, dropout=0.1)
    whole = train(tmp_path / "whole", make(), **SETTINGS)
    for stop in (5, 8, 11):
        resumed = stopped_and_resumed(tmp_path / str(stop), make, stop, **SETTINGS)
        for name in ("loss", "plain_loss", "gain", "effective_neighbours", "temperature", "learning_rate", "grad_norm"): assert curve(resumed, name) == curve(whole, name), name
        same_weights(whole.model, resumed.model)
    lm = resumed.model.lm
    assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == tied


def test_resume_at_the_end_of_an_epoch_and_with_accumulation(tmp_path):
    make = lambda: make_model(dropout=0.1)
    for name, more in (("epoch", dict(save_steps=8)), ("accumulation", dict(gradient_accumulation_steps=3, save_steps=4, logging_steps=3))):
        whole = train(tmp_path / name / "whole", make(), **SETTINGS | more)
        resumed = stopped_and_resumed(tmp_path / name / "broken", make, 10, **SETTINGS | more)
        assert curve(resumed) == curve(whole)
        same_weights(whole.model, resumed.model)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**SMALL | {"attention_dropout": 0.0}, tie_word_embeddings=True)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def make_lora(backbone):
    lora = lambda task: LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=LORA_TARGETS, task_type=task)
    torch.manual_seed(0)
    return Revela(Retriever.from_pretrained(backbone, lora=lora("FEATURE_EXTRACTION"), max_length=16), build_lm(backbone, lora=lora("CAUSAL_LM")), temperature=0.05)


def test_lora_on_both(tmp_path, backbone):
    make = lambda: make_lora(backbone)
    before, whole = make(), train(tmp_path / "whole", make(), **SETTINGS)
    for (name, p), (_, q) in zip(before.named_parameters(), whole.model.named_parameters()):
        assert p.requires_grad == ("lora_" in name) and torch.equal(p, q) != ("lora_" in name), name
    saved = load_file(tmp_path / "whole/checkpoint-12/model.safetensors")
    assert saved and all("lora_" in name for name in saved) and any(n.startswith("retriever.") for n in saved) and any(n.startswith("lm.") for n in saved)
    resumed = stopped_and_resumed(tmp_path / "broken", make, 7, **SETTINGS)
    assert curve(resumed) == curve(whole)
    same_weights(whole.model, resumed.model)
    whole.save_retriever(tmp_path / "retriever")
    again = Retriever.from_pretrained(tmp_path / "retriever")
    torch.testing.assert_close(again.encode_queries(CHUNKS, progress=False), whole.model.retriever.eval().encode_queries(CHUNKS, progress=False), atol=1e-6, rtol=0)


def test_checkpoint_of_another_model_is_refused(tmp_path, backbone):
    train(tmp_path, make_lora(backbone), max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="another model"): train(tmp_path, make_model(), resume=True)


def test_last_checkpoint_skips_what_is_broken(tmp_path, caplog):
    train(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=4)
    folders = {n: tmp_path / f"checkpoint-{n}" for n in (1, 2, 3, 4)}
    assert all(checkpoint_fault(f) is None for f in folders.values())
    (folders[4] / SEAL).unlink()
    with open(folders[3] / "optimizer.pt", "r+b") as file:
        file.seek(200)
        file.write(b"garbage")
    (folders[2] / "rng_state.pth").unlink()
    with caplog.at_level(logging.WARNING, "revela_nb.checkpoints"): assert last_checkpoint(tmp_path) == folders[1]
    text = caplog.text
    assert "not written to the end" in text and "optimizer.pt is damaged" in text and "rng_state.pth is missing" in text
    with pytest.raises(ValueError, match="optimizer.pt is damaged"): train(tmp_path, resume=str(folders[3]))
    trainer = train(tmp_path, resume=True, max_steps=4)
    assert trainer.state.global_step == 4 and not folders[3].exists() and len(list(tmp_path.glob("incomplete-checkpoint-*"))) == 3


def test_a_run_without_checkpoints_begins(tmp_path):
    assert curve(train(tmp_path / "a", resume=True)) == curve(train(tmp_path / "b"))


def test_old_checkpoints_go_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    import revela_nb.checkpoints as module
    seal, complete = module.seal_checkpoint, []
    def sealed(folder):
        complete.append(sorted(p.parent.name for p in tmp_path.glob("checkpoint-*/" + SEAL)))
        seal(folder)
    monkeypatch.setattr(module, "seal_checkpoint", sealed)
    train(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=1)
    assert complete == [[], ["checkpoint-1"], ["checkpoint-2"], ["checkpoint-3"]] # there is always one while the next is being written
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_trainable_state_shares_no_memory():
    state = trainable_state(make_model(tied=True))
    assert "lm.lm_head.weight" not in state and "lm.model.embed_tokens.weight" in state
    assert len({x.data_ptr() for x in state.values()}) == len(state)


# ------------------------------------------------------------------ a real SIGKILL

def run_and_die(folder, plan):
    "In a process of its own: train, and get killed at a step, or while a checkpoint's optimizer.pt is half written."
    kind, _, when = plan.partition(":")
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if kind == "step" and state.global_step == int(when): die()
    save = torch.save
    def half_save(x, path, **kwargs):
        save(x, path, **kwargs)
        if kind == "write" and f"checkpoint-{when}" in str(path) and "optimizer" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    torch.save = half_save
    trainer = train(folder, make_model(dropout=0.1), resume=True, callbacks=[Die()], **SETTINGS)
    Path(folder, "curve.json").write_text(json.dumps({name: curve(trainer, name) for name in ("loss", "plain_loss", "temperature")}))


def test_sigkill_while_stepping_and_while_writing(tmp_path):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    for plan, checkpoint in (("write:6", "checkpoint-3"), ("step:8", "checkpoint-6"), ("", "checkpoint-12")):
        done = subprocess.run([sys.executable, __file__, str(tmp_path / "killed"), plan], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == (-signal.SIGKILL if plan else 0), done.stderr
        assert last_checkpoint(tmp_path / "killed").name == checkpoint
    threads = torch.get_num_threads()
    torch.set_num_threads(1) # as in the processes that were killed: a matrix product rounds by how many threads share it
    try: whole = train(tmp_path / "whole", make_model(dropout=0.1), **SETTINGS)
    finally: torch.set_num_threads(threads)
    for name, values in json.loads((tmp_path / "killed/curve.json").read_text()).items(): assert values == pytest.approx(curve(whole, name), abs=1e-6), name
    for name, x in load_file(tmp_path / "killed/checkpoint-12/model.safetensors").items():
        torch.testing.assert_close(x, trainable_state(whole.model)[name], atol=1e-6, rtol=0)


# ------------------------------------------------------------------ the plain stream's loss, now and then

def test_plain_loss_is_measured_every_so_many_steps(tmp_path):
    "Same weights; plain_loss and gain are those of the measured steps, 1, 4 and 7, and lines without one leave both out; with two batches a step, too."
    for more in ({}, dict(rows=UNEVEN, gradient_accumulation_steps=2)):
        settings = dict(max_steps=8, train_sampling_strategy="sequential") | more
        every, third = train(tmp_path / "1", make_model(dropout=0.1), **settings), train(tmp_path / "3", make_model(dropout=0.1), plain_loss_steps=3, **settings)
        same_weights(every.model, third.model)
        assert curve(every) == curve(third) and curve(every, "in_batch_loss") == curve(third, "in_batch_loss")
        for name in ("plain_loss", "gain"): assert {r["step"]: r[name] for r in third.state.log_history if name in r} == {n + 1: curve(every, name)[n] for n in (0, 3, 6)}
        pairs = train(tmp_path / "pairs", make_model(dropout=0.1), plain_loss_steps=3, logging_steps=2, **settings)
        assert [r["step"] for r in pairs.state.log_history if "gain" in r] == [2, 4, 8] == [r["step"] for r in pairs.state.log_history if "plain_loss" in r]
        assert curve(pairs, "gain") == pytest.approx([curve(every, "gain")[n] for n in (0, 3, 6)], abs=1e-6)                # not mixed with the in-batch loss of the other step
        fours = train(tmp_path / "fours", make_model(dropout=0.1), plain_loss_steps=3, logging_steps=4, **settings)
        assert curve(fours, "plain_loss") == pytest.approx([(curve(every, "plain_loss")[0] + curve(every, "plain_loss")[3]) / 2, curve(every, "plain_loss")[6]], abs=1e-6)


def test_plain_loss_is_not_computed_between(tmp_path, monkeypatch):
    seen, forward = [], Revela.forward
    monkeypatch.setattr(Revela, "forward", lambda self, *a, **k: seen.append(forward(self, *a, **k)) or seen[-1])
    train(tmp_path / "a", max_steps=4, plain_loss_steps=3)
    assert [out.plain_loss is None for out in seen] == [False, True, True, False]
    dual = make_model()
    dual.dual_loss = True
    assert all("gain" in r for r in train(tmp_path / "b", dual, max_steps=4, plain_loss_steps=3).state.log_history[:-1])      # is trained, so it is known
    assert all(out.plain_loss is not None for out in seen[4:])


@pytest.mark.parametrize("wrong", [0, -1, 2.5])
def test_plain_loss_steps_is_a_whole_number(wrong):
    with pytest.raises(ValueError, match="plain_loss_steps must be"): RevelaArguments(output_dir="x", plain_loss_steps=wrong)


def test_resume_keeps_the_phase_of_plain_loss_steps(tmp_path):
    "Stopped after step 5, from a checkpoint at 3 in the middle of a log line; measured are steps 1, 6 and 11."
    settings = SETTINGS | dict(plain_loss_steps=5)
    whole = train(tmp_path / "whole", make_model(dropout=0.1), **settings)
    resumed = stopped_and_resumed(tmp_path / "stopped", lambda: make_model(dropout=0.1), 5, **settings)
    for name in ("loss", "plain_loss", "gain", "in_batch_loss"): assert curve(resumed, name) == curve(whole, name) and len(curve(whole, name)) == 3
    same_weights(whole.model, resumed.model)


# ------------------------------------------------------------------ the language model

def test_build_lm(backbone, tmp_path):
    assert not hasattr(build_lm(backbone), "peft_config")
    names = [n for n, p in build_lm(backbone, lora=2).named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7 * 2 and all("lora_" in n for n in names)
    assert build_lm(backbone, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError, match="no/such"): build_lm("no/such")
    with pytest.raises(ValueError, match="No causal language model"): build_lm(tmp_path)
    T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    with pytest.raises((ValueError, TypeError), match="No causal language model|encoder-decoder"): build_lm(tmp_path)


if __name__ == "__main__": run_and_die(*sys.argv[1:])
