"""The sampler beside an inference engine: seconds in which vLLM and Hark draw the same number of tokens, on the CPU.

    make benchmark-vllm                           in an environment of vLLM's own, which takes 4 GB; Linux, x86-64
    python -m tests.engine_speed PYTHON [THREADS [TURNS]]    PYTHON: the interpreter of such an environment

The model is that of `hark benchmark`, shape A: float32, clips of 10 s, 8 completions of each prompt, none of which
stops before the limit. Both start with waveforms and the question. vLLM gets a prompt once and draws `n=8`. The sides
run in turns, and medians are compared; a turn before them is not counted. Each turn has new clips, as vLLM keeps what
it has computed of a prompt.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hark.data.chat import messages
from hark.grpo.instruments.flops import best_matmul_rate
from hark.grpo.runtime.device import set_up
from hark.grpo.sampler import sample
from hark.launch.studies.sides import QUESTION, SECONDS, Size, build_model, machine, silence
from hark.models.audio_policy import AudioPolicy
from hark.models.loading import load_policy

GROUP = 8
SHAPES = (1, 24), (4, 24), (4, 128), (4, 256)  # prompts and tokens of a completion


class Engine:
    """vLLM in a process of its own, which tests/engine_draws.py runs. close() ends it."""

    def __init__(self, python: str, model: Path, threads: int):
        command = [python, str(Path(__file__).with_name("engine_draws.py")), str(model)]
        # vLLM's threads are not bound to cores, as Hark's are not; how they wait is not what `import hark` chooses.
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment.pop("GOMP_SPINCOUNT", None)
        self._log = (model / "engine.txt").open("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self.versions = self._answer()

    def draw(self, ids: list[int], clips: Sequence[Path], tokens: int) -> tuple[float, int, int]:
        """Seconds, and the tokens of the first prompt and of all completions, for a question about each clip."""
        assert self._process.stdin
        asked = {"ids": ids, "clips": list(map(str, clips)), "group": GROUP, "tokens": tokens}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        answer = self._answer()
        return answer["seconds"], answer["prompt"], answer["drawn"]

    def close(self) -> None:
        self._process.communicate()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._log.seek(0)
        raise SystemExit(self._log.read()[-4000:])


def main(engine: str, threads: str = "2", turns: str = "3") -> None:
    silence()
    set_up(int(threads))
    with tempfile.TemporaryDirectory() as name:
        model = Path(name)
        build_model(model, Size())
        policy = load_policy(model, train="nothing")
        assert isinstance(policy, AudioPolicy)
        theirs = Engine(engine, model, int(threads))
        about = machine()
        print(f"{about['cpu']}, {threads} threads, best rate {best_matmul_rate() / 1e9:.0f} G multiply-adds/s")
        print(f"Hark: torch {about['torch']}. vLLM {theirs.versions['vllm']}: torch {theirs.versions['torch']}")
        print(f"{'prompts':>7}{'tokens':>8}{'vLLM':>11}{'Hark':>11}{'vLLM / Hark':>13}", flush=True)
        for prompts, tokens in SHAPES:
            taken = [turn(theirs, policy, model, prompts, tokens) for _ in range(1 + int(turns))][1:]
            vllm, hark = map(median, zip(*taken, strict=True))
            print(f"{prompts:7}{tokens:8}{vllm:9.2f} s{hark:9.2f} s{vllm / hark:11.2f} x", flush=True)
        theirs.close()


def turn(engine: Engine, policy: AudioPolicy, place: Path, prompts: int, tokens: int) -> tuple[float, float]:
    """Seconds of vLLM and of the sampler for prompts with new clips. SystemExit if their work differs."""
    random = np.random.default_rng()
    waves = [0.1 * random.standard_normal(round(16_000 * SECONDS["A"]), dtype=np.float32) for _ in range(prompts)]
    clips = [place / f"{number}.npy" for number in range(prompts)]
    for clip, wave in zip(clips, waves, strict=True):
        np.save(clip, wave)
    theirs, *work = engine.draw(policy.ids(messages(QUESTION, 1)), clips, tokens)
    began = time.perf_counter()
    prepared = [policy.prepare(QUESTION, wave) for wave in waves]
    drawn = sample(
        policy, prepared, group_size=GROUP, max_new_tokens=tokens, temperature=1.0,
        keys=[(0, 0, n) for n in range(prompts)], stop=False,
    )  # fmt: skip
    ours = time.perf_counter() - began
    if work != [len(prepared[0].ids), int(drawn.mask.sum())]:
        raise SystemExit(f"vLLM computed {work} tokens, not {[len(prepared[0].ids), int(drawn.mask.sum())]}")
    return theirs, ours


if __name__ == "__main__":
    main(*sys.argv[1:])
