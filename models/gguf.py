"""A language model of llama.cpp, a GGUF file, as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from hark.data.errors import DataError
from hark.data.torchaudio_compat import torchaudio  # noqa: F401  (must precede transformers)

MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def import_gguf(source: Path, out: Path) -> int:
    """Write the model and the tokenizer of a GGUF file to `out` in float32; return the number of parameters.

    Quantised weights are written as what they stand for. Raises DataError for a file that transformers cannot read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        stored = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    except ImportError as error:
        raise DataError(f"{source}: reading GGUF needs two more packages: pip install gguf accelerate") from error
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise DataError(f"{source}: transformers cannot read it ({' '.join(str(error).split())[:200]})") from error
    # A model that was read from GGUF refuses to be saved, so its weights go to one that is not marked as such.
    weights, config = stored.state_dict(), stored.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.load_state_dict(weights)
    model.generation_config = stored.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model.num_parameters()
