"""Checks that a run directory holds no other run, and says what has changed when a run is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hark.data
import hark.grpo
import hark.launch
import hark.models
from hark.data.examples import Example
from hark.data.tables import PREFIX
from hark.from_file import own_digests
from hark.grpo.config import Config, ConfigError
from hark.grpo.runtime.checkpoint import newest_intact
from hark.grpo.runtime.collectives import World
from hark.grpo.runtime.manifest import Manifest, sha256_of
from hark.launch.common.plain_yaml import read_options
from hark.launch.common.questions import weighted
from hark.models.stored import weight_files

# Options that must not change when a run is resumed: those of the model, of what is trained, and of the order of the
# data. With others the run would be another one.
FIXED = (
    ("run", "seed"),
    ("model", "path"),
    ("model", "reference"),
    ("model", "policy"),
    ("model", "train"),
    ("lora", "rank"),
    ("lora", "alpha"),
    ("lora", "targets"),
    ("lora", "path"),
    ("data", "train"),
    ("data", "order"),
    ("data", "order_by"),
    ("data", "stages"),
    ("data", "band"),
    ("data", "held_out"),
    ("data", "template"),
    ("loss", "reference_every"),  # a checkpoint has the weights of a reference that moves
    ("optim", "prompts_per_step"),
)
OF_STAGES = ("optim", "steps")  # the stages of a curriculum divide the whole run
# Options that change what is measured, or which failures end a run, but no update that is done with both values:
# they may change, and it is said.
SAID = (
    ("evaluation", "limit"),
    ("data", "max_lost"),
    ("reward", "on_error"),
    ("reward", "timeout"),
    ("reward", "max_failed"),
    ("optim", "skip_nonfinite"),
)
# Options that change no figure, and the updates by rounding at most; they may always change.
FREE_SECTIONS = ("run", "sharding", "evaluation", "checkpoint", "log", "record")
FREE = (
    ("model", "tower_cache"),
    ("model", "recompute"),
    ("model", "compile"),
    ("model", "attention"),
    ("data", "workers"),
    ("data", "audio_root"),  # what clips hold is compared
    ("rollout", "batch"),
    ("rollout", "keep_prefill"),
    ("rollout", "cuda_graphs"),
    ("reward", "workers"),
    ("optim", "micro_batch"),
    ("optim", "micro_branches"),
)
# Names in run.allow_changed that are no options, and the facts of a checkpoint that they are about.
RANKS, DATA, CLIPS, MODEL, OWN_FILES = "ranks", "data", "clips", "model", "own_files"
# Endings of the files of a model or of a data set that are read from a directory; a README, say, may change.
READ = (".safetensors", ".json", ".jinja", ".txt", ".model", ".parquet", ".arrow")
ATTENTION = "attention"  # among the facts of a checkpoint: what model.attention=auto was on its device
LEFT_OUT = "left_out"  # among the facts of a checkpoint: the ids of the examples that the run left out when it began


def check_run_directory(config: Config) -> None:
    """Refuse to overwrite an earlier run, or to resume a run that was started with other settings."""
    directory = Path(config.run.directory)
    if config.run.resume:
        _refuse_another_run(config, directory)
    elif (directory / "metrics.jsonl").exists():
        raise ConfigError(
            f"{directory} already holds a run; continue it with run.resume=true, or choose another run.directory"
        )


def _refuse_another_run(config: Config, directory: Path) -> None:
    path = directory / "config.yaml"
    before = read_options(path)
    keys = (*FIXED, OF_STAGES) if config.data.order == "staged" else FIXED
    for name, old, new in changed(before, config, keys):
        raise ConfigError(
            f"{name} is {new!r}, but the run in {directory} was started with {old!r}; "
            "resume it with that value, or choose another run.directory"
        )


def changed(before: dict, config: Config, keys: Sequence[tuple[str, str]]) -> Iterator[tuple[str, object, object]]:
    """Of the (section, key) pairs those whose values differ: names, values in the saved configuration, new values.

    An option that the saved configuration lacks, because it is older than the option, counts as equal.
    """
    now = dataclasses.asdict(config)
    for section, key in keys:
        old, new = before.get(section, {}).get(key, now[section][key]), now[section][key]
        if old != new and old != json.loads(json.dumps(new)):  # a checkpoint has the configuration as JSON
            yield f"{section}.{key}", old, new


def facts(config: Config, world: World) -> dict[str, Any]:
    """What a checkpoint says about its run: the configuration, the ranks, and digests of data, models and code.

    Rank 0 reads all data and weights for it. What is named on the hub has no digest.
    Raises ConfigError for an option that no checkpoint can hold, so that a run ends at its start and not when it saves.
    """
    models = [name for name in (config.model.path, config.model.reference, config.lora.path) if name is not None]
    return {
        "config": _as_json(config),
        DATA: _digests(data_files(config)) if world.is_main else {},
        MODEL: _digests_of_models(models) if world.is_main else {},
        OWN_FILES: own_digests(),
        "code": source_digest(),
        "ranks": world.size,
    }


def clips_digest(examples: Sequence[Example], newest: Manifest | None) -> str:
    """The SHA-256 of the ids of the examples and of what their clips held when they were checked; "" without clips.

    newest: of a resumed run; its digest stays where a clip cannot be used any more, so that nothing is compared. The
    loader passes such clips over and counts them.
    """
    if any(example.fault for example in examples):
        return newest.about.get(CLIPS, "") if newest else ""
    lines = [json.dumps([example.id, *example.digests]) for example in examples if example.clips]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else ""


def _digests(names: Sequence[str]) -> dict[str, str]:
    """The digest of each of these files and directories; those that are not on this disk are left out."""
    found = {}
    for name in names:
        place = Path(name.removeprefix(PREFIX).rpartition(":")[0] if name.startswith(PREFIX) else name)
        if place.is_file():
            found[name] = sha256_of(place)
        elif place.is_dir():
            found[name] = digest_of(place, deep=name.startswith(PREFIX))
    return found


def _digests_of_models(names: Sequence[str]) -> dict[str, str]:
    """The digest of each of these directories of models and adapters that is on this disk."""
    return {name: digest_of(Path(name), weights=weight_files(Path(name))) for name in names if Path(name).is_dir()}


def digest_of(directory: Path, *, deep: bool = False, weights: Collection[Path] | None = None) -> str:
    """The SHA-256 of the names and contents of the files of a directory that are READ; `deep`: also below it.

    weights: of the safetensors files only these; a file that nothing reads may be of any size.
    """
    paths = sorted(path for path in directory.glob("**/*" if deep else "*") if path.suffix in READ and path.is_file())
    if weights is not None:
        paths = [path for path in paths if path.suffix != ".safetensors" or path.resolve() in weights]
    with ThreadPoolExecutor() as pool:  # a digest of 1 GB takes a second, without the interpreter's lock
        digests = pool.map(sha256_of, paths)
    lines = [f"{digest} {path.relative_to(directory)}" for digest, path in zip(digests, paths, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _as_json(config: Config) -> dict[str, Any]:
    """The sections of a configuration as JSON has them: the keys of mappings are texts."""
    sections = dataclasses.asdict(config)
    for section, options in sections.items():
        for key, value in options.items():
            try:
                options[key] = json.loads(json.dumps(value, allow_nan=False))
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"{section}.{key} holds what no checkpoint can hold ({error}); expected texts, finite numbers, "
                    "true, false, null, lists and mappings; write a date in quotes"
                ) from None
    return sections


def check_changes(config: Config, about: Mapping[str, Any], manifest: Manifest) -> list[str]:
    """What differs from a checkpoint from which a run is resumed, in words. Raises ConfigError for what is not allowed.

    about: the facts of the resumed run.
    """
    changes = dict(_changes(config, manifest.about, about))
    refused = [name for name in changes if name not in config.run.allow_changed]
    if refused:
        raise ConfigError(
            f"{config.run.directory}: since its checkpoint of step {manifest.step} "
            f"{'; '.join(changes[name] for name in refused)}; to go on all the same: "
            f"run.allow_changed=[{','.join([*config.run.allow_changed, *refused])}]"
        )
    said = [_sentence(*one) for one in changed(manifest.about.get("config", {}), config, SAID)]
    code = ["the code of hark has changed"] if manifest.about.get("code", about["code"]) != about["code"] else []
    return [*changes.values(), *said, *code]


def _sentence(name: str, old: object, new: object) -> str:
    return f"{name} has changed from {old!r} to {new!r}"


def left_out_before(config: Config, about: Mapping[str, Any], manifest: Manifest) -> list[str] | None:
    """The ids of the examples that the run of a checkpoint left out when it began.

    None if the data or their options have changed since: the order is another one then, of what can be used now.
    about: the facts of the resumed run.
    """
    changes = [name for name, _ in _changes(config, manifest.about, about)]
    return None if any(name.partition(".")[0] == DATA for name in changes) else manifest.about.get(LEFT_OUT)


def left_out_by(directory: Path) -> list[str] | None:
    """The same of the newest checkpoint of a run directory, whatever has changed; None if there is none."""
    manifest = newest_intact(directory / "checkpoints")
    return manifest.about.get(LEFT_OUT) if manifest else None


def _changes(config: Config, before: Mapping[str, Any], about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What run.allow_changed must name, each with a sentence."""
    options = [(section, key) for section, values in about["config"].items() for key in values]
    asked = [pair for pair in options if pair[0] not in FREE_SECTIONS and pair not in FREE + SAID]
    same_data = True
    for name, old, new in changed(before.get("config", {}), config, asked):
        same_data &= not name.startswith(f"{DATA}.")
        yield name, _sentence(name, old, new)
    for kind, what in ((DATA, "contents"), (MODEL, "files"), (OWN_FILES, "text")):
        for name, digest in about[kind].items():
            old = before.get(kind, {}).get(name, digest)
            # Older checkpoints have a digest of all safetensors files of a model's directory.
            if old != digest and not (kind == MODEL and old == digest_of(Path(name))):
                same_data &= kind != DATA
                yield kind, f"the {what} of {name} {'has' if kind == OWN_FILES else 'have'} changed"
    now = about.get(CLIPS)  # known once the clips are checked
    if same_data and now and (before.get(CLIPS) or now) != now:
        yield CLIPS, "the contents of clips have changed"
    if before.get("ranks", about["ranks"]) != about["ranks"]:
        yield RANKS, f"the number of ranks has changed from {before['ranks']} to {about['ranks']}"


def data_files(config: Config) -> list[str]:
    """The files of the questions of training and validation."""
    named = [files for files in (config.data.train, config.data.validation) if files is not None]
    return [name for files in named for name in weighted(files)[0]]


def source_digest() -> str:
    """The SHA-256 of the sources of hark."""
    digest = hashlib.sha256()
    for package in (hark.grpo, hark.models, hark.data, hark.launch):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
