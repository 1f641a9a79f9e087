"""Time of finding the k largest entries of residual + gradient, beside the usual methods.

    python -m benchmarks.selection --quick

One thread each (ours: --threads); all methods take turns, so that what else the machine does hits
all alike. The unit is np.add(residual, gradient, out=residual), which error feedback needs in any
case.

Two times are taken of each method. "select": the others add the gradient to the residual, select
and clear what they selected; ours (``find``) only reads, and all writing is left to ``settle``. So
the fair comparison is "step": the others also zero the gradient and scatter one rank's entries into
it; ours is ``find`` and ``settle``, which do the same (and make the sketch, which others do not).
The others do not all find the same: DGC's result is an approximation, kthvalue's may hold ties.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common.command_line import add_output_options, make_parser
from benchmarks.common.internals import HAVE_NUMBA
from benchmarks.common.reporting import pyplot, save_picture, write_json
from benchmarks.selection.cases import DATA, Case
from benchmarks.selection.methods import FLOOR, OURS, all_methods, find_finite

SIZES = [1_000, 10_000, 100_000, 1_000_000, 10_000_000, 25_000_000, 100_000_000]
DENSITIES = [1e-4, 1e-3, 1e-2, 0.1]
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


def measure(
    case: Case, k: int, repeats: int, clock: Callable[[], float], count: int
) -> dict[str, dict[str, list[float]]]:
    """Measures all methods on one case.

    Args:
        case: the layer.
        k: how many to select.
        repeats: of each method.
        clock: one of CLOCKS.
        count: threads of this package's method.

    Returns:
        Seconds by method, by part ("select" or "step"), of each repetition.
    """
    last = find_finite(np.zeros_like(case.before), case.before, k).threshold
    methods = all_methods(last, count)
    taken: dict[str, dict[str, list[float]]] = {m: {"select": [], "step": []} for m in methods}
    residual, gradient = case.residual.copy(), case.gradient.copy()
    order = np.random.default_rng(0)
    for repetition in range(repeats + 1):
        # In random order, so that none always profits from what the one before left in the cache.
        for name in order.permutation(list(methods)).tolist():
            np.copyto(residual, case.residual)
            np.copyto(gradient, case.gradient)
            start = clock()
            for part in zip(("select", "step"), methods[name](residual, gradient, k), strict=True):
                if repetition:  # the first one compiles and fills caches
                    taken[name][part[0]].append(clock() - start)
    return taken


def repeats_for(n: int, least: int) -> int:
    """Returns how often to measure a layer: small ones are noisier, and repetition is cheap."""
    return max(least, min(300, 3_000_000 // n))


def statistics(seconds: list[float]) -> dict[str, float]:
    """Computes median, quartiles and extremes."""
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return {"median": median, "low": low, "high": high, "min": min(seconds), "max": max(seconds)}


def run(args: argparse.Namespace) -> list[dict]:
    """Measures all cases; returns a row of figures for each."""
    cases = [(d, n, p) for d in args.data for n in args.sizes for p in args.densities]
    rows: list[dict] = []
    with tqdm(total=len(cases), unit="case", disable=None) as bar:
        for data in args.data:
            for n in args.sizes:
                case = DATA[data](n)
                for density in args.densities:
                    bar.set_postfix_str(f"{data} n={n:.0e} density={density:g}")
                    k = max(1, round(density * n))
                    taken = measure(
                        case, k, repeats_for(n, args.repeats), CLOCKS[args.clock], args.threads
                    )
                    found = {m: {p: statistics(s) for p, s in t.items()} for m, t in taken.items()}
                    rows.append({"data": data, "n": n, "density": density, "k": k, "s": found})
                    bar.update()
    return rows


# Showing ----------------------------------------------------------------------------------------


def table(rows: list[dict], part: str) -> str:
    """Formats a part's times of all cases and methods."""
    methods = list(rows[0]["s"])
    lines = [
        f"{part}: median µs ±% (half the spread between quartiles); ours as multiples of {FLOOR}, "
        f"the others as multiples of {OURS[0]}",
        f"{'data':7}{'n':>10}{'density':>8}" + "".join(f"{m:>24}" for m in methods),
    ]
    for row in rows:
        cells = []
        for method in methods:
            s = row["s"][method][part]
            spread = 50 * (s["high"] - s["low"]) / s["median"]
            unit = FLOOR if method in (FLOOR, *OURS) else OURS[0]
            ratio = s["median"] / row["s"][unit][part]["median"]
            cells.append(f"{1e6 * s['median']:9.1f} ±{spread:3.0f}% {ratio:6.2f}x")
        cells = [f"{cell:>24}" for cell in cells]
        lines.append(f"{row['data']:7}{row['n']:>10}{row['density']:>8g}" + "".join(cells))
    return "\n".join(lines)


