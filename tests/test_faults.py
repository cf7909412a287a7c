"""Faults on purpose. Each run must end with the weights, losses and order of data of a run that nothing happened to, or stop with the truth."""
import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import test_trainer as toy
import revela_nb.checkpoints as module
from revela_nb.launch import LogToFile, StopOnSignal
from revela_nb.checkpoints import checkpoint_fault, last_checkpoint
from revela_nb.trainer import RevelaTrainer
from test_distributed import run

ROOT = Path(__file__).parents[1]
SETTINGS = dict(max_steps=8, save_strategy="steps", save_steps=2, save_total_limit=3)


def train(folder, resume=None, callbacks=(), model=None, **options):
    return toy.train(folder, model or toy.make_model(dropout=0.1), resume=resume, callbacks=[LogToFile(Path(folder) / "log.jsonl"), *callbacks], **SETTINGS | options)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Runs that are killed are child processes of one thread, and a matrix product rounds by how many threads share it: so one thread for all that is compared bit by bit."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    "A run that was broken off at step 7: checkpoints 2, 4, 6."
    folder = tmp_path_factory.mktemp("six")
    with pytest.raises(KeyboardInterrupt): train(folder, callbacks=[toy.StopAt(7)])
    return folder


def copy(six_steps, tmp_path): return Path(shutil.copytree(six_steps, tmp_path / "run"))


def nothing_lost(folder, whole):
    "Goes on, and arrives where the undisturbed run did: every loss, every weight, every line of the log."
    resumed = train(folder, resume=True)
    assert toy.curve(resumed) == toy.curve(whole)
    toy.same_weights(whole.model, resumed.model)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in lines if "loss" in r] == toy.curve(whole)
    assert last_checkpoint(folder).name == "checkpoint-8"
    return resumed


# ------------------------------------------------------------------ damaged checkpoints

def empty(path): path.write_bytes(b"")
def halve(path): os.truncate(path, path.stat().st_size // 2)
def flip(path):
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 255]))


FAULTS = {"half model": ("model.safetensors", halve), "empty model": ("model.safetensors", empty), "no model": ("model.safetensors", os.unlink), "one byte of the optimiser": ("optimizer.pt", flip), "no random state": ("rng_state.pth", os.unlink),
          "half trainer state": ("trainer_state.json", halve), "no seal": (module.SEAL, os.unlink), "half seal": (module.SEAL, halve), "no schedule": ("scheduler.pt", os.unlink)}


@pytest.mark.parametrize("name", FAULTS)
def test_damaged_checkpoint(tmp_path, six_steps, whole, name, caplog):
    folder, (file, damage) = copy(six_steps, tmp_path), FAULTS[name]
    damage(folder / "checkpoint-6" / file)
    with caplog.at_level("WARNING", "revela_nb.checkpoints"): assert last_checkpoint(folder).name == "checkpoint-4"
    assert "skipping" in caplog.text and "checkpoint-6" in caplog.text
    nothing_lost(folder, whole)


def test_every_checkpoint_damaged(tmp_path, six_steps, whole):
    folder = copy(six_steps, tmp_path)
    for n in (2, 4, 6): halve(folder / f"checkpoint-{n}/optimizer.pt")
    assert last_checkpoint(folder) is None
    nothing_lost(folder, whole)


# ------------------------------------------------------------------ full disk

