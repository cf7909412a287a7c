"""Every recipe in configs/ runs, on a shrunken random model of its architecture; every engine's file is read by that engine."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from revela_nb.cli import main
from revela_nb.trainer import last_checkpoint

ROOT = Path(__file__).parents[1]
ENGINES = ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")
RECIPES = sorted(p for p in (ROOT / "configs").glob("*.yaml") if p.stem not in ENGINES)
# heads, key heads and tied embeddings as published; width, depth and vocabulary shrunk
SHAPES = {"HuggingFaceTB/SmolLM2-135M": (9, 3), "Qwen/Qwen2.5-0.5B": (14, 2), "meta-llama/Llama-3.2-1B": (32, 8), "meta-llama/Llama-3.2-3B": (24, 8)}
CHUNKS = ["The cat sat on the warm mat.", "A cat purrs when it is warm.", "Dogs bark at cats.", "Python lists grow with append."]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    "Folders that stand for hub names, and a file of groups in the shape of the published corpora."
    folder, tokenizer = tmp_path_factory.mktemp("hub"), AutoTokenizer.from_pretrained(ROOT / "revela_nb" / "backbone")
    for name, (heads, kv_heads) in SHAPES.items():
        qwen = name.startswith("Qwen")
        config = (Qwen2Config if qwen else LlamaConfig)(vocab_size=len(tokenizer), hidden_size=8 * heads, head_dim=8, intermediate_size=48, num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv_heads,
                                                        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None)
        torch.manual_seed(0)
        (Qwen2ForCausalLM if qwen else LlamaForCausalLM)(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lines = [json.dumps(CHUNKS[i % 4:] + CHUNKS[:i % 4]) if i % 2 else json.dumps({"src": "wiki", "text": CHUNKS}) for i in range(128)]
    (folder / "groups.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def shrink(recipe, hub):
    "The options of the command line that put local folders for hub names; everything else is the recipe's."
    return ["--groups", str(hub / "groups.jsonl"), "--retriever", str(hub / recipe["retriever"]), "--lm", str(hub / recipe["lm"]), "--lora", "2", "--max_steps", "2", "--bf16", "false", "--use_cpu", "true", "--disable_tqdm", "true"]


def test_there_is_a_recipe_for_every_published_model():
    assert [p.stem for p in RECIPES] == sorted(f"{m}-{c}" for m in ("smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "llama-3.2-3b") for c in ("wiki", "code"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe(path, hub, tmp_path, capsys):
    recipe = yaml.safe_load(path.read_text())
    for name, value in dict(temperature=1e-4, lora=256, lora_alpha=64, lora_dropout=0.1, learning_rate=1e-4, warmup_steps=100, num_train_epochs=1, bf16=True, pooling="eos", value_norm="unit", lm="meta-llama/Llama-3.2-1B").items(): assert recipe[name] == value, name
    assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 32 and recipe["retriever"] in SHAPES
    assert recipe["groups"] == ("trumancai/revela_code_training_corpus" if path.stem.endswith("code") else "trumancai/revela_training_corpus")
    assert main(["train", "--config", str(path), "--output_dir", str(tmp_path / "run"), *shrink(recipe, hub)]) == 0
    out, err = capsys.readouterr()
    assert "after 2 steps" in out and "parameters trained" in err and "2 steps" in err
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-2"
    adapter = json.loads((tmp_path / "run/retriever/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"], len(adapter["target_modules"])) == (2, 64, 0.1, 7)


# ------------------------------------------------------------------ engines

def launch(engine, hub, folder, *words):
    "`accelerate launch` with our file, on two CPU processes."
    accelerate = yaml.safe_load((ROOT / "configs" / f"{engine}.yaml").read_text()) | {"use_cpu": True, "num_processes": 2, "mixed_precision": "no", "main_process_port": 0}
    (folder / "engine.yaml").write_text(yaml.safe_dump(accelerate))
    path = ROOT / "configs" / "smollm2-135m-wiki.yaml"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "engine.yaml"), "-m", "revela_nb.cli", "train", str(path), "--output_dir", str(folder / "run"),
               *shrink(yaml.safe_load(path.read_text()), hub), "--gradient_accumulation_steps", "2", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=150, cwd=folder)


def test_launch_on_two_processes(hub, tmp_path):
    "DDP and FSDP2, both with one group over both processes: the same losses, and a retriever that can be used."
    from revela_nb.retriever import Retriever
    losses = {}
    for engine in ("ddp", "fsdp2"):
        folder = tmp_path / engine
        folder.mkdir()
        done = launch(engine, hub, folder, "--gather_chunks", "true", "--logging_steps", "1", "--warmup_steps", "0", "--learning_rate", "0.01", "--lora_dropout", "0", "--temperature", "0.05")
        assert done.returncode == 0 and "after 2 steps" in done.stdout, done.stderr[-3000:]
        losses[engine] = [r["loss"] for r in map(json.loads, (folder / "run/log.jsonl").read_text().splitlines()) if "loss" in r]
        assert Retriever.from_pretrained(folder / "run/retriever").encode_passages(CHUNKS, progress=False).isfinite().all()
        assert json.loads((folder / "run/checkpoint-2/pending_log.json").read_text())["groups_per_step"] == 4 # there were two processes
        adapter = load_file(folder / "run/retriever/adapter_model.safetensors")
        assert any(x.abs().max() > 1e-4 for name, x in adapter.items() if "lora_B" in name) # zero before training
    assert len(losses["ddp"]) == 2 and losses["fsdp2"] == pytest.approx(losses["ddp"], abs=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_files(stage, tmp_path, monkeypatch):
    "By accelerate's parser always; filled in by transformers and read by DeepSpeed itself where it is installed."
    monkeypatch.chdir(ROOT)
    accelerate = yaml.safe_load(Path(f"configs/deepspeed_zero{stage}.yaml").read_text())
    file = accelerate["deepspeed_config"]["deepspeed_config_file"]
    settings = json.loads(Path(file).read_text())
    assert accelerate["distributed_type"] == "DEEPSPEED" and settings["zero_optimization"]["stage"] == stage
    from accelerate.utils.deepspeed import HfDeepSpeedConfig
    config = HfDeepSpeedConfig(file)
    assert config.is_zero3() == (stage == 3) and config.is_zero2() == (stage == 2) and config.get_value("zero_optimization.overlap_comm")
    pytest.importorskip("deepspeed")
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
    from revela_nb.trainer import RevelaArguments
    filled = HfTrainerDeepSpeedConfig(dict(settings)) # fills in what is "auto", as Trainer does
    args = RevelaArguments(output_dir=str(tmp_path), use_cpu=True, gradient_accumulation_steps=8)
    filled.trainer_config_process(args)
    assert (filled.config["train_micro_batch_size_per_gpu"], filled.config["gradient_accumulation_steps"], filled.config["gradient_clipping"]) == (1, 8, 1.0)
    own = {k: v for k, v in filled.config.items() if v != "auto"}
    own["zero_optimization"] = {k: v for k, v in own["zero_optimization"].items() if v != "auto"} # buckets follow the model's width
    from deepspeed.runtime.config import DeepSpeedConfig
    parsed = DeepSpeedConfig(own)
    assert parsed.zero_optimization_stage == stage and parsed.zero_enabled and parsed.train_micro_batch_size_per_gpu == 1 and parsed.gradient_accumulation_steps == 8
