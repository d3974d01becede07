"""The tokens of a codec's codes in the vocabulary of a language model."""

from __future__ import annotations

from itertools import count
from typing import Any

from hark.models.policy import PolicyError

CODEC_TOKEN = "<|s_{}|>"  # the name of a code's token, as in Llasa (arXiv 2502.04128)


def code_ids(tokenizer: Any, name: str) -> tuple[int, ...]:
    """The tokens of the codes 0, 1, ..., by the name that `{}` in `name` makes of a code. PolicyError without any."""
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    for code in count():
        token = vocabulary.get(name.format(code))
        if token is None:
            break
        ids.append(token)
    if not ids:
        raise PolicyError(
            f"the tokenizer has no token {name.format(0)!r}, though config.json has codec_token={name!r}; expected the "
            "name of the codec tokens in the vocabulary, with {} for the number"
        )
    return tuple(ids)


def add_codec(model: Any, tokenizer: Any, codes: int) -> None:
    """Give a causal language model a token for each of `codes` codes, and name them in its config.

    Their embeddings are random, as in a new model. By default transformers makes them all nearly equal to the mean of
    the other embeddings, and training would first have to tell them apart.
    """
    tokenizer.add_tokens([CODEC_TOKEN.format(code) for code in range(codes)])
    rows = max(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.config.codec_token = CODEC_TOKEN
