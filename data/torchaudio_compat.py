"""Import torchaudio on any build of torch; everything that needs torchaudio or transformers imports this first.

torchaudio 2.11 has one compiled extension, built for one CUDA version. With a CPU build of torch, or with another CUDA
build, the extension does not load and `import torchaudio` raises. The processors of transformers break as well, because
transformers imports torchaudio if it is installed. Hark uses torchaudio only for resampling, which does not need the
extension: if it does not load, torchaudio is imported again with a stub for the module that loads it.
"""

import sys
import types
from typing import Any


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


torchaudio = _import_torchaudio()
