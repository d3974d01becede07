"""Every link, path and command in README.md, docs/ and the configurations' comments is right, without running anything.

A command is right if its program exists and its parser accepts the arguments: flags are known, a configuration exists,
and overrides have known keys and valid values. `problems` is tested on wrong pages too.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from hark.grpo.config import ConfigError
from hark.grpo.instruments.symptoms import SYMPTOMS
from hark.launch.__main__ import COMMANDS, module_of, parse, words_of
from hark.launch.common.config_file import CONFIGS, help_if_asked, load_config
from hark.launch.common.torchrun import torchrun
from hark.launch.studies.scaling import MARKERS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(CONFIGS.glob("*.yaml"))]
PROGRAMS = ("python", "torchrun", "hark", "make")
TOP = "grpo|models|data|launch|tests|docs|hark"
# What an uppercase word stands for where a parser would refuse the word itself.
EXAMPLES = {"CONFIG": "r1_aqa", "N": "1", "NAME": "mmau", "SOURCE": "avqa", "GPUS": "8", "FAMILY": "glmasr"}
EXAMPLES |= {f"mine/{name}.yaml": "r1_aqa" for name in ("sft", "train")}  # written by `hark init mine`
RUNS = ("RUN", "mine/warm", "mine/grpo", "runs/compose/heard", "runs/compose/decoder")


def problems(text: str, path: Path, scratch: Path) -> list[str]:
    """What is wrong with the text of the page `path`, one line each. `scratch` may be written to."""
    found = [problem for link in links(text) if (problem := wrong_link(link, text, path))]
    found += [f"{name}: no such file" for name in sorted(mentioned(text)) if not (ROOT / name).exists()]
    for command in commands(text):
        if problem := wrong_command(command, scratch):
            found.append(f"`{command}`: {problem}")
    return found


# Links and paths ------------------------------------------------------------------------------------------------------


def without_blocks(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_blocks(text))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def wrong_link(link: str, text: str, path: Path) -> str | None:
    if link.startswith(("https://", "http://")):
        return None
    name, _, anchor = link.partition("#")
    target = path.parent / name if name else path
    if not target.exists():
        return f"link {link}: no such file"
    if anchor and anchor not in anchors(target.read_text() if name else text):
        return f"link {link}: no such heading"
    return None


def mentioned(text: str) -> set[str]:
    """Paths of the checkout that a page names; those with an uppercase word are placeholders."""
    names = re.findall(rf"(?<![\w/.-])((?:{TOP})/[\w/.-]*\.(?:py|md|yaml|svg|json|flac))\b", text)
    return {name for name in names if not re.search(r"\b[A-Z]+\b", Path(name).stem) or Path(name).suffix == ".md"}


# Commands -------------------------------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[str]:
    """Commands in fenced blocks, in comments and between backticks."""
    plain = re.sub(r"^# ?", "", text, flags=re.MULTILINE)  # of a configuration's comments; headings are no commands
    plain = re.sub(r"\\\n\s*", "", plain)
    blocks = [match.group(1) for match in re.finditer(r"^ *```\w*\n(.*?)^ *```$", plain, re.DOTALL | re.MULTILINE)]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    lines += [line.strip() for line in re.findall(r"^  +(.+)$", without_blocks(plain), re.MULTILINE)]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", without_blocks(plain))]
    for line in lines:
        first, _, rest = line.partition(" ")
        if (first in PROGRAMS or re.fullmatch(r"launch/[\w/]+\.py", first)) and rest and "COMMAND" not in line:
            yield line


def wrong_command(command: str, scratch: Path) -> str | None:
    try:
        first, *words = shlex.split(without_brackets(command), comments=True)
        words = [EXAMPLES.get(word, word) for word in words]
    except ValueError as error:
        return str(error)
    if first == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return next((f"no target {word}" for word in words if word not in targets and "=" not in word), None)
    with redirect_stderr(StringIO()) as printed, redirect_stdout(StringIO()):
        try:
            check(first, words, scratch)
        except (ConfigError, LookupError, ImportError, OSError) as error:
            return str(error)
        except SystemExit as end:
            if not end.code:  # the end of --help
                return None
            return str(end) if isinstance(end.code, str) else printed.getvalue().strip().splitlines()[-1]
    return None


def without_brackets(command: str) -> str:
    """The command with all its optional parts: `[--step N]` becomes `--step N`, and `...` is left out.

    Of alternatives, `[--step N | --best]`, the first is taken.
    """
    command = re.sub(r" \| [^\[\]]*\]", "]", command)
    command = command.replace("section.key=value", "").replace("...", "")
    return re.sub(r"(?<!=)\[([^\[\]]*)\]", r"\1", command)


def check(first: str, words: list[str], scratch: Path) -> None:
    """Raise what the program would raise at its arguments."""
    if first == "hark":
        command, processes, rest = parse(words)
        if processes is not None:
            get_args_parser().parse_args([*torchrun(processes)[3:], *words_of(command, rest)])
        accept(command, rest, scratch)
        return
    if first == "torchrun":
        options = get_args_parser().parse_args(words)
        words = [options.training_script, *options.training_script_args]
    elif first != "python":
        words = [first, *words]
    if words[0] == "-m":
        if find_spec(words[1]) is None:
            raise LookupError(f"no module {words[1]}")
        return
    accept(command_of(words[0]), words[1:], scratch)


def command_of(script: str) -> str:
    """The command of a path such as launch/train.py."""
    if not (ROOT / script).exists():
        raise LookupError(f"no program {script}")
    module = script.removesuffix(".py").replace("/", ".")
    commands = [command for command in COMMANDS if module_of(command) == f"hark.{module}"]
    if not commands:
        raise LookupError(f"{script} is not a command")
    return commands[0]


def accept(command: str, words: list[str], scratch: Path) -> None:
    """Let the parser of a command read its arguments; a command without any is only mentioned."""
    module = import_module(module_of(command))
    if not words:
        return
    if command in ("train", "sft", "choose"):
        help_if_asked(words, module.__doc__)
    if command in ("train", "sft"):
        load_config(words)
    elif command == "choose":
        run, *overrides = words
        load_config(["r1_aqa", *overrides])
    elif command == "evaluate":
        subject, *overrides = module.parse(words).words
        load_config(["r1_aqa" if subject in RUNS else subject, *overrides])
    elif command == "plan":
        load_config(module.parse(words)[1])
    elif command == "scaling":
        (scratch / "FILE.md").write_text(f"{MARKERS.begin}\n{MARKERS.end}\n")
        module.parse([str(scratch / word) if word == "FILE.md" else word for word in words])
    else:
        module.parse(words)


# The pages ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_no_wrong_link_path_or_command(page, tmp_path):
    assert problems(page.read_text(), page, tmp_path) == []


def test_commands_are_found_in_blocks_comments_and_sentences():
    """Guards against a page that passes because nothing is found on it."""
    found = {page.name: list(commands(page.read_text())) for page in PAGES}
    assert len(found["README.md"]) >= 18 and len(found["r1-aqa.md"]) >= 10 and len(found["r1_aqa.yaml"]) == 4
    assert {command.split()[1] for command in found["README.md"] if command.startswith("hark ")} == set(COMMANDS)
    assert sum(len(links(page.read_text())) for page in PAGES) > 80


def test_every_page_is_linked_from_the_readme_which_stays_short():
    text = (ROOT / "README.md").read_text()
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= set(links(text))
    assert len(text.splitlines()) <= 150


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](docs/nothing.md)", "link docs/nothing.md: no such file"),
        ("[a](docs/algorithm.md#no-such-part)", "link docs/algorithm.md#no-such-part: no such heading"),
        ("# Some Title\n[a](#some-titel)", "link #some-titel: no such heading"),
        ("as grpo/sampling.py does", "grpo/sampling.py: no such file"),
        ("`make demos`", "`make demos`: no target demos"),
        ("```\nmake tset  # the tests\n```", "no target tset"),
        ("`hark trian CONFIG`", "unknown command trian; the nearest is train"),
        ("`hark plan --processes 2 CONFIG`", "plan runs in one process"),
        ("`hark train r1_aqq`", "no configuration of that name"),
        ("`hark train CONFIG optim.lrr=1`", "the nearest key is optim.lr"),
        ("`python launch/train.py launch/configs/r1_aqua.yaml`", "no such file"),
        ("`python launch/trian.py CONFIG`", "no program launch/trian.py"),
        ("`python -m tests.simulator`", "no module tests.simulator"),
        ("```\ntorchrun --nproc-per-gpu 8 launch/train.py CONFIG\n```", "error: "),
        ("```\ntorchrun --nproc-per-node 8 launch/train.py \\\n  CONFIG optim.steps=none\n```", "must be an integer"),
        ("`launch/evaluate.py CONFIG --silence`", "unrecognized arguments: --silence"),
        ("`launch/evaluate.py CONFIG evaluation.benchmark=mmlu`", "must be one of strict, mmau, mmar, mmsu"),
        ("`hark export RUN [--steps N]`", "unrecognized arguments: --steps 1"),
        ("`hark plan CONFIG [--gpu-count 8]`", "override --gpu-count: an override is written"),
        ("`hark check-data FILE --seconds 3`", "unrecognized arguments: --seconds 3"),
        ("`hark benchmark --attention flex`", "unrecognized arguments: --attention"),
        ("#   torchrun --nproc-per-node 8 launch/sft.py launch/configs/sft_ful.yaml", "no such file"),
    ],
)
def test_a_wrong_page_is_noticed(text, problem, tmp_path):
    assert any(problem in line for line in problems(text, ROOT / "README.md", tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "[a](https://example.org/x) and [b](docs/algorithm.md#what-the-draws-depend-on)",
        "```\n[a](nothing.md)\n```",
        "`hark choose RUN [section.key=value ...]` and `torchrun --nproc-per-node GPUS launch/choose.py RUN`",
        "`hark train --processes 2 mini optim.lr=1e-3 run.directory=runs/x`",
        "`python launch/convert.py avqa in.json data/x/out.jsonl --audio data/x/wavs`",
    ],
)
def test_a_right_page_is_accepted(text, tmp_path):
    assert problems(text, ROOT / "README.md", tmp_path) == []


def test_the_page_of_symptoms_explains_each_symptom_with_its_rule_and_its_advice():
    _, *sections = (ROOT / "docs" / "diagnosis.md").read_text().split("\n## ")
    assert [section.partition("\n")[0] for section in sections] == [symptom.name for symptom in SYMPTOMS]
    for section, symptom in zip(sections, SYMPTOMS, strict=True):
        words = " ".join(section.split())
        assert f"**Found if** {symptom.rule}." in words, symptom.name
        assert "**It means** " in words, symptom.name
        assert f"**Try:** {symptom.advice}." in words, symptom.name
