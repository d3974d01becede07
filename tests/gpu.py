"""What only a GPU can show: recorded decode steps, waiting for the device, FlexAttention's kernels, half precision.

    python -m tests.gpu        (or make test-gpu; a few minutes; on two GPUs or more also what ranks send one another)

It prints each figure beside its bound, and fails if one is beyond. Models are small and random, and sharded over a
world of one as in training. pytest does not collect it; tests/test_gpu.py runs it on the CPU as far as that goes. It
has been run on no GPU yet, so a bound may turn out to be wrong, too.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile

from hark.grpo.attention_check import BOUNDS, agreed_fault, largest_gap, layer_kinds
from hark.grpo.prefill import Prefix, prefilled
from hark.grpo.recorded import RecordedSteps, recorded_steps
from hark.grpo.runtime.collectives import World, joined_world, wait_for_all
from hark.grpo.runtime.cuda import WARM_UP_CALLS
from hark.grpo.runtime.sharding import device_mesh, gather_root, gathered, shard
from hark.grpo.sampler import sample
from hark.grpo.scorer import score
from hark.grpo.types import Rollout
from hark.models.attention import sdpa_attention
from hark.models.loading import load_policy
from hark.models.lora import whole
from hark.models.mini import build_mini
from hark.models.policy import Policy, Prompt
from tests.clips import waveform
from tests.ranks import as_torchrun

TEXTS = ("What is making this sound?", "How often does it ring, once, twice, or three times?", "Rising or falling?")
SECONDS = (2.03, 0.7, 1.4)
GROUP, WINDOW = 8, 64
# The calls of the CUDA runtime in which the host waits for the device.
WAITS = {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy"}


class Report:
    """Prints figures beside their bounds, and remembers those that are beyond."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def at_most(self, bound: float, what: str, value: float) -> None:
        good = value <= bound  # not a number is beyond any bound
        print(f"{'ok' if good else 'FAILED':8}{what:70} {value:9.2e}   at most {bound:.0e}", flush=True)
        if not good:
            self.failed.append(what)

    def exactly(self, wanted: float, what: str, value: float) -> None:
        print(f"{'ok' if value == wanted else 'FAILED':8}{what:70} {value:9.2e}   exactly {wanted:.0e}", flush=True)
        if value != wanted:
            self.failed.append(what)


def main() -> None:
    if not torch.cuda.is_available():
        print("tests/gpu.py: no CUDA device here, so nothing was checked", file=sys.stderr)
        raise SystemExit(1)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    with joined_world() as world:
        report = check(world)
    if torch.cuda.device_count() > 1:
        with tempfile.TemporaryDirectory() as name:
            as_torchrun(2, check_ranks, name)
    else:
        print(f"{'--':8}what two ranks send one another: not checked, there is one GPU")
    print(f"{len(report.failed)} failed" if report.failed else "all as it should be")
    raise SystemExit(bool(report.failed))