@pytest.mark.parametrize("what", ["weights", "optimiser", "seal"])
def test_full_disk(tmp_path, whole, monkeypatch, what):
    full = OSError(errno.ENOSPC, "No space left on device")
    def fail(real, only, error=full):
        def write(x, *args, **kwargs):
            if only in str(args[0] if args else x):
                if args: Path(args[0]).write_bytes(b"half")
                raise error
            return real(x, *args, **kwargs)
        return write
    with monkeypatch.context() as m:
        if what == "weights": m.setattr(module, "save_file", fail(module.save_file, "checkpoint-6"))
        if what == "optimiser": m.setattr(torch, "save", fail(torch.save, "checkpoint-6/optimizer.pt", RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"))) # what torch says of a full disk
        if what == "seal": m.setattr(module, "seal_checkpoint", fail(module.seal_checkpoint, "checkpoint-6"))
        with pytest.raises(OSError, match=r"checkpoint-6' could not be written .*'checkpoint-4' is whole"): train(tmp_path)
    assert not (tmp_path / "checkpoint-6").exists() and checkpoint_fault(tmp_path / "checkpoint-4") is None
    nothing_lost(tmp_path, whole)


def run_out_of_room(rank, world, folder, room):
    "From step 6 on the operating system refuses to let a file grow above so many bytes, as a full disk refuses."
    class Fill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5: resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try: train(folder, callbacks=[Fill()])
    except OSError as error: (Path(folder) / "said").write_text(str(error))


@pytest.mark.parametrize("file,room", [("model.safetensors", 20_000), ("optimizer.pt", 200_000)])
def test_operating_system_refuses_to_write(tmp_path, six_steps, whole, file, room):
    "No acting here: safetensors and torch meet the refusal in their own code, and say so in their own words."
    sizes = {p.name: p.stat().st_size for p in (six_steps / "checkpoint-6").iterdir()}
    assert sizes[file] > room and (file == "model.safetensors" or sizes["model.safetensors"] < room)
    run(run_out_of_room, 1, tmp_path, room)
    said = (tmp_path / "said").read_text()
    assert "checkpoint-6' could not be written" in said and "'checkpoint-4' is whole" in said
    assert not (tmp_path / "checkpoint-6").exists()
    nothing_lost(tmp_path, whole)


def test_prepare_goes_on_when_there_is_room_again(tmp_path):
    "A limit of 6,000 bytes a file: `revela prepare` ends with an error in one line and leaves no half file; without the limit it makes what an undisturbed one makes."
    (tmp_path / "notes").mkdir()
    for i in range(8): (tmp_path / f"notes/{i}.md").write_text("\n\n".join(f"Text {i} of part {k} says something about topic {i * k} and {i + k} others." for k in range(40)))
    def prepare(out, room=None):
        limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))) if room else None
        words = [sys.executable, "-m", "revela_nb.cli", "prepare", "notes", "--out", out, "--group-size", "4", "--max-words", "20"]
        return subprocess.run(words, cwd=tmp_path, preexec_fn=limit, capture_output=True, text=True, timeout=170, env=os.environ | {"PYTHONPATH": str(ROOT)})
    def shards(out): return {p.name: p.read_bytes() for p in (tmp_path / out).glob("*.parquet")}
    refused = prepare("out", 6000)
    assert refused.returncode != 0 and "revela: error: " in refused.stderr and "File too large" in refused.stderr and refused.stderr.count("there is no room for it") == 1 and "out/work/" in refused.stderr and "the same command goes on" in refused.stderr and "Traceback" not in refused.stderr
    assert not [*(tmp_path / "out").rglob("*.partial")] and not shards("out")
    assert prepare("out").returncode == 0 and prepare("whole").returncode == 0
    assert shards("out") == shards("whole") and shards("out")


def test_other_errors_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def fail(*args, **kwargs): raise RuntimeError("device-side assert")
    monkeypatch.setattr(module, "seal_checkpoint", fail)
    with pytest.raises(RuntimeError, match="device-side"): train(tmp_path)


# ------------------------------------------------------------------ signals

class Kill(TrainerCallback):
    def __init__(self, step, sign, rank=0): self.step, self.sign, self.rank = step, sign, rank
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == self.rank: os.kill(os.getpid(), self.sign)


def test_sigterm_saves_the_step_and_resumes(tmp_path, whole):
    before, stop = signal.getsignal(signal.SIGTERM), StopOnSignal()
    train(tmp_path, callbacks=[stop, Kill(4, signal.SIGTERM)])
    assert stop.stopped and last_checkpoint(tmp_path).name == "checkpoint-5" and signal.getsignal(signal.SIGTERM) == before
    nothing_lost(tmp_path, whole)


def killed(rank, world, folder): train(folder, callbacks=[Kill(5, signal.SIGKILL)])


def test_sigkill(tmp_path, whole):
    with pytest.raises(Exception, match="SIGKILL"): run(killed, 1, tmp_path)
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    nothing_lost(tmp_path, whole)


def test_kill_while_a_log_line_is_written(tmp_path, six_steps, whole):
    folder = copy(six_steps, tmp_path)
    with open(folder / "log.jsonl", "a") as file: file.write('{"step": 7, "lo')
    nothing_lost(folder, whole)


# ------------------------------------------------------------------ numbers

class Spoil(TrainerCallback):
    def __init__(self, value): self.value = value
    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 5:
            weight = model.lm.lm_head.weight if math.isfinite(self.value) else model.retriever.encoder.norm.weight
            weight.data.mul_(self.value) if math.isfinite(self.value) else weight.data.fill_(self.value)


