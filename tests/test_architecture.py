"""The imports between the modules: they go one way, in no circle, annotations included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("grpo", "models", "data", "launch")
LIBRARIES = {"torch", "torchaudio", "transformers", "safetensors", "numpy", "yaml"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """What a file imports, wherever in it, without the leading `hark.` of our own modules."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            full = {f"{node.module}.{alias.name}".removeprefix("hark.") for alias in node.names}
            names |= full if full <= FILES.keys() else full | {node.module}  # of a package, or of a module
    return {name.removeprefix("hark.") for name in names}


FILES = {name_of(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
IMPORTS = {module: imported(path) for module, path in FILES.items()}
OWN = {module: {name for name in names if name in FILES} for module, names in IMPORTS.items()}


def below(module: str) -> set[str]:
    """All modules that a module needs, directly or not."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        new = OWN[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def modules(*prefixes: str) -> set[str]:
    return {module for module in FILES if module.startswith(prefixes) or module in prefixes}


def test_the_modules_are_found():
    assert {"grpo.trainer", "models.families.qwen2_audio", "data.sources.mmau", "launch.train"} <= FILES.keys()
    assert "grpo.reference" in OWN["grpo.trainer"] and "models.policy" in below("grpo.trainer")


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_module_needs_itself(module):
    assert module not in below(module)


@pytest.mark.parametrize(
    "package, allowed",
    [
        ("data", ("data",)),
        ("models", ("models", "data.chat", "data.errors", "data.features", "data.torchaudio_compat")),
        ("grpo", ("grpo", "models")),
    ],
)
def test_packages_import_only_what_is_below_them(package, allowed):
    arrows = {(module, name) for module in modules(package) for name in OWN[module]}
    assert {(module, name) for module, name in arrows if name not in modules(*allowed)} == set()


def test_the_sampler_and_the_scorer_do_not_need_one_another():
    assert "grpo.scorer" not in below("grpo.sampler") and "grpo.sampler" not in below("grpo.scorer")


@pytest.mark.parametrize("module", ["grpo.advantage", "grpo.loss"])
def test_the_mathematics_needs_only_torch(module):
    assert not OWN[module]
    assert {name.partition(".")[0] for name in IMPORTS[module]} & LIBRARIES == {"torch"}


def test_the_configuration_is_known_to_the_learners_and_the_loop_alone():
    """Everything below takes the few values that it needs; `ConfigError` may be raised anywhere."""
    knows = {module for module in modules("grpo", "models", "data") if "grpo.config.Config" in IMPORTS[module]}
    assert knows <= {"grpo.learner", "grpo.trainer", "grpo.sft", "grpo.loop"}


def test_runtime_and_instruments_are_below_the_hops():
    hops = modules("grpo") - modules("grpo.runtime", "grpo.instruments")
    needed = {name for module in modules("grpo.runtime") for name in below(module)}
    assert needed & hops <= {"grpo", "grpo.config"}, "the runtime needs no hop"
    assert not needed & modules("grpo.instruments.")


def test_no_family_is_imported_but_by_the_table_of_families():
    families = modules("models.families.")
    users = {module for module in modules("grpo", "models") if OWN[module] & families}
    assert users - families <= {"models.loading"}, "but a family may build on another"
