"""A formula for the time of a step, fitted to measurements, and where DLS pays by it.

    python -m benchmarks.cost_model build/exchange.json build/network.json --picture cost.png
    python -m benchmarks.cost_model build/network.json --check build/hosts.json

Takes JSON files of benchmarks.exchange and benchmarks.network. The time of a step, of P ranks over
links of B bytes a second:

    dense   start + (hop + ring) P' + copy N             + wire 2 P'/P 4 N / B
    fp16    start + (hop + ring) P' + copy N + convert N + wire 2 P'/P 2 N / B
    sparse  start + operation b + hop P' b + pass N + entry K P
                                              + wire (P' payload + 2 P'/P rest) / B
    owners  start + operation 3 b + (hop + scatter) P' b + pass N + region N/P + entry 2 K
                                              + wire (received + 2 P'/P rest) / B

with P' = P - 1, N entries of the model, b buckets, K entries a rank sends, and `rest` the bytes
that go dense. `owners` is exchange="sparse_allreduce", `received` what its busiest rank receives:
of its own region from all others, and of theirs, what they hand out; the telemetry has it or, in
predictions, the plan. It has three operations a bucket: an alltoall of lengths, one of entries, and
an allgather.

In two levels (hierarchical=True) of H hosts with L ranks each, P is H in all that is sparse, a rank
selects from N/L entries and owns N/(H L), and there are two operations more a bucket, both inside
the host: an average, ring (L - 1) + copy N for all buckets together, as for a dense allreduce but
for the wire; and what came in is handed on, hop (L - 1) b.

All but the last term is time of a processor: where ranks share cores, each term counts as often as
ranks share one, P over the cores of the machine; so 16 ranks on two cores pay each of them eight
times. `wire` should come out a little above 1: headers. The terms are added up, as if nothing
overlapped. The first tables show the terms, and what they make beside what was measured; --check
shows that for measurements that are not fitted to. (`start` cannot be told from `copy` and `pass`
by measurements of a single model, nor `hop` by a single P, nor `operation` and what owners cost by
a few: then they share.)

The predictions are for ranks with a core each, as fast as measured. Instead of `hop`, `ring` and
`scatter` each operation takes P' times --latency-us, an allreduce twice. "Horovod" compares with
dense as fitted, on CPUs; "ideal" with an allreduce that costs nothing but the wire, as GPUs with
NCCL nearly have it, while DLS still pays for passes on a CPU. An allgather grows with P, an
allreduce does not: with P density above about 1.5 (float32), DLS sends more than dense and cannot
win on any link. Where owners add up, what is received grows by headers and sketches only, and steps
change P times fewer entries: the same density is not the same training (docs/scale.md).

With --per-host L, ranks share a host's link, and each exchange comes flat, and in two levels. With
--bucket-bytes, buckets of another size than the compressor's default: larger ones mean fewer
operations, and fewer hops.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.command_line import add_output_options, make_parser
from benchmarks.common.reporting import markdown, write_json
from benchmarks.common.shapes import MODELS
from benchmarks.cost_model.fit import OWNERS, TERMS, Point, fit, points_of
from benchmarks.cost_model.picture import draw
from benchmarks.cost_model.predictions import RATES, predict
from benchmarks.rounds.summary import title_of

UNITS = {
    "start": (1e3, "ms a step"),
    "operation": (1e3, "ms an operation of a bucket"),
    "hop": (1e3, "ms an operation and rank"),
    "ring": (1e3, "ms an allreduce and rank"),
    "copy": (1e9, "ns an entry of the model"),
    "convert": (1e9, "ns an entry of the model"),
    "pass": (1e9, "ns an entry of the model"),
    "entry": (1e9, "ns an entry received"),
    "region": (1e9, "ns an entry of an owner's region"),
    "scatter": (1e3, "ms a bucket and rank, with owners"),
    "wire": (1.0, "of the bytes claimed"),
}
RANKS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)


def show_terms(terms: np.ndarray) -> None:
    """Prints the terms."""
    fitted = [
        [name, f"{value * UNITS[name][0]:.3g}", UNITS[name][1]]
        for name, value in zip(TERMS, terms, strict=True)
    ]
    print(markdown(["term", "fitted", ""], fitted))


def show_beside(points: list[Point], terms: np.ndarray, what: str) -> list[dict[str, Any]]:
    """Prints what the terms make beside what was measured, and returns it.

    Args:
        points: measurements.
        terms: fitted to these, or to others.
        what: they are, in words.
    """
    rows: list[dict[str, Any]] = []
    for point in points:
        model = float(point.factors @ terms)
        rows.append(
            {
                "where": point.name,
                "method": point.method,
                "measured": point.seconds,
                "model": model,
                "error": model / point.seconds - 1,
            }
        )
    compared = [
        [
            row["where"],
            title_of(row["method"]),
            f"{1e3 * row['measured']:.0f}",
            f"{1e3 * row['model']:.0f}",
            f"{row['error']:+.0%}",
        ]
        for row in rows
    ]
    print(markdown(["", "method", "measured, ms", "model, ms", "error"], compared))
    errors = np.abs([row["error"] for row in rows])
    print(f"{what}: median {np.median(errors):.0%}, largest {errors.max():.0%}\n")
    return rows


def name_of(row: dict[str, Any]) -> str:
    """Returns the exchange of a prediction, in words."""
    name = "sparse allreduce" if row["exchange"] == OWNERS else "allgather"
    if row["averaged"] == 1:
        return name
    return f"{name}, two levels"


def show_predictions(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Prints the table of predictions, and what they do not know."""
    print(
        f"Predicted for {args.model}, values in {args.values}, latency {args.latency_us:g} µs; "
        "dense over DLS: Horovod on CPUs / an ideal allreduce\n"
    )
    lines = []
    for row in rows:
        ratios = [
            f"{row['ratio']['Horovod'][rate]:.3g} / {row['ratio']['ideal'][rate]:.3g}"
            for rate in RATES
        ]
        share = f"{row['bytes_over_dense']:.2%}"
        pays = [row["pays"]["Horovod"], row["pays"]["ideal"]]
        lines.append(
            [f"{row['density']:g}", str(row["ranks"]), name_of(row), share, *ratios, *pays]
        )
    head = ["density", "ranks", "exchange", "bytes of dense", *RATES]
    head += ["pays, Horovod", "pays, ideal"]
    print(markdown(head, lines))
    losing = [row for row in rows if row["pays"]["ideal"] == "never"]
    if losing:
        places = ", ".join(
            f"{row['ranks']} ranks at {row['density']:g}, {name_of(row)}" for row in losing
        )
        print(f"Loses on every link against an ideal allreduce: {places}.")
    print(
        "Not in the model: overlap with backward, Horovod's negotiation among many ranks, "
        "congestion. With so many ranks, take it for an order."
    )


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser("cost_model", __doc__)
    parser.add_argument("measured", type=Path, nargs="+", help="files of exchange or network")
    parser.add_argument(
        "--check", type=Path, nargs="+", default=[], help="files to compare with, not to fit to"
    )
    parser.add_argument("--model", choices=MODELS, default="resnet50", help="to predict for")
    parser.add_argument("--density", type=float, nargs="+", default=[0.01, 0.001])
    parser.add_argument("--values", default="float32")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument(
        "--per-host", type=int, default=1, help="ranks on each host, for hierarchical=True, too"
    )
    parser.add_argument("--bucket-bytes", type=int, help="of the compressor (default: its own)")
    parser.add_argument("--latency-us", type=float, default=20.0, help="of one hop of a ring")
    add_output_options(parser)
    return parser.parse_args()


def main() -> None:
    """Fits the formula and shows what it predicts."""
    args = parse()
    points = [point for path in args.measured for point in points_of(path)]
    terms = fit(points)
    show_terms(terms)
    fitted = show_beside(points, terms, "Errors")
    others = [point for path in args.check for point in points_of(path)]
    checked = show_beside(others, terms, "Errors of what is not fitted to") if others else []
    rows = predict(terms, args, any(OWNERS in p.method for p in points))
    show_predictions(rows, args)
    if args.json:
        result = {"terms": dict(zip(TERMS, terms, strict=True)), "fit": fitted}
        write_json(result | {"checked": checked, "predicted": rows}, args.json)
    if args.picture:
        draw(fitted, rows, args.picture)


if __name__ == "__main__":
    main()
