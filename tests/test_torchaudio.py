"""torchaudio and transformers work in every environment, or the user is told what makes them work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hark.data import torchaudio_compat
from hark.grpo.runtime.export import export
from hark.launch.common import exports
from hark.launch.common.exports import announce_export
from hark.models.loading import load_policy
from tests.ranks import on_ranks

# The compiled extension does not load, whether it does so in this environment or not.
BROKEN = """
import sys

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "torchaudio._extension":
            raise OSError("libcudart.so: cannot open shared object file")

sys.meta_path.insert(0, Broken())
try:
    import torchaudio
except OSError:
    pass
else:
    sys.exit("the extension is not broken")
from hark.data.torchaudio_compat import repair, torchaudio
import torch
print(torchaudio.functional.resample(torch.ones(1, 200), 200, 100).shape[-1])
print(repair())
"""
PLAIN = """
import sys
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration
print(type(AutoProcessor.from_pretrained(sys.argv[1])).__name__)
Qwen2AudioForConditionalGeneration.from_pretrained(sys.argv[1])
assert not [name for name in sys.modules if name.partition(".")[0] == "hark"]
"""


def python(code: str, *words: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)


def test_where_the_extension_does_not_load_torchaudio_resamples_and_the_repair_is_named():
    result = python(BROKEN)
    assert result.returncode == 0, result.stderr
    length, command = result.stdout.splitlines()
    assert length == "100" and command.startswith("rm ") and command.endswith("/torchaudio/lib/_torchaudio*")


def test_an_export_is_loaded_by_transformers_alone_or_the_announcement_says_what_that_needs(
    qwen2_audio_dir, tmp_path, capsys
):
    on_ranks(1, lambda world: export(load_policy(qwen2_audio_dir), tmp_path / "model", world))
    announce_export(tmp_path / "model")
    said = capsys.readouterr().out
    assert f"exported to {tmp_path}/model" in said
    result = python(PLAIN, tmp_path / "model")
    if torchaudio_compat.repair() is None:
        assert result.returncode == 0, result.stderr
        assert result.stdout == "Qwen2AudioProcessor\n"
    else:
        assert result.returncode != 0 and f"remove it: {torchaudio_compat.repair()}" in said


@pytest.mark.parametrize("command", [None, "rm lib/_torchaudio*"])
def test_the_announcement_names_a_repair_only_where_one_is_needed(command, monkeypatch, capsys):
    monkeypatch.setattr(exports, "repair", lambda: command)
    announce_export(Path("run/model"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + (command is not None) and (command or "run/model") in lines[-1]


def test_the_makefile_removes_what_the_repair_removes():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert f"rm -f .venv/lib/python*/site-packages/torchaudio/lib/{torchaudio_compat.EXTENSION}" in makefile
