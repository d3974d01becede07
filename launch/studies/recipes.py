"""Write the table of recipes into a page, from the configurations and their first lines.

    python -m hark.launch.studies.recipes docs/recipes.md

What stands between two marker lines of the page is replaced.
"""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from hark import UserError
from hark.from_file import short_name
from hark.grpo.config import Config
from hark.launch.common.config_file import find_config, load_config
from hark.launch.common.entry import run
from hark.launch.common.pages import Markers

MARKERS = Markers.of("launch/studies/recipes.py")
RECIPES = (
    "asr", "emotion", "tts", "open_rs", "sari_sft", "sari",
    "omni_r1", "omni_r1_text", "echo_ink", "ke_omni_r", "audio_mcq",
    "dapo", "dr_grpo", "gspo", "cispo", "sapo",
)  # fmt: skip


class Recipe(NamedTuple):
    """What the first lines of a configuration say, its verb and its options."""

    name: str
    verb: str  # train or sft
    paper: str
    model: str
    data: str
    compare: str
    runs: str
    config: Config


def main(argv: list[str]) -> None:
    path = parse(argv).page
    path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {path}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, metavar="PAGE.md")
    return parser.parse_args(argv)


def page(text: str) -> str:
    """The text of a page with its table written again. UserError if it has no place for one."""
    if not MARKERS.are_in(text):
        raise UserError(f"the page has no lines {MARKERS.begin} and {MARKERS.end}, between which the table stands")
    return MARKERS.filled(text, table())


def table() -> str:
    """One row per recipe."""
    lines = ["| recipe | paper | model | data | rewards | loss | runs here |", "|---|---|---|---|---|---|---|"]
    for recipe in map(read_recipe, RECIPES):
        link = f"[{recipe.name}](../launch/configs/{recipe.name}.yaml)"
        cells = [link, linked(recipe.paper), recipe.model, recipe.data, rewards(recipe), loss(recipe), recipe.runs]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read_recipe(name: str) -> Recipe:
    """The configuration of that name, and its first lines."""
    head = Path(find_config(name)).read_text(encoding="utf-8").partition("\nrun:\n")[0]
    paper, model, data, compare, runs = (
        _said(head, key) for key in ("Paper", "Model", "Data", "Compare with", "Runs here")
    )
    verb = re.search(r"launch/(train|sft)\.py", head)
    return Recipe(name, verb[1] if verb else "", paper, model, data, compare, runs, load_config([name]))


def _said(head: str, key: str) -> str:
    """What follows `# KEY: ` up to the next line that begins so, or that names a source."""
    found = re.search(
        rf"^# {key}: (.+?)(?=\n# [A-Z][\w ]*: |\n# \[|\n# Model, data|\Z)", head, re.DOTALL | re.MULTILINE
    )
    return " ".join(found[1].replace("\n# ", " ").split()) if found else ""


def linked(name: str) -> str:
    """A paper of arXiv, or a repository, as a link."""
    if match := re.fullmatch(r"arXiv (\d+\.\d+)", name):
        return f"[{match[1]}](https://arxiv.org/abs/{match[1]})"
    return f"[{name.rpartition('/')[2]}](https://{name})"


def rewards(recipe: Recipe) -> str:
    """The rewards with their weights, but those of weight 0: `2 accuracy + format`."""
    if recipe.verb == "sft":
        return "none: right answers"
    weights = [(name, weight) for name, weight in recipe.config.reward.weights.items() if weight]
    return " + ".join(short_name(name) if weight == 1 else f"{weight:g} {short_name(name)}" for name, weight in weights)


def loss(recipe: Recipe) -> str:
    """The named loss with the group size, the temperature, the KL weight and the learning rate."""
    config = recipe.config
    rate = f"lr {config.optim.lr:g}"
    if recipe.verb == "sft":
        return f"SFT, {rate}"
    rollout, order = config.rollout, config.data.order
    parts = [config.loss.kind, f"G {rollout.group_size}", f"T {rollout.temperature:g}", f"β {config.loss.beta:g}", rate]
    return ", ".join([*parts, *([f"{order} by {config.data.order_by}"] if order in ("sorted", "staged") else [])])


if __name__ == "__main__":
    run(main)
