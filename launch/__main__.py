"""The program `hark`: each of its commands runs one program of launch/.

hark COMMAND ...                  runs `python -m hark.launch.COMMAND ...`
hark COMMAND --processes N ...    runs it on N processes of this machine, as torchrun would
"""

from __future__ import annotations

import argparse
import difflib
import runpy
import sys
from typing import NamedTuple

from hark.launch.common.entry import run
from hark.launch.common.torchrun import launch
from hark.shown import say_text


class Command(NamedTuple):
    """A program: its module in hark.launch, what it does in one line, and whether it can run on several processes."""

    module: str
    does: str
    on_ranks: bool = False


COMMANDS = {
    "train": Command("train", "train a policy by GRPO", on_ranks=True),
    "sft": Command("sft", "fine-tune a policy on the right answers", on_ranks=True),
    "evaluate": Command("evaluate", "answer a benchmark's questions greedily, and report the accuracy", on_ranks=True),
    "ask": Command("ask", "ask a model about a clip: answer, probabilities of the choices, samples"),
    "compare": Command("compare", "compare evaluations of the same questions, with intervals"),
    "grade": Command("grade", "grade a file of answers by a benchmark's rule, without a model"),
    "step": Command("step", "print a recorded step, or the arithmetic of a completion's loss"),
    "replay": Command("replay", "compute recorded steps again and compare; compare two runs", on_ranks=True),
    "report": Command("report", "write a page about runs: curves, recorded steps, sounds, evaluations"),
    "watch": Command("watch", "show runs in a browser while they train"),
    "choose": Command("choose", "select a run's checkpoint on its validation questions", on_ranks=True),
    "export": Command("export", "write a checkpoint as a Hugging Face directory, or its adapters", on_ranks=True),
    "plan": Command("plan", "predict the peak memory of a training run"),
    "convert": Command("convert", "convert a published data set to JSON lines"),
    "pass-rate": Command(
        "pass_rate", "measure how often each training question is answered right; keep right answers", on_ranks=True
    ),
    "check-data": Command("check_data", "check a file of questions and its clips, and report their figures"),
    "check-policy": Command("check_policy", "compare a policy with transformers' own model of its checkpoint"),
    "sweep": Command("sweep", "train with every combination of some settings, and compare the runs"),
    "init": Command("init", "begin a project of your own: configurations and sample data that run as they are"),
    "new-model": Command("new_model", "write a small model with random weights for your own questions"),
    "compose": Command("compose", "make an audio language model of a Whisper encoder and a language model"),
    "import-model": Command(
        "import_model", "write a GGUF model, or a Whisper of CTranslate2, as a Hugging Face directory"
    ),
    "build-mini": Command("build_mini", "write the demo's data set and its small model"),
    "demo": Command("demo", "run the whole demo: data, warm start, GRPO, evaluation"),
    "families": Command("studies.families", "train, shard, export and time a small model of every audio family"),
    "benchmark": Command("studies.benchmark", "compare a step with the R1-AQA procedure, on the CPU"),
    "benchmark-gpu": Command("studies.benchmark_gpu", "the same on a GPU, and compare with the GPU's limits"),
    "pictures": Command("studies.pictures", "draw the pictures of the documentation"),
    "recording": Command("studies.recording", "measure what recording the steps of a run costs"),
    "saving": Command("studies.saving", "measure what checkpoints and their digests cost"),
    "dealing": Command("studies.dealing", "compute how equal the work of ranks is, by what decides their prompts"),
    "scaling": Command("studies.scaling", "measure the cost of a step for different sizes and numbers of ranks"),
}


def main() -> None:
    """The program `hark`."""
    run(command)


def command(argv: list[str]) -> None:
    """Run the command that the arguments name."""
    if not argv or argv[0] in ("-h", "--help"):
        say_text(overview())
        return
    name, processes, rest = parse(argv)
    if processes is not None and not {"-h", "--help"} & set(rest):
        raise SystemExit(launch(processes, words_of(name, rest)))
    sys.argv = [f"hark {name}", *rest]
    runpy.run_module(module_of(name), run_name="__main__")


def parse(argv: list[str]) -> tuple[str, int | None, list[str]]:
    """The command, the number of processes if one is given, and the command's arguments. A mistake ends the program."""
    name, *rest = argv
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        sys.exit(f"error: unknown command {name}; the nearest is {nearest}; `hark --help` lists all of them")
    parser = argparse.ArgumentParser(prog=f"hark {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--processes", type=int, metavar="N")
    options, rest = parser.parse_known_args(rest)
    if options.processes is not None:
        if not COMMANDS[name].on_ranks:
            parallel = ", ".join(name for name, command in COMMANDS.items() if command.on_ranks)
            sys.exit(f"error: --processes: {name} runs in one process; only these run on several: {parallel}")
        if options.processes < 1:
            sys.exit(f"error: --processes must be at least 1, not {options.processes}")
    return name, options.processes, rest


def module_of(name: str) -> str:
    return f"hark.launch.{COMMANDS[name].module}"


def words_of(name: str, rest: list[str]) -> list[str]:
    """The words after `python` that run a command: as `hark` does, so that errors of its imports are caught too."""
    return ["-m", "hark.launch", name, *rest]


def overview() -> str:
    """The commands with one line each."""
    width = max(map(len, COMMANDS))
    parallel = ", ".join(name for name, command in COMMANDS.items() if command.on_ranks)
    return "\n".join(
        [
            "usage: hark COMMAND ...",
            "",
            *(f"  {name:{width}}  {command.does}" for name, command in COMMANDS.items()),
            "",
            "`hark COMMAND --help` describes the arguments of a command.",
            f"`hark COMMAND --processes N ...` starts N processes on this machine, one per GPU ({parallel}).",
        ]
    )


if __name__ == "__main__":
    main()