def exact_products() -> None:
    """No products of float32 in TF32, which has 10 bits of mantissa: parity would be that of half precision."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def check(
    world: World, *, hidden: int = 256, layers: int = 4, limits: tuple[int, int] = (70, 120), waits: int = 1
) -> Report:
    """All checks with a model of some size.

    limits: tokens of completions in two runs, which tell one step's waits. waits: of a decode step.
    """
    exact_products()
    report = Report()
    check_masked_attention(report, world.device)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tower = dict(tower_hidden=hidden // 2, tower_layers=2)
        build_mini(directory, TEXTS, vocabulary=512, hidden=hidden, layers=layers, **tower)
        check_recordings(report, world, directory, limits[0])
        check_waiting(report, world, directory, limits, waits)
        check_memory(report, world, directory, limits[0])
        check_gaps(report, world, directory, limits[0])
        check_compiled(report, world, directory, limits[0])
        check_flexattention(report, world, directory, "full")
        check_choice(report, world, directory, "full")
        look_back(directory, WINDOW)
        check_flexattention(report, world, directory, "windows")
        check_choice(report, world, directory, "windows")
    return report


def look_back(directory: Path, window: int) -> None:
    """Let every other layer of a checkpoint see a window only."""
    config = json.loads((directory / "config.json").read_text())
    text = config["text_config"]
    types = ["full_attention", "sliding_attention"] * text["num_hidden_layers"]
    text |= dict(use_sliding_window=True, sliding_window=window, layer_types=types[: text["num_hidden_layers"]])
    (directory / "config.json").write_text(json.dumps(config))


def make(world: World, directory: Path, *, dtype: torch.dtype = torch.float32, **settings) -> Policy:
    split = partial(shard, mesh=device_mesh(world), dtype=dtype)
    policy = load_policy(directory, device=world.device, dtype=dtype, shard=split, **settings)
    policy.model.generation_config.eos_token_id = list(range(100, 110))  # so that completions have unlike lengths
    return policy


def draw(policy: Policy, limit: int, **settings) -> Rollout:
    prompts = [policy.prepare(text, waveform(s, n)) for n, (text, s) in enumerate(zip(TEXTS, SECONDS, strict=True))]
    keys = [(0, 0, n) for n in range(len(prompts))]
    settings = dict(group_size=GROUP, max_new_tokens=limit, temperature=1.0, keys=keys) | settings
    with gathered(policy):
        return sample(policy, prompts, **settings)


def logprobs_of(policy: Policy, rollout: Rollout, prefix: Prefix | None = None) -> torch.Tensor:
    return score(policy, rollout.prompts, rollout.tokens, rollout.mask, group_size=GROUP, prefix=prefix)[0]


def check_recordings(report: Report, world: World, directory: Path, limit: int) -> None:
    """Recorded steps do what steps do: the same kernels, so the same bits, also after weights have moved."""
    policy = make(world, directory, dtype=torch.bfloat16)  # in float32 one process alone needs no FSDP
    graphs = recorded_steps(policy, wanted=True)
    for what in ("recorded steps", "recorded steps, weights gathered anew"):
        for batch in (None, 2):
            plain, recorded = (draw(policy, limit, batch=batch, recorded=how) for how in (None, graphs))
            same = plain.tokens.shape == recorded.tokens.shape and bool((plain.mask == recorded.mask).all())
            differing = int((plain.tokens != recorded.tokens).sum()) if same else plain.tokens.numel()
            report.at_most(0, f"{what}, batch {batch}: tokens that differ", differing)
            gap = (plain.logprobs - recorded.logprobs).abs().max().item() if same else torch.nan
            report.at_most(1e-6, f"{what}, batch {batch}: logprobs", gap)
        logprobs_of(policy, plain).sum().backward()  # reshards, so that the next rollout finds weights elsewhere


def check_waiting(report: Report, world: World, directory: Path, limits: tuple[int, int], expected: int) -> None:
    """The host waits once for each further step; what begins and ends a rollout waits as often in both runs."""
    policy = make(world, directory)
    for recorded in (None, recorded_steps(policy, wanted=True)):
        for limit in limits:
            warm_up(policy, limit, recorded)
        few, many = (waits_in(partial(draw, policy, limit, recorded=recorded, stop=False)) for limit in limits)
        what = f"waits for the device per decode step, {'recorded' if recorded else 'not recorded'}"
        report.exactly(expected, what, (many - few) / (limits[1] - limits[0]))


def warm_up(policy: Policy, limit: int, recorded: RecordedSteps | None) -> None:
    """Draw until libraries have their workspaces, and all steps are recorded."""
    for _ in range(WARM_UP_CALLS + 2 if recorded else 1):
        draw(policy, limit, recorded=recorded, stop=False)


def waits_in(function: Callable[[], object]) -> int:
    """How often the host waits for the device in a call."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler:
        function()
    return sum(event.count for event in profiler.key_averages() if event.key in WAITS)