@pytest.mark.parametrize("value,message", [(math.nan, "loss is nan"), (1e4, "above max_loss")], ids=["nan", "exploded"])
def test_bad_loss_keeps_the_batch(tmp_path, whole, value, message):
    with pytest.raises(FloatingPointError, match=message): train(tmp_path, callbacks=[Spoil(value)])
    kept, facts = load_file(tmp_path / "nan_batch.safetensors"), json.loads((tmp_path / "nan_batch.json").read_text())
    assert facts == {"group_size": 6, "step": 6, "temperature": 0.05} and kept["input_ids"].shape[0] == 6
    nothing_lost(tmp_path, whole)


# ------------------------------------------------------------------ several processes

EVEN = dict(gradient_accumulation_steps=1, max_grad_norm=0.0, optim="sgd", learning_rate=0.1, warmup_steps=0)


def shared_run(rank, world, folder, total, callbacks):
    model = toy.make_model()
    trainer = train(folder, True, [*callbacks, StopOnSignal()], model, **EVEN | {"gradient_accumulation_steps": total // world})
    if rank == 0:
        save_file({n: p.detach().contiguous() for n, p in model.named_parameters()} | {"loss": torch.tensor(toy.curve(trainer))}, Path(folder) / f"result{trainer.state.global_step}")


@pytest.fixture(scope="module")
def four_groups(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    run(shared_run, 1, folder, 4, [])
    return load_file(folder / "result8")


@pytest.mark.parametrize("before,after", [(2, 1), (1, 2), (4, 2)])
def test_resume_on_another_number_of_processes(tmp_path, four_groups, before, after):
    "SIGTERM to the last process in step 4; the rest goes on with another number of processes."
    run(shared_run, before, tmp_path, 4, [Kill(3, signal.SIGTERM, before - 1)])
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    run(shared_run, after, tmp_path, 4, [])
    result = load_file(tmp_path / "result8")
    for name in four_groups: torch.testing.assert_close(result[name], four_groups[name], atol=1e-5, rtol=0)


def test_lost_worker(tmp_path, four_groups):
    with pytest.raises(Exception, match="SIGKILL|SIGABRT|terminated|closed"): run(shared_run, 2, tmp_path, 4, [Kill(5, signal.SIGKILL, 1)])
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    run(shared_run, 1, tmp_path, 4, [])
    result = load_file(tmp_path / "result8")
    for name in four_groups: torch.testing.assert_close(result[name], four_groups[name], atol=1e-5, rtol=0)


def test_another_batch_size_is_refused(tmp_path):
    train(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="made with 1 groups a step, this run has 3"): train(tmp_path, resume=True, gradient_accumulation_steps=3)


def gathering():
    model = toy.make_model()
    model.gather_chunks = True
    return model


@pytest.mark.parametrize("more", [dict(gradient_accumulation_steps=4), dict(per_device_train_batch_size=2, gradient_accumulation_steps=3)], ids=["as many groups", "other groups"])
def test_gathered_groups_are_refused_in_another_split(tmp_path, more):
    "2 groups read as one, twice a step: the same 4 groups one by one are another training, though their order is the same."
    made = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    train(tmp_path, max_steps=2, model=gathering(), **made)
    what, same = ("what a group is", r"this run has 4 and makes 1 one") if "per_device_train_batch_size" not in more else ("the order of the data", "this run has 6 and makes 2 one")
    with pytest.raises(ValueError, match=rf"made with 4 groups a step, of which 2 are one .gather_chunks., {same}: {what} would change.* processes x groups is 2, and processes x accumulation x groups is 4"):
        train(tmp_path, resume=True, model=gathering(), **more)
    train(tmp_path, max_steps=4, resume=True, model=gathering(), **made)


def test_groups_of_their_own_may_be_split_otherwise(tmp_path):
    train(tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert train(tmp_path, max_steps=4, resume=True, gradient_accumulation_steps=4).state.global_step == 4


def gathered_run(rank, world, folder): train(folder, True, model=gathering(), **EVEN | {"max_steps": 2, "per_device_train_batch_size": 2 // world})


def test_gathered_groups_go_on_where_processes_take_the_place_of_a_batch(tmp_path):
    "2 processes with a group each, then 1 with both: one group as before."
    run(gathered_run, 2, tmp_path)
    assert json.loads((tmp_path / "checkpoint-2/pending_log.json").read_text())["groups_as_one"] == 2
    assert train(tmp_path, True, model=gathering(), **EVEN | {"max_steps": 4, "per_device_train_batch_size": 2}).state.global_step == 4
