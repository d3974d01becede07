"""What is installed is whole: the wheel, in an environment without the checkout, trains the small model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = {"hark": "hark", "grpo": "hark/grpo", "models": "hark/models", "data": "hark/data", "launch": "hark/launch"}

# Runs in the new environment: a few clips and questions, and a model of 0.3 M parameters.
BUILD = """
import json, sys
import hark
from hark.data.mini.build import build
from hark.models.mini import build_mini
build("data", train=8, validation=0, test=0)
build_mini("model", ["Which sound is this?"], vocabulary=320, hidden=64, layers=1, tower_hidden=64, tower_layers=1)
print(json.dumps({"file": hark.__file__, "prefix": sys.prefix}))
"""


@dataclass(frozen=True)
class Installed:
    """A new environment with the wheel in it, and a working directory that is not the checkout."""

    wheel: Path
    prefix: Path
    directory: Path

    def run(self, *words: str | Path) -> str:
        """The output of a command; PYTHONPATH is left out, so that only the environment is searched."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        result = subprocess.run(
            words, cwd=self.directory, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{words}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    def hark(self, *words: str) -> str:
        return self.run(self.prefix / "bin" / "hark", *words)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    """Built from a copy, because setuptools leaves build/ and hark.egg-info in the tree that it builds.

    The dependencies are those of the running environment: a .pth file adds their directories to the search path, and
    Python does not read the .pth files in directories that were added so, among them that of an editable install.
    """
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [Path(find_spec("pip").origin).parent, "--quiet", "--disable-pip-version-check"]  # any interpreter can run it
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", directory, source]
    subprocess.run([sys.executable, *pip, *build], check=True)
    (wheel,) = directory.glob("*.whl")
    prefix = directory / "environment"
    venv.create(prefix, with_pip=False)
    subprocess.run([prefix / "bin" / "python", *pip, "install", "--no-deps", "--no-index", wheel], check=True)
    (site,) = prefix.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    (directory / "work").mkdir()
    return Installed(wheel, prefix, directory / "work")


def test_the_wheel_holds_every_module_and_data_file_of_the_checkout_and_no_other_top_level_name(installed):
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"hark", "hark-0.1.0.dist-info"}
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {name for name in names if name.startswith("hark/")}
    assert found == expected, f"missing: {sorted(expected - found)}; more: {sorted(found - expected)}"
    assert {"hark/py.typed", "hark/launch/configs/r1_aqa.yaml", "hark/data/mini/recordings/dog.flac"} <= found


def test_the_installed_package_lists_its_verbs_and_trains_the_small_model_by_the_launcher(installed):
    assert "train a policy by GRPO" in installed.hark("--help")
    printed = installed.run(installed.prefix / "bin" / "python", "-c", BUILD)
    place = json.loads(printed.splitlines()[-1])
    assert Path(place["file"]).is_relative_to(installed.prefix) and Path(place["prefix"]) == installed.prefix
    installed.hark(
        "train", "--processes", "1", "mini", "model.path=model", "data.train=data/train.jsonl", "data.validation=null",
        "run.directory=run", "optim.steps=1", "optim.warmup_steps=0", "optim.prompts_per_step=2", "evaluation.every=0",
        "rollout.group_size=4", "rollout.max_new_tokens=12",
    )  # fmt: skip
    lines = [json.loads(line) for line in (installed.directory / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1]
    assert (installed.directory / "run" / "model" / "model.safetensors").exists()


def test_a_project_of_ones_own_begins_with_the_installed_package(installed):
    installed.hark("init", "mine")
    printed = installed.hark("new-model", "--data", "mine/train.jsonl", "--size", "tiny", "--out", "mine/model")
    assert "hark sft mine/sft.yaml model.path=mine/model" in printed
    assert (installed.directory / "mine" / "model" / "model.safetensors").exists()


# Clips and questions of one's own in a parquet file, and a policy of one's own.
OWN = """
import json
from pathlib import Path
import pyarrow, pyarrow.parquet
from hark.data.mini.build import build
from hark.models.mini import build_mini
build("own", train=8, validation=0, test=0)
rows = [json.loads(line) for line in Path("own/train.jsonl").read_text().splitlines()]
for row in rows:
    row["audio"] = Path("own", row.pop("audio_path")).read_bytes()
pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "own.parquet")
build_mini("own_model", ["Which is it?"], vocabulary=320, hidden=64, layers=1, tower_hidden=64, tower_layers=1)
Path("mine.py").write_text(
    "from hark.models.families.qwen2_audio import Qwen2AudioPolicy\\nclass Mine(Qwen2AudioPolicy):\\n    pass\\n"
)
"""


def test_an_own_policy_is_trained_on_an_own_parquet_file_by_one_command(installed):
    installed.run(installed.prefix / "bin" / "python", "-c", OWN)
    shutil.rmtree(installed.directory / "own")
    installed.hark(
        "train", "mini", "model.path=own_model", "model.policy=mine.py:Mine", "data.train=own.parquet",
        "data.validation=null", "run.directory=own_run", "optim.steps=1", "optim.warmup_steps=0",
        "optim.prompts_per_step=2", "evaluation.every=0", "rollout.group_size=4", "rollout.max_new_tokens=12",
    )  # fmt: skip
    assert (installed.directory / "own_run" / "model" / "model.safetensors").exists()
