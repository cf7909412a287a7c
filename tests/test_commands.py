"""Every `revela ...` that somebody may copy, from README, the site's pages, the notebooks, the recipes and the help, is one that the parser takes."""
import json
import re
import shlex
from pathlib import Path

import pytest

from revela_nb.cli import build_parser, parse_words

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "nbs").glob("[0-9i]*.ipynb")), *sorted((ROOT / "configs").glob("*.yaml"))]
FILES = re.compile(r"configs/[\w.-]+")


@pytest.fixture(scope="module")
def parser(): return build_parser()


def prose(path):
    "What a reader sees as text; of a recipe its comments."
    raw = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb": return "\n\n".join("".join(cell["source"]) for cell in json.loads(raw)["cells"] if cell["cell_type"] == "markdown")
    return "\n".join(f"`{line.split(':', 1)[1].strip()}`" for line in raw.splitlines() if re.match(r"# [\w ]+: .*\btrain\b", line)) if path.suffix == ".yaml" else raw


def pieces(text):
    "Code of two kinds: (a line of a block, True), (what stands between two backticks in a sentence, False)."
    block = re.compile(r"^```(\S*).*?\n(.*?)^```", re.M | re.S)
    for match in block.finditer(text):
        if match[1] in ("sh", "bash"): yield from ((line, True) for line in match[2].replace("\\\n", " ").splitlines())
    yield from ((span, False) for span in re.findall(r"`([^`]+)`", block.sub("", text)))


def calls(line):
    "The words behind every `revela` or `-m revela_nb.cli` of a line of shell; a variable is a number."
    words = shlex.shlex(re.sub(r"\$\w+|\bN\b", "0", line.removeprefix("$ ")), posix=True, punctuation_chars=";&|")
    words.whitespace_split, words.commenters, call = True, "#", None
    for word in [*words, ";"]:
        if set(word) <= set(";&|"):
            if call: yield call
            call = None
        elif call is not None: call += [word] if word != "..." else []
        elif word in ("revela", "revela_nb.cli"): call = []
        elif " " in word: yield from calls(word)                              # sbatch --wrap 'revela ...'


def fault(parser, words, whole):
    "What is wrong with a command; one in a sentence may leave out what it does not speak of."
    missing = [name for name in FILES.findall(" ".join(words)) if not (ROOT / name).is_file()]
    if missing: return f"no file {missing}"
    try: parse_words(parser, words)
    except SystemExit: return None                                            # --help, --version
    except ValueError as error: return None if "arguments are required" in str(error) and not whole else str(error)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_commands_in_prose_parse(path, parser):
    for line, whole in pieces(prose(path)):
        if not re.search(r"\brevela(_nb\.cli)? [a-z-]", line): continue
        for words in calls(line): assert not (found := fault(parser, words, whole)), f"{line!r}: {found}"


def test_examples_of_the_help_parse(parser):
    commands = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    for name, command in commands.items():
        lines = [re.sub(r"\s+\(.*\)$", "", line.strip()) for line in command.epilog.splitlines()[1:]]
        assert lines, name
        for line in lines: assert not (found := [fault(parser, words, True) for words in calls(line)]) or found == [None], f"{line!r}: {found}"


def test_the_one_command_for_the_published_corpora_is_named(parser):
    "In the chapter that reads them: a recipe that exists, of that corpus."
    spans = [words for line, _ in pieces(prose(ROOT / "nbs/10b_prepared.ipynb")) if line.startswith("revela ") for words in calls(line)]
    recipes = [ROOT / words[1] for words in spans if words[0] == "train" and words[1].startswith("configs/")]
    assert any("groups: trumancai/revela_training_corpus\n" in path.read_text() for path in recipes) and any("groups: trumancai/revela_code_training_corpus\n" in path.read_text() for path in recipes)


def test_the_search_finds_faults(parser):
    "Kinds of lines, and of mistakes."
    seen = [words for line, _ in pieces("`for s in 0 1; do revela demo --seed $s --out run$s; done` and `sbatch --wrap 'revela prepare a --out b --share $I/64'`\n\n```sh\ncd x && revela search m \\\n  \"two words\" # all\n```\n") for words in calls(line)]
    assert seen == [["search", "m", "two words"], ["demo", "--seed", "0", "--out", "run0"], ["prepare", "a", "--out", "b", "--share", "0/64"]]
    assert "unrecognized" in fault(parser, ["train", "--groups", "x", "--out", "RUN"], False) and "invalid choice" in fault(parser, ["trian"], False)
    assert "no file" in fault(parser, ["train", "configs/none.yaml"], False) and fault(parser, ["prepare", "--out", "x"], False) is None and "required" in fault(parser, ["prepare", "--out", "x"], True)
