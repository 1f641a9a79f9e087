"""Command line options of a job of rounds, which benchmarks have, too, and pass on."""

from __future__ import annotations

import argparse

from benchmarks.common.noise import TAILS
from benchmarks.common.shapes import MODELS

PASSED_ON = ("model", "rounds", "turn_seconds", "warmup", "profile_steps", "bucket_bytes", "tail")


def add_options(
    parser: argparse.ArgumentParser, model: str, rounds: int = 3, profile_steps: int = 0
) -> None:
    """Adds the options that a job and the benchmarks have in common.

    Args:
        parser: of the command line.
        model, rounds, profile_steps: default values.
    """
    parser.add_argument("--model", choices=MODELS, default=model, help="whose shapes to use")
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each method")
    parser.add_argument("--turn-seconds", type=float, default=1.0, help="of a method in a round")
    parser.add_argument("--warmup", type=int, default=20, help="steps for ratios to settle")
    parser.add_argument(
        "--profile-steps",
        type=int,
        default=profile_steps,
        help="further steps, to measure the parts of a step",
    )
    parser.add_argument("--bucket-bytes", type=int, help="of the compressor (default: its own)")
    parser.add_argument("--tail", choices=TAILS, default="normal", help="shape of the noise")


def options_of(args: argparse.Namespace) -> list[str]:
    """Returns the arguments by which a benchmark passes its options on to the job."""
    options = []
    for name in PASSED_ON:
        if getattr(args, name) is not None:
            options += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return options
