"""Select a checkpoint of a run on its validation questions; only the selected one answers data.test.

    python launch/choose.py RUN [section.key=value ...]
    torchrun --nproc-per-node GPUS launch/choose.py RUN [section.key=value ...]

RUN is the run.directory of a training run with checkpoint.weights=true and data.validation or data.held_out. Prints a
table of its checkpoints and writes RUN/choice.json and, if data.test is set, its evaluation to RUN/chosen.
"""

from dataclasses import replace
from pathlib import Path

from hark.data.benchmarks.report import Share, heading, line, share
from hark.data.json_files import write_json
from hark.grpo.config import ConfigError
from hark.grpo.runtime.checkpoint import load_weights
from hark.grpo.runtime.collectives import exchange_rows, joined_world
from hark.launch.common.answering import answer_test
from hark.launch.common.config_file import help_if_asked
from hark.launch.common.entry import run
from hark.launch.common.policies import make_policy
from hark.launch.common.questions import checked_questions, training_examples, validation_rows
from hark.launch.common.run_directory import left_out_by
from hark.launch.common.trained import CHOSEN, highest, of_run, read_run, saved
from hark.launch.common.training import announce
from hark.models.loading import read_family
from hark.shown import say, say_text

WIDTH = 8  # of the column of steps


def main(argv: list[str]) -> None:
    help_if_asked(argv, __doc__)
    if not argv or "=" in argv[0]:
        raise ConfigError("the first argument must be the run.directory of a run: RUN [section.key=value ...]")
    directory = Path(argv[0])
    config = read_run(directory, argv[1:])
    found = saved(directory)
    if config.data.validation is None and not config.data.held_out:
        raise ConfigError("neither data.validation nor data.held_out is set; one must give the questions to choose by")
    with joined_world(threads=config.run.threads) as world:
        announce(config, world)
        family = read_family(config.model.path, config.model.policy)
        questions = training_examples(config, world, family, left_out_by(directory)).held_out
        final = replace(config, run=replace(config.run, directory=str(directory / CHOSEN)))
        asked = checked_questions(final, world, family) if config.data.test is not None else None
        policy = make_policy(config, world)
        shares = {}
        for step, checkpoint in found.items():
            load_weights(checkpoint, policy, world)
            rows = validation_rows(config, world, policy, questions)
            if rows is not None:
                shares[step] = share(rows)
        chosen = exchange_rows(
            [highest({step: s.accuracy or 0.0 for step, s in shares.items()})] * bool(shares), world
        )[0]
        if world.is_main:
            record = {str(step): s._asdict() | {"accuracy": s.accuracy} for step, s in shares.items()}
            write_json(directory / "choice.json", {"step": chosen, "validation": record})
            say_text(table(shares, chosen))
            say(f"to export it: hark export {directory} --step {chosen}")
        if asked is not None:
            load_weights(found[chosen], policy, world)
            answer_test(of_run(directory, final, chosen, found[chosen]), world, policy, *asked)


def table(shares: dict[int, Share], chosen: int) -> str:
    """One line per checkpoint, the chosen one marked."""
    lines = [line(str(step), figure, WIDTH) + "  chosen" * (step == chosen) for step, figure in shares.items()]
    return "\n".join([heading("step", WIDTH), *lines])


if __name__ == "__main__":
    run(main)
