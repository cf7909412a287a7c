"""Every recipe in configs/ runs, on a shrunken random model of its architecture; every engine's file is read by that engine."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from revela_nb.cli import main
from revela_nb.checkpoints import last_checkpoint

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
    lines = [json.dumps(CHUNKS[i % 4:] + CHUNKS[:i % 4]) if i % 2 else json.dumps({"src": "stackoverflow", "text": CHUNKS}) for i in range(128)]
    (folder / "groups.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def shrink(recipe, hub):
    "The options of the command line that put local folders for hub names, two steps of two groups, and float32 on the CPU; everything else is the recipe's."
    return ["--groups", str(hub / "groups.jsonl"), "--retriever", str(hub / recipe["retriever"]), "--lm", str(hub / recipe["lm"]), "--lora", "2", "--max_steps", "2", "--gradient_accumulation_steps", "2", "--bf16", "false", "--use_cpu", "true", "--disable_tqdm", "true"]


def test_there_is_a_recipe_for_every_published_model():
    assert [p.stem for p in RECIPES] == sorted(f"{m}-{c}" for m in ("smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "llama-3.2-3b") for c in ("wiki", "code"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe(path, hub, tmp_path, capsys):
    recipe = yaml.safe_load(path.read_text())
    for name, value in dict(temperature=1e-4, lora=256, lora_alpha=64, lora_dropout=0.1, learning_rate=1e-4, warmup_steps=100, num_train_epochs=1, bf16=True, pooling="eos", value_norm="unit", lm="meta-llama/Llama-3.2-1B").items(): assert recipe[name] == value, name
    assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 32 and recipe["retriever"] in SHAPES
    assert recipe["groups"] == ("trumancai/revela_code_training_corpus" if path.stem.endswith("code") else "trumancai/revela_training_corpus")
    assert recipe.get("whole_query_sources") == (["stackoverflow"] if path.stem.endswith("code") else None) # of a post the authors' code keeps the whole chunk
    assert main(["train", "--config", str(path), "--output_dir", str(tmp_path / "run"), *shrink(recipe, hub)]) == 0
    out, err = capsys.readouterr()
    assert "after 2 steps" in out and "parameters trained" in err and "2 steps" in err
    assert ("whole chunk in 64 of 128 groups (source stackoverflow)" in err) == path.stem.endswith("code")
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-2"
    adapter = json.loads((tmp_path / "run/retriever/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"], len(adapter["target_modules"])) == (2, 64, 0.1, 7)


# ------------------------------------------------------------------ the plan of a sharded run

@pytest.mark.parametrize("engine,stage", [("ddp", 0), ("deepspeed_zero2", 2), ("deepspeed_zero3", 3), ("fsdp2", 3)])
def test_plan_counts_a_devices_part_and_refuses_it(tmp_path, monkeypatch, engine, stage):
    "With the environment that `accelerate launch` makes of our files: 4 devices hold what the arithmetic says, and a plan above a device's memory is refused whatever the engine."
    import test_trainer as toy
    from revela_nb.launch import plan_run, refuse_oversized, sharding_stage
    class Four(toy.RevelaArguments):
        world_size = property(lambda self: 4)
    args, model = Four(output_dir=str(tmp_path), use_cpu=True, max_steps=1), toy.make_model()
    whole = plan_run(model, args, toy.GROUPS, toy.COLLATOR, rate=1e9).memory
    file = yaml.safe_load((ROOT / "configs" / f"{engine}.yaml").read_text())
    if file["distributed_type"] == "FSDP": monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if file["distributed_type"] == "DEEPSPEED":
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(ROOT / file["deepspeed_config"]["deepspeed_config_file"]))
    plan = plan_run(model, args, toy.GROUPS, toy.COLLATOR, rate=1e9)
    parameters, tables = (4 * sum(p.numel() for p in x) for x in (model.parameters(), [model.lm.model.embed_tokens.weight, model.retriever.encoder.embed_tokens.weight]))
    spared = {0: 0, 2: 3 * parameters * 3 / 4, 3: 4 * parameters * 3 / 4 - tables * 3 / 4}[stage]
    assert sharding_stage(args) == stage and plan.memory == pytest.approx(whole - spared)
    refuse_oversized(plan, args)
    plan.available = plan.memory - 1
    with pytest.raises(MemoryError, match="activation_checkpointing"): refuse_oversized(plan, args)
    args.activation_checkpointing, plan.frozen = True, {"retriever": 1}
    with pytest.raises(MemoryError, match="more devices" if stage == 3 else "configs/fsdp2.yaml"): refuse_oversized(plan, args)


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    from revela_nb.launch import device_memory
    cpu = torch.device("cpu")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = device_memory(cpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device_memory(cpu) == alone / 4


# ------------------------------------------------------------------ engines

def train_all(engine, commands):
    """In each of the processes that `accelerate launch` starts: `revela train` once for every command, by this engine.

    accelerate takes FSDP and DeepSpeed only with an accelerator, and falls back to DDP on a CPU without a word. So two of its methods are replaced: with gloo and the CPU it goes the way
    that it goes with nccl and GPUs. The engines themselves (torch's fully_shard, DeepSpeed) are untouched, and what runs is asserted."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import FSDPModule
    from transformers.modeling_layers import GradientCheckpointingLayer
    import revela_nb.launch as launch
    if engine != "ddp":
        PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
        PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    class Look(launch.StopOnSignal):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            kinds = {type(p).__name__ for p in model.parameters()} | {"partitioned" for p in model.parameters() if hasattr(p, "ds_status")}
            Path(args.output_dir, f"engine{args.process_index}.json").write_text(json.dumps({"engine": args.distributed_state.distributed_type.value, "world": args.world_size, "parameters": sorted(kinds),
                                                                                         "shards": sum(isinstance(m, FSDPModule) for m in model.modules()), "layers": sum(isinstance(m, GradientCheckpointingLayer) for m in model.modules())}))
            return super().on_step_end(args, state, control, **kwargs)
    launch.StopOnSignal = Look
    for words in commands: assert main([*words, "--verbose"]) == 0


def launch(engine, folder, *commands):
    "`accelerate launch` with our file, on two CPU processes."
    accelerate = yaml.safe_load((ROOT / "configs" / f"{engine}.yaml").read_text()) | {"num_processes": 2, "main_process_port": 0}
    if "mixed_precision" in accelerate: accelerate["mixed_precision"] = "no" # DeepSpeed has it in its own file
    (folder / "engine.yaml").write_text(yaml.safe_dump(accelerate))
    (folder / "commands.json").write_text(json.dumps(commands))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "engine.yaml"), __file__, engine, str(folder / "commands.json")], env=env, capture_output=True, text=True, timeout=170, cwd=ROOT)
    assert done.returncode == 0, done.stderr.split("torch/distributed/elastic")[0][-4000:]
    return done


