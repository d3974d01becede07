"""Says where an exported model is, and what loading it without Hark needs on this machine."""

from pathlib import Path

from hark.data.torchaudio_compat import repair
from hark.shown import say


def announce_export(target: Path) -> None:
    """Print the directory of an export that transformers can load."""
    say(f"exported to {target}; transformers loads it by from_pretrained")
    command = repair()
    if command is not None:
        say(
            "in this environment transformers by itself loads no audio model, because the compiled extension of "
            f"torchaudio does not fit this build of torch; nothing needs the extension, so remove it: {command}",
        )
