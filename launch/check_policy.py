"""Check that a policy and transformers' own model of the same checkpoint agree, and print a table of what holds.

    python launch/check_policy.py MODEL [--policy path/to/file.py:Class] [--without-gradients]

MODEL is a Hugging Face directory or a hub name. Both models are loaded in float32 on the CPU, with gradients for all
weights: 16 bytes for each parameter, or 8 without gradients. The exit status is 1 if a property does not hold.
"""

import argparse
import sys

import torch

from hark.launch.common.contract import check, table
from hark.launch.common.entry import run
from hark.models.loading import load_policy
from hark.models.policy import PolicyError
from hark.shown import say, say_text


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    policy = load_policy(arguments.model, own=arguments.policy)
    kind = type(policy.model)
    if not hasattr(kind, "from_pretrained"):
        raise PolicyError(f"{kind.__name__}: is no model of transformers, so there is nothing to compare with")
    native = kind.from_pretrained(policy.directory, dtype=torch.float32, use_safetensors=True).eval()
    count = sum(parameter.numel() for parameter in policy.parameters())
    say(f"{arguments.model}: {kind.__name__} with {count / 1e6:.4g} M parameters, as {type(policy).__name__}")
    findings = list(check(policy, native, gradients=not arguments.without_gradients))
    say_text(table(findings))
    if not all(finding.holds for finding in findings):
        sys.exit(1)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--policy", metavar="FILE:CLASS", help="your own policy class")
    parser.add_argument("--without-gradients", action="store_true", help="compare values only")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
