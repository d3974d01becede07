"""A text-to-speech policy: a causal language model whose completions are codec tokens.

Its config.json has the key `codec_token`, such as "<|s_{}|>": the name of a code's token in its vocabulary. Prompts are
text. A completion consists of codec tokens and the stop token; all other tokens have probability 0.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hark.data.torchaudio_compat import torchaudio  # noqa: F401  (must precede transformers)
from hark.models.codec_tokens import code_ids
from hark.models.families.causal_lm import CausalLMPolicy


class CodecLMPolicy(CausalLMPolicy):
    """Any `AutoModelForCausalLM` checkpoint whose config has `codec_token`.

    code_ids: the token of each code, in the order of the codes.
    """

    def __init__(self, model: nn.Module, path: Path):
        super().__init__(model, path)
        self.code_ids = code_ids(self.tokenizer, self.model.config.codec_token)
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        allowed = {*self.code_ids, *self.stop_ids}
        self.suppressed_ids = tuple(token for token in range(vocabulary) if token not in allowed)
