"""The greedy answers of vLLM for tests/engine.py, whose environment has neither Hark nor its versions of libraries."""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}  # GiB; read when vLLM is imported

import soundfile
from vllm import LLM, SamplingParams


def engine_of(model: str, **options: Any) -> LLM:
    return LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=1024, limit_mm_per_prompt={"audio": 1}, **options
    )


def main(question: str, answer: str) -> None:
    asked = json.loads(Path(question).read_text())
    # The logprobs are those after the bias, as the sampler's are without the suppressed tokens.
    engine = engine_of(asked["model"], max_num_seqs=4, logprobs_mode="processed_logprobs")
    sampling = SamplingParams(
        temperature=0,
        max_tokens=asked["tokens"],
        logprobs=1,
        stop_token_ids=asked["stop"],
        logit_bias={token: -100.0 for token in asked["never"]},
    )
    prompts = [
        {
            "prompt_token_ids": row["ids"],
            "multi_modal_data": {"audio": soundfile.read(row["clip"], dtype="float32")},
        }
        for row in asked["rows"]
    ]
    rows = []
    for output in engine.generate(prompts, sampling):
        tokens = list(output.outputs[0].token_ids)
        steps = zip(tokens, output.outputs[0].logprobs, strict=True)
        rows.append({"tokens": tokens, "logprobs": [step[token].logprob for token, step in steps]})
    Path(answer).write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
