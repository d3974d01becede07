"""Import torchaudio on any build of torch; everything that needs torchaudio or transformers imports this first.

torchaudio 2.11 ships one compiled extension, built for one CUDA version. Beside a CPU build of torch, or another CUDA
build, loading it raises, and `import torchaudio` with it; transformers imports torchaudio when it is installed, so its
processors break too. Nothing used here (resampling, mel filterbanks) lives in the extension: where it does not load,
torchaudio is imported again with a stand-in for the module that loads it.
"""

import sys
import types


def _import_torchaudio() -> types.ModuleType:
    try:
        import torchaudio
    except (OSError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            del sys.modules[name]
        stub = types.ModuleType("torchaudio._extension")
        stub._IS_TORCHAUDIO_EXT_AVAILABLE = False
        stub.fail_if_no_align = lambda function: function
        sys.modules["torchaudio._extension"] = stub
        import torchaudio
    import torchaudio.functional

    return torchaudio


torchaudio = _import_torchaudio()