def check_masked_attention(report: Report, device: torch.device) -> None:
    """Attention under an explicit mask in bfloat16, forward and backward, at lengths that are 64 modulo 128.

    The first rows have scores of about -60, so that the logsumexp of each is very small. cuDNN's kernel, which
    `set_up` switches off, returned NaN for the gradients of such queries. Against float32: values of up to 3 are
    rounded to 8 bits, and so are the gradients.
    """
    module = SimpleNamespace(num_key_value_groups=1, training=False, is_causal=True, scaling=0.125)
    generator = torch.Generator().manual_seed(0)
    q, k, v, wanted = (torch.randn(2, 4, 192, 64, generator=generator).to(device) for _ in range(4))
    q[:, :, :8], k[:, :, :8] = -7.6, 1.0
    allowed = torch.ones(192, 192, dtype=torch.bool, device=device).tril_()
    mask = torch.zeros(2, 1, 192, 192, device=device).masked_fill_(~allowed, -torch.inf)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (q, k, v)]
        output = sdpa_attention(module, *inputs, mask.to(dtype), scaling=0.125)
        gradients = torch.autograd.grad(output, inputs, wanted.to(dtype).transpose(1, 2))
        results.append([tensor.float() for tensor in (output, *gradients)])
    for name, expected, found in zip(("output", "of queries", "of keys", "of values"), *results, strict=True):
        gap = ((found - expected).norm() / expected.norm()).item()
        report.at_most(0.02, f"masked attention of 192 tokens, bfloat16: {name}", gap)


def check_ranks(name: str) -> None:
    """Two ranks, each with its own prompt, sum the gradients of one that has both; also as two replicas.

    Raises RuntimeError if they do not. Sums of some hundred products in another order: 1e-5 of a gradient's norm.
    """
    directory = Path(name) / "model"
    exact_products()
    with joined_world() as world:
        if world.is_main:
            tower = dict(tower_hidden=64, tower_layers=2)
            build_mini(directory, TEXTS, vocabulary=512, hidden=128, layers=2, **tower)
        wait_for_all(world)
        report = Report()
        tokens = torch.randint(100, (world.size * GROUP, 9), generator=torch.Generator().manual_seed(0))
        tokens = tokens.to(world.device)
        alone = load_policy(directory, device=world.device)
        prompts = tuple(alone.prepare(TEXTS[n], waveform(SECONDS[n], n)) for n in range(world.size))
        expected = gradients_of(alone, prompts, tokens)
        for replicas in (1, world.size):
            split = partial(shard, mesh=device_mesh(world, replicas))
            policy = load_policy(directory, device=world.device, shard=split)
            own = slice(world.rank * GROUP, (world.rank + 1) * GROUP)
            found = gradients_of(policy, prompts[world.rank : world.rank + 1], tokens[own])
            gap = max(((found[n] - g).norm() / g.norm()).item() for n, g in expected.items() if g.norm() > 1e-3)
            report.at_most(1e-4, f"gradients of {world.size} ranks, {replicas} replicas, rank {world.rank}", gap)
    if report.failed:
        raise RuntimeError(f"rank {world.rank}: {', '.join(report.failed)}")


