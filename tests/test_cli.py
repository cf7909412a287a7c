"""The command `revela` end to end: what it prints, what it writes, and how it refuses."""
import io, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
import pytrec_eval

from revela_nb.cli import build_parser, main
from revela_nb.options import apply_config, read_config
from revela_nb.training import TrainOptions, check_run, read_groups, write_groups

ROOT = Path(__file__).parents[1]
SCIFACT = ROOT.parent / "shared" / "data" / "scifact"
SIX_CHUNKS = ["The cat sat on the warm mat. It purred.", "A cat purrs when it is warm and calm.", "Dogs bark at cats that sit on mats.",
              "Python lists grow with append. A list keeps order.", "Append adds one item to the end of a list.", "A tuple is a list that cannot grow."]
TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, bos_token_id=None)
TRAIN = dict(max_length=24, max_steps=4, save_steps=2, logging_steps=1, warmup_steps=0, learning_rate=1e-3, use_cpu=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A tiny random Llama, and a Bloom, whose attention cannot be patched."
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed
    set_seed(0)
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "revela_nb" / "backbone")
    ids = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    LlamaForCausalLM(LlamaConfig(**TINY, **ids)).save_pretrained(folder / "llama")
    BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=2, **ids)).save_pretrained(folder / "bloom")
    for name in ("llama", "bloom"): tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def other_model(tmp_path):
    "A tiny SmolLM3 that reads words, not the backbone's pieces."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate("<pad> <eos> <unk> a the cat sat ran rain fell".split())}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    SmolLM3ForCausalLM(SmolLM3Config(**TINY, vocab_size=10, pad_token_id=0)).save_pretrained(tmp_path / "other")
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>").save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    "No test touches the user's cache."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def notes(tmp_path, monkeypatch):
    "A folder of good and bad files; the test runs beside it."
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "pets.md").write_text("# Pets\n\n" + "\n\n".join(SIX_CHUNKS[:3]))
    (folder / "deep" / "lists.txt").write_text("\n\n".join(SIX_CHUNKS[3:]))
    (folder / "rows.jsonl").write_text('{"_id": "r1", "text": "A row about rivers and the boats on them."}\nbroken {\n{"_id": "r1", "text": "same id"}\n{"_id": "r2", "text": ""}\n')
    (folder / "latin1.txt").write_bytes("café".encode("latin-1"))
    (folder / "empty.md").write_text("")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture
def beir(tmp_path, monkeypatch):
    "A BEIR folder of six documents and two questions."
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": f"d{i}", "title": "", "text": t}) + "\n" for i, t in enumerate(SIX_CHUNKS)))
    (folder / "queries.jsonl").write_text('{"_id": "q0", "text": "where do cats purr"}\n{"_id": "q1", "text": "add an item at the end"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq0\td1\t2\nq1\td4\t1\n")
    return folder


def tree(folder): return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*"))


def run_process(*words, **kw):
    return subprocess.run([sys.executable, "-m", "revela_nb.cli", *words], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, **kw)


def ndcg(run_file, qrels_file):
    "pytrec_eval's nDCG@10, with nothing of ours in between."
    run, qrels = {}, {}
    for line in Path(run_file).read_text().splitlines():
        query, _, document, _, score, _ = line.split()
        run.setdefault(query, {})[document] = float(score)
    for line in Path(qrels_file).read_text().splitlines()[1:]:
        query, document, score = line.split("\t")
        qrels.setdefault(query, {})[document] = int(score)
    scores = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
    return sum(s["ndcg_cut_10"] for s in scores.values()) / len(qrels)


def test_help_and_version(capsys):
    for words in (["--help"], *([c, "--help"] for c in ("demo", "prepare", "train", "evaluate", "search", "serve", "export", "bench"))):
        assert main(words) == 0
        said = capsys.readouterr().out
        assert "revela" in said and (words == ["--help"] or "examples:\n  revela " + words[0] in said)
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("revela 0.")


def test_module_is_the_command_and_help_is_light(tmp_path):
    done = run_process("--help", cwd=tmp_path)
    assert done.returncode == 0 and "evaluate" in done.stdout and done.stderr == ""
    code = "import sys; from revela_nb.cli import main; main(['--help']); sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0
    done = run_process("prepare", "nowhere/", "--out", "groups.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("revela: error: ") and done.stderr.count("\n") == 1 and tree(tmp_path) == []


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_prepare_good_and_bad_files(notes, capsys, suffix):
    words = ["prepare", "notes", "--out", f"out/groups{suffix}", "--max-words", "10", "--group-size", "3", "--run-length", "1"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    groups = read_groups(f"out/groups{suffix}")
    assert tree("out") == [f"groups{suffix}"] and all(len(texts) == 3 for texts in groups["texts"])
    assert f"{len(groups)} groups of 3" in out and "3 documents -> " in err
    for named in ("latin1.txt", "empty.md", "rows.jsonl, line 2", "r1", "r2", "picture.png"): assert named in err
    first = groups[:]
    assert main(words) == 0 and read_groups(f"out/groups{suffix}")[:] == first
    assert main([*words, "--seed", "5"]) == 0 and read_groups(f"out/groups{suffix}")[:] != first


def test_groups_file_faults_name_file_and_line(tmp_path):
    cases = {"": "no group", '["a", "b"]\n["a"\n': "line 2: not JSON", '["a", "b"]\n\n["a", "b", "c"]\n': "line 3: 3 texts", '{"texts": ["a", 1]}\n': "line 1: a group", "7\n": "line 1: a group",
             '["a", "\xff"]\n'.encode("latin-1"): "line 1: not JSON"}
    for content, message in cases.items():
        (tmp_path / "groups.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=message): read_groups(tmp_path / "groups.jsonl")
    (tmp_path / "groups.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="groups.parquet"): read_groups(tmp_path / "groups.parquet")
    with pytest.raises(FileNotFoundError): read_groups(tmp_path / "missing.jsonl")


def test_interrupted_write_leaves_the_old_file(tmp_path):
    from datasets import Dataset
    (tmp_path / "groups.jsonl").write_text("old")

    class Interrupting:
        def __iter__(self):
            yield {"ids": ["a", "b"], "texts": ["a", "b"]}
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_groups(Interrupting(), tmp_path / "groups.jsonl")
    assert tree(tmp_path) == ["groups.jsonl"] and (tmp_path / "groups.jsonl").read_text() == "old"


def refused(capsys, words, *messages):
    "Status 2, one line on standard error after the news, no traceback, nothing on standard output."
    before = tree(".")
    assert main(words) == 2
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert last.startswith("revela: error: ") and "Traceback" not in err and err.count("revela: error:") == 1 and out == ""
    for message in messages: assert message in last
    assert tree(".") == before


class Terminal(io.StringIO):
    "Standard error as somebody sees it who watches."
    def isatty(self): return True


IMPORTED = """
import sys
from revela_nb.cli import main
status = main(sys.argv[1:])
sys.exit(10 * status + any(name in sys.modules for name in ("torch", "transformers", "datasets")))
"""


@pytest.mark.parametrize("line, message", [
    ("train --corpus no/such/folder --output_dir x", "no/such/folder"), ("train missing.yaml", "missing.yaml"), ("train there.yaml --lm ./lm", "./lm"),
    ("train --corpus . --output_dir x --value_norm l1", "choose from 'unit', 'rescaled', 'none'"), ("train --corpus .", "--output_dir"), ("train --output_dir x", "--groups"),
    ("train --groups g.jsonl --output_dir x", "there is no file 'g.jsonl'"), ("search no/such/model --corpus . q", "no/such/model"), ("search bm25 --corpus ./no q", "./no"),
    ("search bm25 --corpus . ' '", "query is empty"), ("serve bm25 --corpus . --host 0.0.0.0", "this machine only"), ("evaluate bm25 --data nowhere", "nowhere"),
    ("evaluate no/such/model --data .", "no/such/model"), ("evaluate bm25", "--data"), ("prepare no/notes.txt --out g.jsonl", "no/notes.txt"), ("export no/such/model --out x", "no/such/model"),
    ("export . --out .", "--overwrite")])
def test_refused_before_heavy_imports(tmp_path, line, message):
    "Somebody who mistypes a path need not wait for torch to hear of it."
    import shlex
    (tmp_path / "there.yaml").write_text("corpus: .\noutput_dir: x\nlearning_rate: 1e-3\n")
    done = subprocess.run([sys.executable, "-c", IMPORTED, *shlex.split(line)], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 20, done.stderr
    assert done.stderr.startswith("revela: error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_early_check_leaves_to_others_what_it_does_not_know(tmp_path, monkeypatch):
    "Names on the hub, transformers' options, a file that may stand anywhere: nothing is refused that may be right."
    from revela_nb.options import check_training
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("corpus: .\nmax_steps: 3\ntemprature: 1\n")
    Path("deep.json").write_text("{}")
    for line in ("--corpus name/on-the-hub --output_dir x", "--corpus python:stdlib --output_dir x", "--retriever HuggingFaceTB/SmolLM2-135M --corpus . --output_dir x", "-v a.yaml", "--deepspeed deep.json",
                 "a.yaml --deepspeed deep.json", "--max_steps 3 a.yaml", "--config a.yaml --output_dir x", "--groups trumancai/revela_training_corpus --output-dir x --dual_loss", "--temprature 1"):
        check_training(line.split())


def test_choices_are_those_of_the_method():
    from dataclasses import fields
    from revela_nb.attention import VALUE_NORMS
    from revela_nb.batching import STRATEGIES
    choices = {item.name: item.metadata["choices"] for item in fields(TrainOptions) if "choices" in item.metadata}
    assert choices == {"value_norm": list(VALUE_NORMS), "strategy": list(STRATEGIES), "pooling": ["eos", "mean"], "lora_on": ["both", "retriever", "lm"]}


def test_nearest_name_is_suggested(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(capsys, ["serch", "bm25"], "did you mean search?")
    refused(capsys, ["train", "--corpus", ".", "--output_dir", "x", "--temprature", "1"], "--temprature; did you mean --temperature?")
    refused(capsys, ["train", "--corpus", ".", "--output_dir", "x", "--value_norm", "rescale"], "did you mean rescaled?")
    refused(capsys, ["export", ".", "--out", "x", "--format", "pefft"], "did you mean peft?")
    refused(capsys, ["search", "bm25", "--corpus", ".", "a question", "--interactiv3"], "did you mean --interactive?")
    assert main(["search", "bm25", "--corpus", ".", "q", "--zzz"]) == 2 and "did you mean" not in capsys.readouterr().err


def test_bad_corpus_is_refused(notes, capsys):
    Path("bare").mkdir()
    refused(capsys, ["prepare", "missing/notes.txt", "--out", "g.jsonl"], "missing/notes.txt")
    refused(capsys, ["prepare", "bare", "--out", "g.jsonl"], "bare", "no usable document")
    refused(capsys, ["prepare", "notes", "--out", "g.jsonl"], "do not fill one group of 16")
    refused(capsys, ["prepare", "notes", "--out", "g.csv"], "g.csv", ".jsonl or .parquet")
    refused(capsys, ["prepare", "notes", "--out", "g.jsonl", "--group-size", "3"], "run_length")
    refused(capsys, ["prepare", "notes", "--out", "g.jsonl", "--group-size", "three"], "--group-size", "three")
    refused(capsys, ["prepare", "notes", "--out", "notes/pets.md/g.jsonl", "--max-words", "10", "--group-size", "2", "--run-length", "1"], "notes/pets.md")
    refused(capsys, ["prepare"], "source")
    refused(capsys, ["unheard-of"], "unheard-of")
    refused(capsys, [], "COMMAND")


def test_bad_config_is_refused(notes, capsys):
    cases = {"output_dir: [x": ("not YAML",), "corpus: notes\ntemprature: 1": ("temprature", "temperature"), "- a\n- b": ("name: value",), "max_steps: many": ("max_steps", "many"),
             "output_dir: out": ("--corpus", "--groups"), "corpus: notes": ("--output_dir",), "corpus: notes\ngroups: g.jsonl\noutput_dir: out": ("--corpus", "--groups"), "run: 1": ("'run'",)}
    for text, messages in cases.items():
        Path("c.yaml").write_text(text)
        refused(capsys, ["train", "c.yaml"], *messages, *(["c.yaml"] if ":" in messages[0] or "not" in messages[0] or "temp" in messages[0] or "max" in messages[0] else []))
    Path("c.json").write_text('{"corpus": ')
    refused(capsys, ["train", "c.json"], "c.json", "not JSON")
    refused(capsys, ["train", "missing.yaml"], "missing.yaml")
    refused(capsys, ["train", "notes/pets.md"], ".yaml")
    refused(capsys, ["train", "--temprature", "1"], "temprature")


def test_config_under_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 3e-4\nmax_steps: -1\ndual_loss: true\ntemperature: 1\nlr_scheduler_kwargs: {a: 1}\nlora: null\n")
    parser = build_parser()
    train = parser.parse_args(["train"]).parser
    apply_config(train, path)
    args = parser.parse_args(["train", "--temperature", "0.5"])
    assert (args.learning_rate, args.max_steps, args.dual_loss, args.temperature, args.lora) == (3e-4, -1, True, 0.5, None)
    assert json.loads(args.lr_scheduler_kwargs) == {"a": 1}
    (tmp_path / "c.json").write_text('{"learning_rate": 0.1}')
    assert read_config(tmp_path / "c.json") == {"learning_rate": .1}


def test_no_option_twice():
    from dataclasses import fields
    from revela_nb.trainer import RevelaArguments
    assert not {f.name for f in fields(TrainOptions)} & {f.name for f in fields(RevelaArguments)}


def write_config(path, **values):
    Path(path).write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))


@pytest.fixture
def config(notes, models):
    write_config("train.yaml", corpus="notes", retriever=str(models / "llama"), output_dir="out", max_words=10, group_size=3, run_length=1, **TRAIN)
    return "train.yaml"


def test_train_twice_resume_and_other_options(config, capsys, models):
    import torch
    from safetensors.torch import load_file
    assert main(["train", config]) == 0
    assert capsys.readouterr().out == "out/retriever: the trained retriever after 4 steps\n"
    record, weights = json.loads(Path("out/revela_run.json").read_text()), load_file("out/retriever/model.safetensors")
    assert record["max_length"] == 24 and record["temperature"] == 0.02 and Path("out/retriever/tokenizer.json").exists()
    start = load_file(models / "llama" / "model.safetensors")
    assert any(not torch.equal(start[f"model.{n}"], w) for n, w in weights.items())
    assert main(["train", config]) == 0 and "finished" in capsys.readouterr().out
    refused(capsys, ["train", config, "--temperature", "0.05"], "temperature: 0.02 there, 0.05 now", "output_dir")
    Path("notes/more.txt").write_text("Another text about something else. It has two sentences in it.")
    refused(capsys, ["train", config], "training data")
    Path("notes/more.txt").unlink()
    for folder in ("retriever", "checkpoint-4"): shutil.rmtree(f"out/{folder}")
    assert main(["train", config, "--logging_steps", "2"]) == 0
    out, err = capsys.readouterr()
    assert "checkpoint-2" in err and out == "out/retriever: the trained retriever after 4 steps\n"
    again = load_file("out/retriever/model.safetensors")
    assert all(torch.equal(again[n], w) for n, w in weights.items())


def read_events(folder, name):
    "(step, value) pairs in TensorBoard's event files: each record is a length, its checksum, an Event and its checksum."
    try: from tensorboard.compat.proto.event_pb2 import Event
    except ImportError: Event = pytest.importorskip("tensorboardX.proto.event_pb2", reason="needs tensorboard or tensorboardX").Event
    pairs = []
    for path in sorted(Path(folder).rglob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12:12 + size]), data[size + 16:]
            pairs += [(event.step, value) for value in event.summary.value if value.tag == name]
    return pairs


def read_scalar(folder, name): return [(step, value.simple_value) for step, value in read_events(folder, name)]


def test_train_reports_to_tensorboard(config, capsys):
    "What the log file says of the in-batch gain is what TensorBoard shows, step by step; without the option there is no event file."
    read_scalar(".", "train/gain") # skips where no library reads event files
    assert main(["train", config, "--report_to", "tensorboard", "--learning_rate", "1e-2"]) == 0
    logged = [(line["step"], line["gain"]) for line in map(json.loads, Path("out/log.jsonl").read_text().splitlines()) if "gain" in line]
    found = read_scalar("out", "train/gain")
    assert [step for step, _ in found] == [1, 2, 3, 4] and any(value != 0 for _, value in found)
    assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged] # an event holds a float32
    assert main(["train", config, "--output_dir", "quiet"]) == 0 and read_scalar("quiet", "train/gain") == []


def test_similarity_histogram_reaches_log_and_tensorboard(config, capfd):
    "20 counts a line, of all pairs of a group of three; TensorBoard has the same ones, and neither the terminal's line nor a warning speaks of them."
    read_events(".", "train/similarity") # skips where no library reads event files
    assert main(["train", config, "--report_to", "tensorboard", "--logging_steps", "2"]) == 0
    assert "histogram" not in capfd.readouterr().err
    lines = [line for line in map(json.loads, Path("out/log.jsonl").read_text().splitlines()) if "loss" in line]
    assert [len(line["similarity_histogram"]) for line in lines] == [20, 20] and [sum(line["similarity_histogram"]) for line in lines] == [2 * 3 * 2] * 2
    events = read_events("out", "train/similarity")
    assert [step for step, _ in events] == [2, 4]
    for line, (_, value) in zip(lines, events):
        shown = {round(limit, 3): count for limit, count in zip(value.histo.bucket_limit, value.histo.bucket) if count}
        assert shown == {round(-0.9 + 0.1 * i, 3): n for i, n in enumerate(line["similarity_histogram"]) if n}
        mean = value.histo.sum / value.histo.num
        assert value.histo.num == 12 and abs(mean - line["similarity_mean"]) <= 0.05 # half a bin


def test_train_refuses_models_and_folders(config, capsys, models):
    refused(capsys, ["train", config, "--retriever", str(models / "bloom")], "Bloom")
    refused(capsys, ["train", config, "--lm", str(models / "bloom")], "Bloom")
    refused(capsys, ["train", config, "--retriever", "notes"], "notes")
    refused(capsys, ["train", config, "--lm", "no/such/model"], "no/such/model")
    refused(capsys, ["train", config, "--pooling", "max"], "pooling")
    refused(capsys, ["train", config, "--temperature", "0"], "temperature")
    refused(capsys, ["train", config, "--value_norm", "l1"], "value_norm")
    refused(capsys, ["train", config, "--eval_beir", "notes", "--eval_strategy", "epoch"], "notes")
    refused(capsys, ["train", config, "--eval_beir", "notes"], "eval_strategy")
    refused(capsys, ["train", config, "--learn_temperature", "--temperature_end", "0.01"], "learn_temperature", "temperature_end", "not both")
    refused(capsys, ["train", config, "--patience", "2"], "--eval_beir")
    refused(capsys, ["train", config, "--patience", "2", "--eval_beir", "notes"], "eval_strategy")
    refused(capsys, ["train", config, "--patience", "2", "--eval_beir", "notes", "--eval_strategy", "steps", "--eval_steps", "3"], "--save_steps 3 instead of --save_steps 2")
    refused(capsys, ["train", config, "--metric_for_best_model", "ndgc@10", "--eval_beir", "notes", "--eval_strategy", "epoch"], "ndgc@10", "mrr@10")
    refused(capsys, ["train", config, "--output_dir", "notes"], "notes")
    refused(capsys, ["train", config, "--output_dir", "notes/pets.md"], "pets.md")


def test_train_shows_what_it_does_to_somebody_who_watches(config, capsys, monkeypatch):
    "In a terminal: the imports, reading, cutting, the models and step 0 are there before the first log line; a run that is all warm-up is told so."
    monkeypatch.setattr(sys, "stderr", seen := Terminal())
    assert main(["train", config, "--warmup_steps", "9", "--logging_steps", "2"]) == 0
    said = seen.getvalue()
    places = [said.index(part) for part in ("loading torch", "reading: ", "cutting: ", "loading the models", "warning: 9 steps of warm-up in a run of 4", "training on", "0/4 ", "loss=")]
    assert places == sorted(places)
    assert main(["train", config, "--output_dir", "again"]) == 0 and "warm-up" not in seen.getvalue()[len(said):]
    assert "torch" in json.loads(Path("out/revela_run.json").read_text())["versions"]


def test_no_bar_for_nobody(notes, capsys):
    assert main(["search", "bm25", "--corpus", "notes", "cats"]) == 0
    assert "reading" not in (err := capsys.readouterr().err) and "loading torch" in err


def test_a_run_may_have_been_begun_with_other_versions(tmp_path):
    (tmp_path / "revela_run.json").write_text('{"seed": 1, "versions": {"torch": "1.0"}}')
    assert check_run(tmp_path, {"seed": 1}) == "started"


def test_train_on_groups_with_lora_and_evaluation(notes, beir, models, capsys):
    assert main(["prepare", "notes", "--out", "g.jsonl", "--max-words", "10", "--group-size", "3", "--run-length", "1"]) == 0
    write_config("t.json.yaml", groups="g.jsonl", retriever=str(models / "llama"), output_dir="lora", lora=2, eval_beir="beir", dual_loss=True, **(TRAIN | {"max_steps": 2}))
    assert main(["train", "t.json.yaml", "--eval_strategy", "steps", "--eval_steps", "1"]) == 0
    assert Path("lora/retriever/adapter_model.safetensors").exists()
    capsys.readouterr()
    assert main(["evaluate", "lora/retriever", "--data", "beir", "--run-file", "run.trec"]) == 0
    assert f"nDCG@10     {ndcg('run.trec', 'beir/qrels/test.tsv'):.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["both", "retriever", "lm"])
def test_lora_on_either_model(models, other_model, part):
    "An adapter on one model; of the other, whose tokenizer may be another one, all weights train."
    from peft import PeftModel
    from revela_nb.training import TrainOptions, build_training
    model, collator = build_training(TrainOptions(retriever=str(models / "llama"), lm=str(other_model), lora=2, lora_on=part, max_length=16))
    adapted = {name: isinstance(x, PeftModel) for name, x in (("retriever", model.retriever.encoder), ("lm", model.lm))}
    assert adapted == {name: part in ("both", name) for name in adapted}
    batch = collator([{"texts": ["a cat sat", "the cat ran", "rain fell"]}])
    assert batch["input_ids"].tolist() == [[3, 5, 6], [4, 5, 7], [8, 9, 0]]             # the language model's own words
    model(**batch).loss.backward()
    for name, x in (("retriever", model.retriever), ("lm", model.lm)):
        trained = [n for n, p in x.named_parameters() if p.grad is not None and p.grad.any()]
        assert trained and all("lora" in n for n in trained) == adapted[name]


def test_the_best_is_judged_by_ndcg_where_no_metric_is_named(config, beir, capsys):
    words = ["--max_steps", "2", "--load_best_model_at_end", "true", "--eval_beir", "beir", "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
    assert main(["train", config, *words]) == 0
    assert "the best, of step " in capsys.readouterr().out
    assert json.loads(Path("out/checkpoint-2/trainer_state.json").read_text())["best_metric"] is not None


def test_patience_stops_keeps_the_best_and_survives_a_kill(config, beir, capsys, monkeypatch):
    "nDCG@10 is best at step 2 and patience 2: the run stops after step 4, and what is saved is the retriever of step 2; also where it is killed in step 4, and where it is killed after it."
    import torch
    from safetensors.torch import load_file
    import revela_nb.training as training
    scores = {1: 0.2, 2: 0.3, 3: 0.1, 4: 0.25, 5: 0.9, 6: 0.9}
    def scripted(kill_at=None):
        def figures(retriever):
            steps.append(1 + max((int(p.name.split("-")[1]) for p in Path(out).glob("checkpoint-*")), default=0))
            if steps[-1] == kill_at: raise KeyboardInterrupt
            return {"ndcg@10": scores[steps[-1]]}
        monkeypatch.setattr(training, "beir_evaluation", lambda folder: figures)
        steps = []
        return steps
    words = ["train", config, "--max_steps", "8", "--patience", "2", "--eval_beir", "beir", "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
    out, steps = "out", scripted()
    assert main(words) == 0 and steps == [1, 2, 3, 4]
    assert "after 4 steps, the best, of step 2" in capsys.readouterr().out
    kept, best, last = (load_file(f"out/{name}/model.safetensors") for name in ("retriever", "checkpoint-2", "checkpoint-4"))
    assert all(torch.equal(x, best[f"retriever.encoder.{n}"]) for n, x in kept.items())
    assert not all(torch.equal(x, last[f"retriever.encoder.{n}"]) for n, x in kept.items())
    def same(folder): return all(torch.equal(x, kept[n]) for n, x in load_file(f"{folder}/retriever/model.safetensors").items())
    out, steps = "killed", scripted(kill_at=4)
    assert main([*words, "--output_dir", out]) != 0 and not Path("killed/retriever").exists()
    steps = scripted()
    assert main([*words, "--output_dir", out]) == 0 and steps == [4] and same(out)
    shutil.rmtree("out/retriever") # killed after the last evaluation, before the retriever was there
    out, steps = "out", scripted()
    assert main(words) == 0 and steps == [] and same("out") and not Path("out/checkpoint-5").exists()


def test_killed_run_goes_on(config):
    "SIGKILL after the first checkpoint; the same command ends with the weights of the uninterrupted run."
    import torch
    from safetensors.torch import load_file
    words = ["train", config, "--max_steps", "40"]
    assert main([*words, "--output_dir", "whole"]) == 0
    process = subprocess.Popen([sys.executable, "-m", "revela_nb.cli", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})
    for _ in range(12000): # two minutes, for a busy machine
        if Path("out/checkpoint-2").exists() or process.poll() is not None: break
        time.sleep(.01)
    process.send_signal(signal.SIGKILL); process.wait()
    assert Path("out/checkpoint-2").exists() and not Path("out/retriever").exists() # it was broken off indeed
    assert main(words) == 0
    whole, resumed = (load_file(f"{folder}/retriever/model.safetensors") for folder in ("whole", "out"))
    assert all(torch.equal(whole[n], w) for n, w in resumed.items())


def test_evaluate_bm25_and_run_file(beir, capsys):
    assert main(["evaluate", "bm25", "--data", "beir", "--run-file", "runs/bm25.trec", "--json", "figures.json"]) == 0
    out = capsys.readouterr().out
    expected = ndcg("runs/bm25.trec", "beir/qrels/test.tsv")
    assert json.loads(Path("figures.json").read_text())["ndcg@10"] == pytest.approx(expected, abs=1e-12)
    assert f"nDCG@10     {expected:.4f}" in out and "Recall@100" in out and "MRR@10" in out


def test_evaluate_keeps_embeddings(beir, models, capsys, monkeypatch):
    "With --cache a second run gives the same figures and encodes nothing, neither passages nor questions; a new document alone is encoded."
    from revela_nb.retriever import Retriever
    words = ["evaluate", str(models / "llama"), "--data", "beir", "--cache", "kept"]
    assert main(["evaluate", str(models / "llama"), "--data", "beir"]) == 0
    plain = capsys.readouterr().out
    assert main(words) == 0 and capsys.readouterr().out == plain
    seen = []
    for name in ("encode_passages", "encode_queries"):
        def spy(self, texts, *rest, encode=getattr(Retriever, name), **named):
            seen.extend(texts)
            return encode(self, texts, *rest, **named)
        monkeypatch.setattr(Retriever, name, spy)
    assert main(words) == 0 and capsys.readouterr().out == plain and seen == []
    with open("beir/corpus.jsonl", "a") as file: file.write('{"_id": "d6", "title": "", "text": "A boat on a river."}\n')
    assert main(words) == 0 and seen == ["A boat on a river."]


def test_prepare_refuses_what_a_file_cannot_have(notes, capsys):
    words = ["prepare", "notes", "--out", "groups.jsonl", "--max-words", "10", "--group-size", "3", "--run-length", "1"]
    refused(capsys, [*words, "--near", "0.5", "--min-words", "2"], "--min-words, --near")
    refused(capsys, [*words, "--strategy", "cluster"], "--out FOLDER")
    refused(capsys, [*words, "--strategy", "magic"], "magic")
    assert not Path("groups.jsonl").exists()
    said = main(["prepare", "--help"]) or capsys.readouterr().out
    assert all(name in said for name in ("document", "bm25", "cluster", "remine", "random"))


def test_config_may_stand_anywhere(tmp_path, monkeypatch):
    from revela_nb.cli import parse_arguments
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("corpus: notes\ntemperature: 0.5\nmax_steps: 7\n")
    for words in ("train a.yaml --max_steps 3 --output_dir x", "train --max_steps 3 a.yaml --output_dir x", "train --max_steps 3 --output_dir x a.yaml", "train --config a.yaml --max_steps 3 --output_dir x"):
        args = parse_arguments(words.split())
        assert (args.temperature, args.max_steps, args.output_dir, args.corpus) == (0.5, 3, "x", "notes"), words
    for words in ("train a.yaml b.yaml", "train --max_steps 3 a.yaml b.yaml", "train --no_such_option", "search bm25 --corpus x q a.yaml", "train a.yaml --max_steps 3 --temprature 1"):
        with pytest.raises(ValueError, match="unrecognized arguments"): parse_arguments(words.split())


def test_evaluate_by_two_processes_prints_and_writes_once(beir, models, capsys):
    "`accelerate launch`: each process encodes its share into the cache; the figures are those of one process."
    model = str(models / "llama")
    assert main(["evaluate", model, "--data", "beir", "--run-file", "one.trec"]) == 0
    printed = capsys.readouterr().out
    words = ["evaluate", model, "--data", "beir", "--run-file", "two.trec", "--json", "two.json", "--cache", "kept"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "ddp.yaml"), "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0", "-m", "revela_nb.cli"]
    done = subprocess.run(launch + words, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == printed
    one, two = ({tuple(line.split()[::2]): float(line.split()[4]) for line in Path(f"{n}.trec").read_text().splitlines()} for n in ("one", "two"))
    assert {k[:2] for k in one} == {k[:2] for k in two} and [*two.values()] == pytest.approx([*one.values()], abs=1e-5)
    assert "ndcg@10" in json.loads(Path("two.json").read_text())
    kept = [json.loads(note.read_text())["keys"] for note in Path("kept").rglob("*.json")]
    assert sum(map(len, kept)) == 8 and len(kept) == 4, "six documents and two queries, half of each by each process"


def test_evaluate_refuses(beir, capsys, models):
    refused(capsys, ["evaluate", "bm25", "--data", "nowhere"], "nowhere")
    refused(capsys, ["evaluate", "bm25", "--data", "beir/qrels"], "corpus.jsonl")
    refused(capsys, ["evaluate", "bm25", "--data", "beir", "--split", "dev"], "dev", "test")
    refused(capsys, ["evaluate", "bm25", "--data", "beir", "--k", "0"], "k must be")
    refused(capsys, ["evaluate", "beir", "--data", "beir"], "beir")
    refused(capsys, ["evaluate", "no-such-model", "--data", "beir"], "no-such-model")
    refused(capsys, ["search", "beir", "--corpus", "beir", "a question"], "beir")
    refused(capsys, ["search", str(models / "llama"), "--corpus", "nowhere/", "a question"], "nowhere")
    refused(capsys, ["search", str(models / "llama"), "--corpus", "beir", " "], "query")


def test_evaluate_hybrid_and_comparison(beir, models, capsys):
    model = str(models / "llama")
    assert main(["evaluate", "bm25", "--data", "beir", "--run-file", "bm25.trec"]) == 0
    capsys.readouterr()
    assert main(["evaluate", model, "--data", "beir", "--hybrid", "--compare", "bm25.trec", "--json", "f.json", "--run-file", "model.trec"]) == 0
    out, record = capsys.readouterr().out, json.loads(Path("f.json").read_text())
    assert list(record["rows"]) == ["model", "BM25", "hybrid, ranks", "hybrid, scores"] and all(name in out for name in list(record["rows"]))
    values = [ndcg(f"{name}.trec", "beir/qrels/test.tsv") for name in ("model", "bm25")]
    assert [record["rows"][r]["ndcg@10"] for r in ("model", "BM25")] == pytest.approx(values, abs=1e-9)
    found = record["comparison"]
    assert found["difference"] == pytest.approx(values[0] - values[1], abs=1e-9) and found["other_mean"] == pytest.approx(values[1], abs=1e-9)
    assert f"nDCG@10 {found['difference']:+.4f} against bm25.trec" in out and f"p = {found['p_value']:.4f}" in out
    assert sum(found["better_equal_worse"]) == 2 and all(row["text"] in out for row in found["gained"] + found["lost"])


def test_evaluate_tasks_skip_what_is_finished(beir, models, capsys):
    for name in ("pets", "lists"): shutil.copytree("beir", f"suite/{name}")
    shutil.copytree(models / "llama", "model")
    words = ["evaluate", "model", "--data", "suite", "--tasks", "pets,lists", "--out", "figures", "--compare", "bm25"]
    assert main(words) == 0
    first, _ = capsys.readouterr()
    assert tree("figures") == ["lists.json", "pets.json"] and "mean" in first and "lists: nDCG@10" in first
    stamps = [p.stat().st_mtime_ns for p in sorted(Path("figures").iterdir())]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out == first and err.count("finished before") == 2 and stamps == [p.stat().st_mtime_ns for p in sorted(Path("figures").iterdir())]
    Path("figures/pets.json").write_text('{"key"')                       # cut off
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out == first and "broken" in err and err.count("finished before") == 1
    os.utime("model/model.safetensors", (1, 1))                          # trained on
    assert main(words) == 0 and capsys.readouterr().err.count("measured again") == 2
    assert main([*words, "--k", "3"]) == 0 and capsys.readouterr().err.count("measured again") == 2
    with open("suite/pets/queries.jsonl", "a") as file: file.write('{"_id": "q9", "text": "new"}\n')
    assert main([*words, "--k", "3"]) == 0 and capsys.readouterr().err.count("measured again") == 1


def test_evaluate_task_from_the_hub(beir, monkeypatch, capsys):
    from datasets import Dataset
    import revela_nb.compare as compare
    tables = {("xlangai/BRIGHT", "documents"): [{"id": "a", "content": "moths fly to light"}, {"id": "b", "content": "light draws moths"}],
              ("xlangai/BRIGHT", "examples"): [{"query": "moths fly to light", "id": "0", "excluded_ids": ["a"], "gold_ids": ["b"]}]}
    monkeypatch.setattr(compare, "load_dataset", lambda repository, config, split: Dataset.from_list(tables[repository, config]))
    assert main(["evaluate", "bm25", "--tasks", "bright/biology"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["bright/biology", "bm25", "1.0000", "1.0000", "1.0000"]


def test_evaluate_refuses_comparisons_and_suites(beir, capsys):
    Path("foreign.trec").write_text("q0 Q0 stranger 1 1.0 x\n")
    Path("query.trec").write_text("q77 Q0 d0 1 1.0 x\n")
    Path("broken.trec").write_text("q0 d0 1.0\n")
    base = ["evaluate", "bm25", "--data", "beir"]
    refused(capsys, [*base, "--compare", "foreign.trec"], "foreign.trec", "stranger")
    refused(capsys, [*base, "--compare", "query.trec"], "query.trec", "q77")
    refused(capsys, [*base, "--compare", "broken.trec"], "broken.trec", "line 1")
    refused(capsys, [*base, "--compare", "no-such-model"], "no-such-model")
    refused(capsys, [*base, "--hybrid"], "--hybrid")
    refused(capsys, [*base, "--out", "x"], "--tasks")
    refused(capsys, ["evaluate", "bm25"], "--data")
    refused(capsys, ["evaluate", "bm25", "--tasks", ","], "names no task")
    refused(capsys, ["evaluate", "bm25", "--tasks", "a,a"], "twice")
    refused(capsys, ["evaluate", "bm25", "--tasks", "a", "--json", "x"], "--out")
    refused(capsys, ["evaluate", "bm25", "--tasks", "a,b", "--compare", "foreign.trec"], "one data set")
    refused(capsys, ["evaluate", "bm25", "--data", "beir", "--tasks", "trec/robust"], "beir, coir and bright")


@pytest.mark.skipif(not SCIFACT.exists(), reason="../shared is not here")
def test_scifact(capsys):
    assert main(["evaluate", "bm25", "--data", str(SCIFACT)]) == 0
    assert float(capsys.readouterr().out.split()[1]) == pytest.approx(0.686, abs=0.005)


def test_search_prints_ranked_passages(notes, models, capsys):
    assert main(["search", str(models / "llama"), "--corpus", "notes", "warm cats", "--k", "3", "--max-words", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == ["1", "2", "3"] and all(line.startswith("     ") for line in lines[1::2])
    scores = [float(line.split()[1]) for line in lines[::2]]
    assert scores == sorted(scores, reverse=True) and all("#" in line.split()[2] for line in lines[::2])
    assert main(["search", "bm25", "--corpus", "notes", "rivers and boats", "--k", "1", "--max-words", "10"]) == 0
    assert "r1#0" in capsys.readouterr().out


def test_search_checks_the_model_before_reading(notes, models, capsys, monkeypatch):
    "A wrong model must not cost the time that reading the documents takes; for the right one there is a bar."
    def read(*rest, **named): raise AssertionError("documents were read")
    with monkeypatch.context() as patched:
        patched.setattr("revela_nb.index.load_corpus", read)
        for words in (["search", "no-such-model", "q"], ["serve", "bm25", "--other", "notes"]): refused(capsys, [*words, "--corpus", "notes"], words[-1] if words[0] == "serve" else words[1])
    monkeypatch.setattr(sys, "stderr", seen := Terminal())
    assert main(["search", str(models / "llama"), "--corpus", "notes", "warm cats", "--max-words", "10"]) == 0
    assert "reading: " in seen.getvalue() and "8/8 " in seen.getvalue()


def test_a_runs_folder_stands_for_its_retriever(notes, beir, models, capsys):
    from revela_nb.retriever import Retriever
    Path("run").mkdir()
    Path("run/revela_run.json").write_text('{"max_steps": 5, "versions": {"torch": "9.9"}}')
    Retriever.from_pretrained(models / "llama", pooling="mean").save_pretrained("run/retriever")
    printed = []
    for name in ("run/retriever", "run"):
        assert main(["evaluate", name, "--data", "beir"]) == 0 and main(["search", name, "--corpus", "notes", "warm cats"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert main(["export", "run", "--out", "published"]) == 0
    assert "* max_steps: 5" in (card := Path("published/README.md").read_text()) and "torch 9.9" in card


def test_search_again_says_lines_and_encodes_only_what_changed(notes, models, capsys, monkeypatch):
    import io
    words = ["search", str(models / "llama"), "--corpus", "notes", "--index", "kept", "--max-words", "10", "--k", "3"]
    assert main([*words, "warm cats"]) == 0
    first, err = capsys.readouterr()
    assert ", 8 of them new" in err and "searched in 0." in err
    assert main([*words, "warm cats"]) == 0
    again, err = capsys.readouterr()
    assert again == first and "of them new" not in err
    for line in first.splitlines()[::2]:
        chunk, place = line.split()[2:4]
        if place != chunk:
            path, number = place.rsplit(":", 1)
            assert Path(path).read_text().splitlines()[int(number) - 1].strip()
    assert "notes/pets.md:" in first or "notes/deep/lists.txt:" in first
    Path("notes/new.txt").write_text("One more file about boats.")
    monkeypatch.setattr("sys.stdin", io.StringIO("boats\nwarm cats\n\n"))
    assert main([*words, "--interactive"]) == 0
    out, err = capsys.readouterr()
    assert ", 1 of them new" in err and len(out.splitlines()) == 12


def test_serve_refuses_other_hosts_before_any_work(notes, models, capsys):
    refused(capsys, ["serve", str(models / "llama"), "--corpus", "notes", "--host", "0.0.0.0"], "this machine only")
    refused(capsys, ["serve", "bm25", "--corpus", "notes", "--port", "0"], "--port")


def test_serve_hands_two_searchers_to_the_page(notes, models, monkeypatch):
    handed = {}
    monkeypatch.setattr("revela_nb.serve.serve_page", lambda searchers, *rest: handed.update(searchers))
    assert main(["serve", str(models / "llama"), "--corpus", "notes", "--max-words", "10"]) == 0
    assert list(handed) == [str(models / "llama"), "bm25"]
    place, text, score = handed["bm25"]("calm cat", 1)[0]
    assert place.startswith("notes/pets.md:") and "calm" in text and score > 0


def test_errors_have_their_status(monkeypatch, capsys):
    import revela_nb.cli as cli
    for error, status in ((KeyboardInterrupt(), 130), (OSError(28, "No space left on device", "x"), 2), (FloatingPointError("the loss is nan"), 2), (KeyError("a"), 1)):
        def fail(args): raise error
        monkeypatch.setattr(cli, "show_demo", fail)
        assert main(["demo"]) == status
        err = capsys.readouterr().err
        news, said = err.splitlines() # something is said before the imports, then one line of error
        assert "first bar" in news and said.startswith("revela: error: ")
        assert main(["demo", "--verbose"]) == status and "Traceback" in capsys.readouterr().err


def test_demo_rehearsal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--steps", "1", "--functions", "60", "--queries", "10", "--out", "out"]) == 0
    out = capsys.readouterr().out
    report = json.loads(Path("out/report.json").read_text())
    for name in ("before", "after", "bm25"): assert {"ndcg@10", "recall@100"} <= report[name].keys() and 0 <= report[name]["ndcg@10"] <= 1
    assert report["steps"] == 1 and report["seed"] == 0 and report["seconds"] > 0 and "torch" in report["versions"] and len(report["examples"]) == 3
    assert {"report.json", "report.png", "retriever"} == {p.name for p in Path("out").iterdir()} and tree(".")[0] == "out"
    for shown in (f"{report['after']['ndcg@10']:.3f}", "BM25", "gain", report["examples"][0]["right"][:20]): assert shown in out
    Path("mine").mkdir(); Path("mine/thesis.txt").write_text("precious")
    refused(capsys, ["demo", "--out", "mine"], "mine")
    refused(capsys, ["demo", "--steps", "0", "--out", "x"], "steps")


def test_weight_of_the_hybrid(beir, models, capsys):
    "Weight 0 is BM25's order, weight 1 the model's, and auto asks sentences of the corpus and never the test's labels."
    model = str(models / "llama")
    rows = {}
    for weight in ("0", "1"):
        assert main(["evaluate", model, "--data", "beir", "--hybrid", "--weight", weight, "--json", "f.json"]) == 0
        rows[weight] = json.loads(Path("f.json").read_text())["rows"]
    assert rows["1"]["hybrid, scores"]["mrr@10"] == rows["1"]["model"]["mrr@10"] and rows["0"]["hybrid, scores"]["mrr@10"] == rows["0"]["BM25"]["mrr@10"]
    lines = [json.dumps({"_id": f"d{i}", "text": f"Topic number{i} begins with this plain sentence. Then number{i} is told at greater length."}) for i in range(6)]
    Path("told").mkdir()
    (Path("told") / "qrels").mkdir()
    (Path("told") / "corpus.jsonl").write_text("\n".join(lines))
    (Path("told") / "queries.jsonl").write_text('{"_id": "q", "text": "number3"}')
    (Path("told") / "qrels" / "test.tsv").write_text("q\td3\t1\n")
    capsys.readouterr()
    assert main(["evaluate", model, "--data", "told", "--hybrid", "--weight", "auto"]) == 0
    assert "chosen on 6 sentences of the corpus" in capsys.readouterr().err
    refused(capsys, ["evaluate", model, "--data", "beir", "--hybrid", "--weight", "2"], "--weight")
    refused(capsys, ["evaluate", model, "--data", "beir", "--weight", "0.3"], "--hybrid")


def test_evaluate_a_sentence_transformers_model(beir, models, capsys):
    "A model of another make goes through the same harness: here our own export, read back by its library, gives the same figures."
    from revela_nb.retriever import Retriever
    Retriever.from_pretrained(models / "llama").export_sentence_transformer("exported")
    Path("exported", "retriever_config.json").unlink(missing_ok=True)
    for name in (str(models / "llama"), "exported"): assert main(["evaluate", name, "--data", "beir", "--json", f"{Path(name).name}.json"]) == 0
    ours, theirs = (json.loads(Path(f"{name}.json").read_text())["rows"]["model"] for name in ("llama", "exported"))
    assert ours == pytest.approx(theirs)
    capsys.readouterr()
    refused(capsys, ["evaluate", "exported", "--data", "beir", "--cache", "kept"], "--cache")
