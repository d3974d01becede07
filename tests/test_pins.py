"""The pins are one version of each package that setup.cfg needs, within its bounds, with digests."""

from __future__ import annotations

import configparser
import re

import pytest
from packaging.requirements import Requirement

from tests.pins.write import OF_CUDA, PLACE, SOUNDS, blocks_of, name_of

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PLATFORMS = ("linux", "darwin", "win32")
DIGESTS = re.compile(r"( \\\n    --hash=sha256:[0-9a-f]{64})+\n")


def pins(*files: str) -> list[Requirement]:
    """Of each line a requirement of one version; its digests are checked."""
    found = []
    for file in files:
        for block in blocks_of((PLACE / f"{file}.txt").read_text().splitlines(keepends=True)):
            requirement = block.partition(" \\\n")[0]
            assert DIGESTS.fullmatch(block.removeprefix(requirement)), f"{file}.txt: {requirement} without digests"
            found.append(Requirement(requirement))
    assert found and all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) for pin in found)
    return found


def needed(*extras: str) -> list[Requirement]:
    options = configparser.ConfigParser(comment_prefixes=("#",))
    options.read(PLACE.parents[1] / "setup.cfg")
    texts = [options["options"]["install_requires"], *(options["options.extras_require"][extra] for extra in extras)]
    return [Requirement(line) for text in texts for line in text.splitlines() if line.strip()]


def holds(requirement: Requirement, python: str, platform: str) -> bool:
    machine = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": platform}
    return requirement.marker is None or requirement.marker.evaluate(machine)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("files", "extras"), [(["use"], ["plot"]), (["use", "test"], ["plot", "test"])])
def test_each_package_that_is_needed_is_pinned_once_within_its_bounds(python, platform, files, extras):
    versions = {}
    for pin in (pin for pin in pins(*files) if holds(pin, python, platform)):
        assert pin.name not in versions, f"{pin.name} is pinned twice"
        versions[pin.name] = str(pin.specifier)[2:]
    for requirement in (one for one in needed(*extras) if holds(one, python, platform)):
        name = requirement.name.replace("_", "-")
        assert requirement.specifier.contains(versions[name]), f"{requirement}, but {name} {versions[name]} is pinned"


def test_packages_of_cuda_are_in_a_file_of_their_own():
    assert all(pin.name.startswith(OF_CUDA) for pin in pins("cuda"))
    assert not any(pin.name.startswith(OF_CUDA) for pin in pins("use", "test"))
    assert not any(holds(pin, "3.11", platform) for pin in pins("cuda") for platform in ("darwin", "win32"))


def test_each_sound_has_a_file_of_its_own_with_digests():
    files = sorted(path.stem for path in (PLACE / "sounds").glob("*.txt"))
    assert [pins(f"sounds/{file}")[0].name for file in files] == files == sorted(map(name_of, SOUNDS))
