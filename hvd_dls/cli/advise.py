"""``horovodrun ... hvd-dls advise``: what to expect of compression in this job."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvd_dls.advice.plan import OWNERS_FROM, Plan
from hvd_dls.errors import DLSError

if TYPE_CHECKING:
    from hvd_dls.advice.advice import Advice

FRAMEWORKS = ("torch", "tensorflow")
_DEFAULTS = Plan()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="a function without arguments that returns (model, step), or (model, step, optimizer),"
        " as hvd_dls.torch.advise takes them; modules here are found, too",
    )
    what.add_argument(
        "--shapes",
        type=_shapes,
        metavar="N[xN...],...",
        help="shapes of the parameters instead, first layer first, as in 784x1536,1536,1536x10",
    )
    parser.add_argument(
        "--compute-ms",
        type=_milliseconds,
        default=0.0,
        help="with --shapes: what forward and backward take together without any exchange "
        "(default: 0)",
    )
    parser.add_argument(
        "--compute-on",
        choices=("cpu", "gpu"),
        default="cpu",
        help="whether this takes a processor's time (default: cpu)",
    )
    parser.add_argument(
        "--densities",
        type=float,
        nargs="+",
        default=list(_DEFAULTS.densities),
        help=f"of DLS (default: {' '.join(map(str, _DEFAULTS.densities))})",
    )
    parser.add_argument(
        "--values", nargs="+", default=list(_DEFAULTS.values), help="float32, bfloat16, float16"
    )
    parser.add_argument(
        "--exchanges",
        nargs="+",
        metavar="EXCHANGE",
        help="of DLS: allgather, sparse_allreduce (default: the former; from "
        f"{OWNERS_FROM} ranks or hosts on, both)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=_DEFAULTS.seconds,
        help="for all turns, about; slow steps take longer (default: %(default)g)",
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=_DEFAULTS.turns,
        help="of each candidate (default: %(default)s)",
    )
    parser.add_argument(
        "--worth",
        type=float,
        default=_DEFAULTS.worth,
        help="how many times as fast a less cautious candidate has to be (default: %(default)g)",
    )
    parser.add_argument(
        "--framework", choices=FRAMEWORKS, help="default: the first of them that is installed"
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="where rank 0 writes all figures, too"
    )
    parser.add_argument("--quiet", action="store_true", help="no lines of progress")


def run(arguments: argparse.Namespace) -> int:
    """Prints the advice on rank 0.

    Returns:
        0; or 2 on all ranks alike, if there is none, with the reason on rank 0.
    """
    framework = arguments.framework or next(
        (name for name in FRAMEWORKS if importlib.util.find_spec(name)), None
    )
    if framework is None:
        print("hvd-dls advise: neither torch nor tensorflow is installed", file=sys.stderr)
        return 2
    try:
        return _run_with(framework, arguments)
    except BaseException:
        # Nothing that the interpreter or Horovod does at its end may wait for the other ranks.
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _run_with(framework: str, arguments: argparse.Namespace) -> int:
    hvd = importlib.import_module(f"horovod.{framework}")
    advising = importlib.import_module(f"hvd_dls.{framework}.advising")
    from hvd_dls.advice.ranks import everyone, on_all
    from hvd_dls.advice.trying import find_out

    hvd.init()
    lab = advising.make_lab()

    def say(text: str) -> None:
        if not arguments.quiet:
            print(f"hvd-dls advise: {text}", file=sys.stderr, flush=True)

    def finish(advice: Advice) -> None:
        if lab.rank == 0:
            print(advice, flush=True)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(advice.as_dict()), encoding="utf-8")

    status = 0
    try:
        advice = find_out(lab, lambda: (_plan(arguments), _subject(advising, arguments)), say)
        on_all(lab, lambda: finish(advice))
    except DLSError as error:
        status = 2
        if lab.rank == 0:
            print(f"hvd-dls advise: {error}", file=sys.stderr, flush=True)
    everyone(lab, "end", None)  # who ends first with an error ends all: rank 0 has told the reason
    hvd.shutdown()
    return status


def _plan(arguments: argparse.Namespace) -> Plan:
    return Plan(
        densities=tuple(arguments.densities),
        values=tuple(arguments.values),
        exchanges=arguments.exchanges and tuple(arguments.exchanges),
        seconds=arguments.seconds,
        turns=arguments.turns,
        worth=arguments.worth,
    )


def _subject(advising: Any, arguments: argparse.Namespace) -> Any:
    """The model to try.

    Raises:
        DLSError: the function is not there, or returns something else.
    """
    if arguments.shapes:
        busy = arguments.compute_on == "cpu"
        return advising.subject_of_shapes(arguments.shapes, arguments.compute_ms / 1e3, busy)
    if arguments.compute_ms:
        raise DLSError("--compute-ms with --model: the model's own time counts")
    made = _function(arguments.model)()
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise DLSError(
            f"{arguments.model} returned {type(made).__name__}: accepted are (model, step) and "
            "(model, step, optimizer)"
        )
    return advising.subject_of(*made)


def _function(text: str) -> Callable[[], Any]:
    module, colon, name = text.partition(":")
    if not colon or not module or not name:
        raise DLSError(f"--model {text}: accepted is MODULE:FUNCTION")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DLSError(f"--model {text}: {error}") from error
    if not callable(function):
        raise DLSError(f"--model {text}: {name} is no function")
    return function  # type: ignore[no-any-return]


def _shapes(text: str) -> list[tuple[int, ...]]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*(,[1-9]\d*(x[1-9]\d*)*)*", text):
        raise argparse.ArgumentTypeError(f"{text}: accepted is a list like 784x1536,1536,1536x10")
    return [tuple(map(int, shape.split("x"))) for shape in text.split(",")]


def _milliseconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: accepted is a number of milliseconds >= 0")
    return value
