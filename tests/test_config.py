"""Configuration files: every value arrives unchanged, and every mistake is an error with its place."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import yaml

from hark.grpo.config import Config, ConfigError, differences, to_yaml
from hark.launch.common import config_file
from hark.launch.common.config_file import help_if_asked, load_config
from hark.launch.common.nearest import OTHER_NAMES

MINIMAL = "run: {directory: out}\nmodel: {path: mini}\n"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(yaml_text, *overrides) in an empty working directory, from the file c.yaml."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, *overrides: str) -> Config:
        Path("c.yaml").write_text(text, encoding="utf-8")
        return load_config(["c.yaml", *overrides])

    return load


def refused(load, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(text, *overrides)
    return str(error.value)


def test_a_minimal_file_gets_every_default(load):
    config = load(MINIMAL)
    assert (config.run.directory, config.model.path) == ("out", "mini")
    assert config.reward.weights == {"accuracy": 1.0, "format": 1.0}
    assert (config.rollout.group_size, config.optim.lr, config.data.train) == (8, 1e-6, None)


def test_the_defaults_pass_their_own_checks(load):
    config = load(MINIMAL)
    assert load(to_yaml(config)) == config


def test_yaml_round_trips_every_kind_of_value(load):
    overrides = ["optim.lr=3e-7", "data.train=1e-6", "run.directory=2026", "data.audio_root=null", "run.resume=true"]
    overrides += ["reward.weights={accuracy: 2, größe: 1e-3}", "evaluation.limit=10", "loss.advantage=none"]
    config = load(MINIMAL, *overrides)
    assert load(to_yaml(config)) == config
    assert config.data.train == "1e-6" and config.run.directory == "2026"


def test_a_config_cannot_be_changed(load):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(MINIMAL).optim.lr = 1.0


def test_the_last_override_wins_over_earlier_ones_and_the_file(load):
    config = load(MINIMAL + "optim: {steps: 5}\n", "optim.steps=6", "optim.steps=7")
    assert config.optim.steps == 7


@pytest.mark.parametrize("written", ["1e-6", "'1e-6'", "1.0e-06", "0.000001"])
def test_a_float_may_be_written_in_any_notation(load, written):
    assert load(MINIMAL + f"optim: {{lr: {written}}}\n").optim.lr == 1e-6
    assert load(MINIMAL, f"optim.lr={written}").optim.lr == 1e-6


def test_an_integer_becomes_a_float_where_a_float_is_expected(load):
    config = load(MINIMAL, "rollout.temperature=1", "reward.weights={accuracy: 2}")
    assert isinstance(config.rollout.temperature, float)
    assert isinstance(config.reward.weights["accuracy"], float)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.steps=1.5", "an integer"),
        ("optim.steps=true", "an integer"),
        ("optim.steps=null", "an integer"),
        ("optim.lr=fast", "a finite number"),
        ("optim.lr=true", "a finite number"),
        ("optim.lr=.nan", "a finite number"),
        ("optim.lr=inf", "a finite number"),
        ("optim.lr=[1.0]", "a finite number"),
        ("run.resume=1", "true or false"),
        ("run.resume='true'", "true or false"),
        ("run.directory=", "a string that is not empty"),
        ("reward.weights=accuracy", "a mapping"),
        ("reward.weights={}", "a mapping"),
        ("data.columns=[a]", "a mapping of names to names"),
        ("data.columns={answer: 1}", "a mapping of names to names"),
        ("reward.weights={accuracy: high}", "a finite number"),
        ("model.dtype=float16", "one of float32, bfloat16"),
        ("loss.advantage=mean", "one of std, population, none"),
        ("loss.kind=ppo", "one of grpo, dr_grpo, dapo"),
        ("loss.ratio_cap=1", "greater than 1"),
        ("data.long_clips=[crop]", "one of error, crop, skip"),
        ("evaluation.limit=all", "an integer"),
        ("evaluation.limit=0", "at least 1"),
        ("optim.steps=0", "at least 1"),
        ("run.seed=-1", "0 to 4294967295"),
        ("rollout.temperature=0", "greater than 0"),
        ("data.max_seconds=-1", "greater than 0"),
        ("loss.beta=-0.1", "at least 0"),
        ("loss.clip_low=1.5", "greater than 0 and at most 1"),
        ("loss.clip_low=0", "greater than 0 and at most 1"),
        ("optim.beta2=1", "at least 0 and less than 1"),
        ("optim.warmup_steps=501", "at most optim.steps (500)"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name_and_what_was_expected(load, override, expected):
    message = refused(load, MINIMAL, override)
    assert f"{override.split('=')[0]} must be {expected}" in message


def test_a_wrong_value_in_the_file_is_placed_at_its_line(load):
    message = refused(load, MINIMAL + "\noptim:\n  lr: 1e-6\n  steps: many\n")
    assert message == "c.yaml:6: optim.steps must be an integer, not 'many'"


def test_a_wrong_override_is_placed_at_itself(load):
    message = refused(load, MINIMAL, "optim.steps=many")
    assert message.startswith("override optim.steps=many: optim.steps must be an integer")


def test_a_string_field_of_the_file_takes_only_a_string(load):
    message = refused(load, "run: {directory: 2026}\nmodel: {path: mini}\n")
    assert message.startswith("c.yaml:1: run.directory must be a string")


def test_a_string_override_is_taken_as_it_stands(load):
    config = load(MINIMAL, "run.directory=a: b", "model.path=@x", "data.train=10.jsonl", "data.template='quoted'")
    assert (config.run.directory, config.model.path) == ("a: b", "@x")
    assert (config.data.train, config.data.template) == ("10.jsonl", "quoted")


def test_a_file_of_ones_own_is_found_beside_the_configuration_unless_one_is_where_we_are(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "there" / "mine.py").write_text("")
    file, text = tmp_path / "there" / "c.yaml", MINIMAL + "data: {template: mine.py:short}\n"
    file.write_text(text + "reward:\n  weights: {mine.py:brief: 1.0}\n  options: {mine.py:brief: {by: none.py:best}}\n")
    monkeypatch.chdir(tmp_path / "here")
    config, found = load_config([str(file)]), f"{tmp_path}/there/mine.py"
    assert config.data.template == f"{found}:short" and config.reward.weights == {f"{found}:brief": 1.0}
    assert config.reward.options == {f"{found}:brief": {"by": "none.py:best"}}, (
        "a file that is nowhere stays as written"
    )
    assert load_config([str(file), "data.template=mine.py:short"]).data.template == "mine.py:short", "from the shell"
    (tmp_path / "here" / "mine.py").write_text("")
    assert load_config([str(file)]).data.template == "mine.py:short"


def test_null_clears_an_optional_string(load):
    text = MINIMAL + "data: {train: t.jsonl, validation: v.jsonl}\n"
    config = load(text, "data.train=null", "data.validation=")
    assert (config.data.train, config.data.validation) == (None, None)


def test_a_tilde_is_the_home_directory(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert load(MINIMAL, "run.directory=~/runs").run.directory == "/home/someone/runs"


def test_a_list_of_strings_is_checked_item_by_item():
    assert config_file.convert(["a", "b"], list[str]) == ["a", "b"]
    for wrong in ("a", ["a", 1], None):
        with pytest.raises(ConfigError):
            config_file.convert(wrong, list[str])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rollouts:\n  group_size: 4\n", "c.yaml:3: unknown section rollouts; the nearest section is rollout"),
        ("rollout:\n  groups: 4\n", "c.yaml:4: unknown key rollout.groups; the nearest key is rollout.group_size"),
        ("learning_rate: 1e-4\n", "c.yaml:3: unknown key learning_rate; the nearest key is optim.lr"),
        ("optim: 1\n", "c.yaml:3: optim must be a mapping"),
        ("optim:\n  beta: 0\n", "c.yaml:4: unknown key optim.beta; the nearest key is loss.beta"),
    ],
)
def test_an_unknown_name_in_the_file_names_the_nearest_and_its_line(load, text, message):
    assert refused(load, MINIMAL + text).startswith(message)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("rollout.temprature=1", "the nearest key is rollout.temperature"),
        ("rolout.temperature=1", "unknown key rolout.temperature; the nearest key is rollout.temperature"),
        ("optim=1", "optim is a section; its keys are optim.steps, optim.prompts_per_step, "),
        ("temperature=1", "unknown key temperature; the nearest key is rollout.temperature"),
        ("optim.lr", "an override is written section.key=value"),
        ("optim.lr=[1", "not YAML"),
    ],
)
def test_a_wrong_override_names_itself_and_the_nearest(load, override, nearest):
    message = refused(load, MINIMAL, override)
    assert message.startswith(f"override {override}: ")
    assert nearest in message


MEANT = {
    "optim.lr": "optim.learning_rate learning_rate --optim.lr lr",
    "optim.prompts_per_step or optim.micro_batch": "batch_size optim.batch_size train.batch_size",
    "optim.micro_batch": "per_device_train_batch_size optim.gradient_accumulation_steps micro_batch_size",
    "optim.steps": "epochs optim.num_train_epochs max_steps optim.stepz optim.step",
    "optim.clip_norm": "max_grad_norm optim.grad_clip",
    "optim.warmup_steps": "optim.warmup warmup_ratio",
    "rollout.group_size": "num_generations rollout.n rollout.num_generations group-size",
    "rollout.max_new_tokens": "max_tokens max_length rollout.max_completion_length",
    "rollout.temperature": "optim.temperature rollout.temp",
    "loss.beta": "kl_coef loss.kl_coef optim.beta",
    "loss.clip_low or loss.clip_high": "epsilon clip_range",
    "lora.rank": "lora.r lora_r",
    "data.train": "train_file data.train_path dataset",
    "data.validation": "data.valid val_file",
    "run.directory": "output_dir run.output_dir run.dir",
    "model.path": "model_name_or_path model.name",
    "model.compile": "torch_compile",
    "model.recompute": "gradient_checkpointing",
    "evaluation.batch": "evaluation.batch_size eval_batch_size",
    "evaluation.every": "eval_steps",
    "checkpoint.every": "save_steps",
    "reward.weights": "rewards reward.accuracy reward.weights.accuracy",
}


@pytest.mark.parametrize(("name", "meant"), [(name, key) for key, names in MEANT.items() for name in names.split()])
def test_a_name_of_another_program_finds_the_option_that_it_means(load, name, meant):
    assert refused(load, MINIMAL, f"{name}=1").endswith(f"; the nearest key is {meant}")


def test_other_names_stand_at_options_that_there_are():
    assert OTHER_NAMES.keys() <= config_file.HINTS.keys()
    assert not {name for names in OTHER_NAMES.values() for name in names.split()} & {
        key.partition(".")[2] for key in config_file.HINTS
    } - {"batch", "path", "every"}, "a name that is an option's own is found without the table"


@pytest.mark.parametrize("required", ["run.directory", "model.path"])
def test_a_missing_required_key_is_named(load, required):
    section = required.split(".")[0]
    kept = {name: value for name, value in yaml.safe_load(MINIMAL).items() if name != section}
    assert refused(load, yaml.safe_dump(kept)).startswith(f"c.yaml: {required} is missing")


def test_a_required_key_may_come_from_an_override(load):
    assert load("", "run.directory=a", "model.path=b").model.path == "b"


def test_an_empty_section_keeps_its_defaults(load):
    assert load(MINIMAL + "optim:\n  # lr: 1e-6\n").optim.lr == 1e-6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- run\n", "c.yaml:1: the file must be a mapping"),
        ("run: 3\n", "c.yaml:1: run must be a mapping"),
        ("run: {directory: a\n", "c.yaml: not YAML"),
        ("run:\n  seed: 1\n  seed: 2\n", "c.yaml:3: seed is given twice in run"),
        ("run: {}\nmodel: {}\nrun: {}\n", "c.yaml:3: run is given twice in the file"),
        ("reward: {weights: {a: 1, a: 2}}\n", "c.yaml:1: a is given twice in reward.weights"),
        ("? [run]\n: {}\n", "c.yaml:1: a key of the file must be a plain name"),
        ("run: {directory: !python/object x}\n", "c.yaml:1: run.directory is not YAML"),
    ],
)
def test_a_file_of_the_wrong_form_is_refused_at_its_line(load, text, message):
    assert refused(load, text).startswith(message)


def test_a_missing_file_is_named_with_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^none\.yaml: no such file") as error:
        load_config(["none.yaml"])
    assert str(tmp_path) in str(error.value)


def test_a_directory_is_not_called_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("some/run").mkdir(parents=True)
    Path("some/run/config.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match="^some: a directory; expected a YAML file$"):
        load_config(["some"])
    with pytest.raises(ConfigError, match=r"it holds a run: CONFIG is some/run/config.yaml, with run.resume=true"):
        load_config(["some/run"])


def test_a_file_that_cannot_be_read_is_not_called_missing(load, monkeypatch):
    def denied(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(ConfigError, match=r"^c.yaml: cannot be read \(Permission denied\)"):
        load(MINIMAL)


def test_what_differs_from_the_defaults_makes_the_same_configuration_again(load):
    words = [
        "optim.lr=3e-7",
        "reward.weights={größe: 1e-3}",
        "run.resume=true",
        "data.train=a b.jsonl",
        "rollout.batch=2",
    ]
    config = load(MINIMAL, *words)
    lines = differences(config)
    assert lines[:2] == ["run.directory=out run.resume=true", "model.path=mini"] and len(lines) == 6
    assert load("", *shlex.split(" ".join(lines))) == config


def test_a_bare_name_is_a_configuration_of_the_package_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(["r1_aqa", "optim.steps=7"])
    assert config == load_config([str(config_file.CONFIGS / "r1_aqa.yaml"), "optim.steps=7"])
    assert config.run.directory == "runs/r1_aqa" and config.optim.steps == 7


def test_a_file_of_the_same_name_wins_over_the_package(load):
    Path("r1_aqa").write_text(MINIMAL)
    assert load_config(["r1_aqa"]).run.directory == "out"


def test_an_unknown_name_lists_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no configuration of that name; the package has .*mini, .*r1_aqa") as error:
        load_config(["r1"])
    assert all(path.stem in str(error.value) for path in config_file.CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("word", ["./mini", "configs/mini", "mini.yaml", "mini.yml"])
def test_a_word_with_a_directory_or_a_suffix_is_a_path_only(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"^{re.escape(word)}: no such file"):
        load_config([word])


def test_help_names_every_option_with_its_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as end:
        help_if_asked(["mini", "--help"], "Train.")
    assert end.value.code == 0
    lines = {line.split("=")[0].strip(): line for line in capsys.readouterr().out.splitlines() if "=" in line}
    for name in config_file.HINTS:
        assert re.search(r"=\S.*  \S", lines[name]), f"{name} has no default or no meaning"
    assert "rollout.group_size=8 " in lines["rollout.group_size"]
    assert "completions per prompt" in lines["rollout.group_size"]
    assert "model.path=REQUIRED" in lines["model.path"] and "data.train=null" in lines["data.train"]


@pytest.mark.parametrize("argv", [[], ["optim.lr=1"]])
def test_a_command_line_without_a_file_says_how_it_is_written(argv):
    with pytest.raises(ConfigError, match=r"CONFIG \[section\.key=value"):
        load_config(argv)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.rank=4", "lora.path=adapters"], "lora.rank and lora.path are both set"),
        (["lora.targets=[]"], "lora.targets is empty"),
        (["data.held_out=5", "data.validation=v.jsonl"], "data.held_out and data.validation are both set"),
        (["rollout.refill=1", "data.order=staged"], "rollout.refill is set, and data.order is staged"),
        (["rollout.refill=1", "rollout.group_size=1"], "rollout.refill is set, and rollout.group_size is 1"),
        (
            ["data.require_audio=false", "model.train=no-tower", "lora.rank=4", "lora.targets=[q_proj, tower.q_proj]"],
            "data.require_audio=false needs lora.targets without the tower's layers",
        ),
        (["model.master_dtype=bfloat16"], "model.master_dtype=bfloat16 needs model.dtype=bfloat16"),
    ],
)
def test_what_does_not_go_together_is_refused(load, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(MINIMAL, *overrides)


def test_an_option_with_dashes_is_named_as_it_is_written(tmp_path):
    with pytest.raises(ConfigError, match="--steps: an override is written section.key=value, here optim.steps=VALUE"):
        load_config(["mini", "--steps"])