ENGINE_SAYS = {"ddp": ("MULTI_CPU", ["Parameter"]), "fsdp2": ("FSDP", ["DTensor"]), "deepspeed_zero2": ("DEEPSPEED", ["Parameter"]), "deepspeed_zero3": ("DEEPSPEED", ["Parameter", "partitioned"])}


def check_engine(engine, run):
    "The engine that we asked for, on both processes; and a retriever that can be used, with an adapter that has moved."
    from revela_nb.retriever import Retriever
    for rank in (0, 1):
        seen = json.loads((run / f"engine{rank}.json").read_text())
        assert (seen["engine"], seen["parameters"], seen["world"]) == (*ENGINE_SAYS[engine], 2)
        assert seen["shards"] == (seen["layers"] + 1 if engine == "fsdp2" else 0) and seen["layers"] >= 4 # every layer of both models, and the rest
    assert Retriever.from_pretrained(run / "retriever").encode_passages(CHUNKS, progress=False).isfinite().all()
    adapter = load_file(run / "retriever/adapter_model.safetensors")
    assert any(x.abs().max() > 0 for name, x in adapter.items() if "lora_B" in name) # zero before training
    return adapter


def test_every_recipe_under_fsdp2(hub, tmp_path):
    "Two gloo processes, weights in shards."
    commands = [["train", str(path), "--output_dir", str(tmp_path / path.stem), *shrink(yaml.safe_load(path.read_text()), hub), "--use_cpu", "false", "--warmup_steps", "0", "--temperature", "0.05"] for path in RECIPES]
    launch("fsdp2", tmp_path, *commands)
    for path in RECIPES: check_engine("fsdp2", tmp_path / path.stem)


@pytest.fixture(scope="module")
def beir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beir")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": f"d{i}", "title": "", "text": text}) + "\n" for i, text in enumerate(CHUNKS)))
    (folder / "queries.jsonl").write_text("".join(json.dumps({"_id": f"q{i}", "text": text[:12]}) + "\n" for i, text in enumerate(CHUNKS)))
    (folder / "qrels").mkdir()
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(len(CHUNKS))))
    return folder


def engine_run(engine, hub, beir, folder):
    "Four steps, broken off after two by a lost checkpoint, with evaluation: losses, retrieval figures, adapter."
    if engine.startswith("deepspeed"): pytest.importorskip("deepspeed")
    path = ROOT / "configs" / "smollm2-135m-wiki.yaml"
    options = ["--logging_steps", "1", "--warmup_steps", "0", "--learning_rate", "0.01", "--lora_dropout", "0", "--temperature", "0.05", "--max_grad_norm", "0", "--lr_scheduler_type", "constant",
               "--eval_beir", str(beir), "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2", "--gather_chunks", "true"]
    command = ["train", str(path), "--output_dir", str(folder / "run"), *shrink(yaml.safe_load(path.read_text()), hub), "--use_cpu", str(engine == "ddp"), "--max_steps", "4", *options]
    launch(engine, folder, command)
    first = check_engine(engine, folder / "run")
    for where in ("retriever", "checkpoint-4"): shutil.rmtree(folder / "run" / where)
    launch(engine, folder, command) # goes on from step 2
    adapter, lines = check_engine(engine, folder / "run"), [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    for name in first: torch.testing.assert_close(adapter[name], first[name], atol=1e-5, rtol=0)
    return [r["loss"] for r in lines if "loss" in r], [r["eval_ndcg@10"] for r in lines if "eval_ndcg@10" in r], adapter


@pytest.fixture(scope="module")
def ddp_run(hub, beir, tmp_path_factory): return engine_run("ddp", hub, beir, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_engines_train_alike(engine, hub, beir, ddp_run, tmp_path):
    "Sharded or whole, one group over both processes, broken off and resumed: the same losses, figures and adapter."
    losses, figures, adapter = engine_run(engine, hub, beir, tmp_path)
    assert len(losses) == 4 and losses == pytest.approx(ddp_run[0], abs=1e-4) and losses[-1] < losses[0]
    assert len(figures) == 2 and figures == pytest.approx(ddp_run[1], abs=1e-6)
    assert adapter.keys() == ddp_run[2].keys()
    for name in adapter: torch.testing.assert_close(adapter[name], ddp_run[2][name], atol=1e-4, rtol=0)


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


if __name__ == "__main__": train_all(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