def gradients_of(policy: Policy, prompts: tuple[Prompt, ...], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of the sum of all logprobs, whole, by the names of the weights."""
    logprobs, _ = score(policy, prompts, tokens, torch.ones_like(tokens, dtype=torch.bool), group_size=GROUP)
    logprobs.sum().backward()
    return {name: whole(p.grad) for name, p in policy.model.named_parameters() if p.grad is not None}


def check_memory(report: Report, world: World, directory: Path, limit: int) -> None:
    """A rollout leaves nothing behind but what it returns; of recorded ones, the first keep what they read."""
    policy = make(world, directory, dtype=torch.bfloat16)
    for recorded in (None, recorded_steps(policy, wanted=True)):
        warm_up(policy, limit, recorded)
        before = allocated(world)
        rollout = draw(policy, limit, recorded=recorded, stop=False)
        own = sum(t.nbytes for t in (rollout.tokens, rollout.mask, rollout.logprobs, rollout.stopped))
        what = f"MiB left by a rollout, {'recorded' if recorded else 'not recorded'}"
        report.at_most(2, what, (allocated(world) - before - own) / 2**20)


def allocated(world: World) -> int:
    return torch.cuda.memory_allocated() if world.device.type == "cuda" else 0


def check_gaps(report: Report, world: World, directory: Path, limit: int) -> None:
    """The sampler and the scorer agree, and float32 agrees with the CPU's.

    bfloat16 rounds logits of up to 4 by up to 2^-7 = 0.008, and activations on the way as coarsely.
    """
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        policy = make(world, directory, dtype=dtype)
        for attention in ("sdpa", "flex"):
            policy.attention = attention
            rollout = draw(policy, limit, recorded=recorded_steps(policy, wanted=True))
            with torch.no_grad():
                gap = (logprobs_of(policy, rollout) - rollout.logprobs).abs().sum() / rollout.mask.sum()
            report.at_most(bound, f"sampler_gap, {dtype}, {attention}", gap.item())
    policy, host = make(world, directory), load_policy(directory)
    rollout = draw(policy, limit)
    with torch.no_grad():
        there = score(host, rollout.prompts, rollout.tokens.cpu(), rollout.mask.cpu(), group_size=GROUP)[0]
        gap = (logprobs_of(policy, rollout).cpu() - there).abs().max().item()
    # MetricSums over 250 to 500 terms in another order, through some layers.
    report.at_most(1e-4, "logprobs against the CPU's, float32", gap)


def check_compiled(report: Report, world: World, directory: Path, limit: int) -> None:
    """Compiled layers compute what others do, in the sampler, whose steps are recorded, and in the scorer."""
    plain, policy = (make(world, directory, compile_layers=how) for how in (False, True))
    graphs = recorded_steps(policy, wanted=True)
    warm_up(policy, limit, graphs)
    rollout = draw(policy, limit, recorded=graphs)
    with torch.no_grad():
        expected, scored = (logprobs_of(one, rollout) for one in (plain, policy))
    report.at_most(1e-4, "logprobs of compiled layers, float32", (scored - expected).abs().max().item())
    gap = (scored - rollout.logprobs).abs().sum() / rollout.mask.sum()
    report.at_most(1e-5, "sampler_gap, compiled layers, recorded, float32", gap.item())


def check_choice(report: Report, world: World, directory: Path, layers: str) -> None:
    """What model.attention=auto checks at the start of a run, in whole rows and in branches after known prompts."""
    for dtype, bound in BOUNDS.items():
        policy = make(world, directory, dtype=dtype)
        for kind in layer_kinds(policy):
            for apart in (False, True):
                gap = largest_gap(kind, world.device, apart)
                report.at_most(bound, f"check of flex, {kind}, {'apart' if apart else 'whole'}", gap)
        report.exactly(0, f"check of flex, {layers}, {dtype}: faults", bool(agreed_fault(policy, world, (False, True))))


def check_flexattention(report: Report, world: World, directory: Path, layers: str) -> None:
    """FlexAttention gives what sdpa gives, in values and gradients.

    Also with the prompts apart, whose keys and values have gradients too. float32: both sum in blocks, in other orders,
    and FlexAttention computes powers of 2 rather than of e. bfloat16: both round each layer's output to 8 bits, one in
    256, at other values.
    """
    rollout = draw(make(world, directory), 24)
    weights = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0)).to(world.device)
    for dtype, value_bound, gradient_bound in ((torch.float32, 1e-4, 1e-3), (torch.bfloat16, 0.1, 0.1)):
        results = {}
        for attention, way in (("sdpa", ""), ("flex", ""), ("flex", ", recomputed"), ("flex", ", apart")):
            policy = make(world, directory, dtype=dtype, attention=attention, recompute=way == ", recomputed")
            known = prefilled(policy, rollout.prompts) if way == ", apart" else None
            logprobs = logprobs_of(policy, rollout, known.select(range(len(rollout.prompts))) if known else None)
            (weights * logprobs).sum().backward()
            if known:
                gather_root(policy)
                known.backward()
            gradients = [whole(p.grad) for p in policy.parameters() if p.requires_grad]
            results[attention, way] = logprobs.detach(), gradients
        expected, theirs = results.pop(("sdpa", ""))
        for (_, way), (logprobs, gradients) in results.items():
            what = f"flex against sdpa, {layers}, {dtype}{way}"
            report.at_most(value_bound, f"{what}: logprobs", (logprobs - expected).abs().max().item())
            # By the norm of each tensor's gradient: single numbers of a tensor may cancel out.
            gaps = [((a - b).norm() / b.norm()).item() for a, b in zip(gradients, theirs, strict=True)]
            report.at_most(gradient_bound, f"{what}: gradients", max(gaps))


if __name__ == "__main__":
    main()