def worst(rows: list[dict], part: str) -> str:
    """Names the cases in which ours is slowest beside the best of the others."""
    ratios = []
    for row in rows:
        others = {m: s[part]["median"] for m, s in row["s"].items() if m not in (FLOOR, *OURS)}
        best = min(others, key=others.__getitem__)
        ratio = others[best] / row["s"][OURS[0]][part]["median"]
        ratios.append((ratio, f"{row['data']} n={row['n']} density={row['density']:g} {best}"))
    return f"{part}: best other / ours, worst cases: " + "; ".join(
        f"{ratio:.2f} ({where})" for ratio, where in sorted(ratios)[:3]
    )


def draw(rows: list[dict], path: Path) -> None:
    """Draws nanoseconds per entry of a step over the size, a panel per data and density."""
    kinds = list(dict.fromkeys(row["data"] for row in rows))
    densities = list(dict.fromkeys(row["density"] for row in rows))
    figure, panels = pyplot().subplots(
        len(kinds),
        len(densities),
        figsize=(3.2 * len(densities) + 1, 2.8 * len(kinds) + 1),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for panel, (kind, density) in zip(
        panels.flat, [(kind, density) for kind in kinds for density in densities], strict=True
    ):
        chosen = [row for row in rows if (row["data"], row["density"]) == (kind, density)]
        sizes = np.array([row["n"] for row in chosen])
        for method in chosen[0]["s"]:
            parts = [row["s"][method]["step"] for row in chosen]
            middle, low, high = (
                1e9 * np.array([p[key] for p in parts]) / sizes for key in ("median", "low", "high")
            )
            bold = {"linewidth": 2.5} if method == OURS[0] else {"linewidth": 1}
            dashes = "--" if method == FLOOR else ":" if method == OURS[1] else "-"
            (line,) = panel.loglog(
                sizes, middle, dashes, marker="o", markersize=3, label=method, **bold
            )
            panel.fill_between(sizes, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        panel.set_title(f"{kind}, density {density:g}", fontsize=9)
        panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("entries")
    for panel in panels[:, 0]:
        panel.set_ylabel("step: ns per entry")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="lower center", ncol=4)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    save_picture(figure, path, dpi=110)


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser("selection", __doc__)
    parser.add_argument("--sizes", type=float, nargs="+", help="entries of a layer")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--threads", type=int, default=1, help="of ours")
    parser.add_argument("--repeats", type=int, help="at least (7; quick: 5)")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: for a machine that does other things"
    )
    parser.add_argument("--quick", action="store_true", help="sizes up to 25 million")
    add_output_options(parser)
    args = parser.parse_args()
    if args.sizes is None:
        args.sizes = [n for n in SIZES if n <= 25_000_000] if args.quick else SIZES
    args.sizes = [int(n) for n in args.sizes]
    args.repeats = args.repeats or (5 if args.quick else 7)
    return args


def main() -> None:
    """Measures all cases and shows the figures."""
    args = parse()
    torch.set_num_threads(1)
    rows = run(args)
    for part in ("select", "step"):
        print(table(rows, part), worst(rows, part), sep="\n", end="\n\n")
    about = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "compiled": HAVE_NUMBA,
        "clock": args.clock,
        "threads": args.threads,
    }
    if args.json:
        write_json({"about": about, "rows": rows}, args.json)
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
