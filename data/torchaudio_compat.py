"""Import torchaudio on any build of torch; everything that needs torchaudio or transformers imports this first.

torchaudio 2.11 has one compiled extension, built for one CUDA version. With a CPU build of torch, or with another CUDA
build, the extension does not load and `import torchaudio` raises. The processors of transformers break as well, because
transformers imports torchaudio if it is installed. Hark uses torchaudio only for resampling, which does not need the
extension: if it does not load, torchaudio is imported again with a stub for the module that loads it.
"""

import shlex
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

EXTENSION = "_torchaudio*"  # the files that torchaudio looks for; where there are none, it does without its extension


def _import_torchaudio() -> types.ModuleType:
    try:
        import torchaudio
    except (OSError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            del sys.modules[name]
        stub: Any = types.ModuleType("torchaudio._extension")
        stub._IS_TORCHAUDIO_EXT_AVAILABLE = False
        stub.fail_if_no_align = lambda function: function
        sys.modules["torchaudio._extension"] = stub
        import torchaudio
    import torchaudio.functional

    return torchaudio


def repair() -> str | None:
    """The command that makes a plain `import torchaudio` work in this environment; None if it works already."""
    if hasattr(sys.modules["torchaudio._extension"], "__file__"):  # not the stub
        return None
    spec = find_spec("torchaudio")
    assert spec and spec.origin
    return f"rm {shlex.quote(str(Path(spec.origin).parent / 'lib'))}/{EXTENSION}"


torchaudio = _import_torchaudio()
