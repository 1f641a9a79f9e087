"""How fast are the k largest of residual + gradient found, against the usual ways of doing it?

    python -m benchmarks.selection --quick

One thread each (ours: --threads); all methods take turns, so that what else the machine does hits
all alike.  The measure is np.add(residual, gradient, out=residual), which error feedback needs in
any case.

Two times are taken of each method.  "select": the others add the gradient to the residual, select
and clear what they selected; ours (``find``) only reads, and all writing is left to ``settle``.  So
the fair comparison is "step": the others also zero the gradient and scatter one rank's entries into
it; ours is ``find`` and ``settle``, which do the same (and make the sketch, which others do not).
The others' results are those of one step, too: DGC's is an approximation, kthvalue's may hold ties.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from tqdm import tqdm

from hvd_dls.core.jit import HAVE_NUMBA
from hvd_dls.core.selection import threads
from hvd_dls.core.selection.passes import Found, find, settle

SIZES = [1_000, 10_000, 100_000, 1_000_000, 10_000_000, 25_000_000, 100_000_000]
DENSITIES = [1e-4, 1e-3, 1e-2, 0.1]
FLOOR = "np.add"
OURS = ["hvd_dls", "hvd_dls, first step", "hvd_dls, one thread"]


class Case(NamedTuple):
    """One step of one layer."""

    residual: np.ndarray  # (n,) float32
    gradient: np.ndarray  # (n,) float32
    before: np.ndarray  # (n,) float32: residual + gradient one step before


def find_finite(*arguments: Any) -> Found:
    """``find``, of gradients without NaN and Inf."""
    found = find(*arguments)
    assert found is not None
    return found


# Data -------------------------------------------------------------------------------------------


def normal(n: int) -> Case:
    """Independent normal entries."""
    rng = np.random.default_rng(0)
    draw = [rng.standard_normal(n, dtype=np.float32) for _ in range(3)]
    return Case(draw[0], 0.3 * draw[1], draw[0] + 0.3 * draw[2])


def heavy(n: int) -> Case:
    """Laplace entries of scales that spread over decades."""
    rng = np.random.default_rng(0)
    scale = np.exp(1.5 * rng.standard_normal(n, dtype=np.float32))
    draw = [scale * rng.laplace(size=n).astype(np.float32) for _ in range(3)]
    return Case(draw[0], 0.3 * draw[1], draw[0] + 0.3 * draw[2])


def real(n: int) -> Case:
    """Gradients and residuals of a small network's training: step after step, end to end."""
    recorded = record()
    return Case(*(np.resize(recorded[name], n) for name in Case._fields))


@functools.cache
def record(steps: int = 50, density: float = 0.01) -> dict[str, np.ndarray]:
    """Trains a convolutional network (546,000 parameters) on sklearn's digits, with top-k."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    images, labels = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(4096, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in Case._fields}
    residual = np.zeros(sum(p.numel() for p in model.parameters()), np.float32)
    before = residual.copy()
    for step in range(steps + 10):
        batch = torch.randint(0, len(images), (32,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        gradients = [p.grad.numpy().ravel() for p in model.parameters() if p.grad is not None]
        gradient = np.concatenate(gradients)
        if step >= 10:  # the residuals have filled
            for name, values in zip(Case._fields, (residual, gradient, before), strict=True):
                parts[name].append(values.copy())
        before = residual + gradient
        found = find_finite(residual, gradient, int(density * len(residual)))
        settle(residual, gradient, found.indices, None, [], 1.0, np.empty_like(gradient))
        optimizer.step()
    return {name: np.concatenate(values) for name, values in parts.items()}


CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
DATA: dict[str, Callable[[int], Case]] = {"normal": normal, "heavy": heavy, "real": real}


# Methods ----------------------------------------------------------------------------------------
# Each yields when it has selected and again when the step is done.


def floor(residual: np.ndarray, gradient: np.ndarray, k: int) -> Iterator[None]:
    np.add(residual, gradient, out=residual)
    yield
    yield


def ours(
    last_threshold: float, count: int
) -> Callable[[np.ndarray, np.ndarray, int], Iterator[None]]:
    def method(residual: np.ndarray, gradient: np.ndarray, k: int) -> Iterator[None]:
        threads.use(count)
        found = find_finite(residual, gradient, k, last_threshold)
        yield
        sent = [(found.indices, found.values)]
        settle(residual, gradient, found.indices, None, sent, 1.0, gradient)
        yield

    return method


def argpartition(residual: np.ndarray, gradient: np.ndarray, k: int) -> Iterator[None]:
    np.add(residual, gradient, out=residual)
    indices = np.argpartition(np.abs(residual), len(residual) - k)[len(residual) - k :]
    values = residual[indices]
    residual[indices] = 0
    yield
    gradient[:] = 0
    gradient[indices] += values
    yield


def in_torch(
    select: Callable[[torch.Tensor, int], torch.Tensor],
) -> Callable[[np.ndarray, np.ndarray, int], Iterator[None]]:
    def method(residual: np.ndarray, gradient: np.ndarray, k: int) -> Iterator[None]:
        own, new = torch.from_numpy(residual), torch.from_numpy(gradient)
        own.add_(new)
        indices = select(own.abs(), k)
        values = own[indices]
        own[indices] = 0
        yield
        new.zero_()
        new.index_add_(0, indices, values)
        yield

    return method


def topk(magnitudes: torch.Tensor, k: int) -> torch.Tensor:
    return torch.topk(magnitudes, k, sorted=False).indices


def kthvalue(magnitudes: torch.Tensor, k: int) -> torch.Tensor:
    threshold = torch.kthvalue(magnitudes, len(magnitudes) - k + 1).values
    return (magnitudes >= threshold).nonzero().view(-1)


def dgc(magnitudes: torch.Tensor, k: int) -> torch.Tensor:
    """Deep Gradient Compression (Lin et al. 2018): a threshold from a sample of 1 %, adapted."""
    n = len(magnitudes)
    sampled = magnitudes[torch.randint(0, 100, ()) % n :: 100] if n >= 10_000 else magnitudes
    wanted = max(1, k * len(sampled) // n)
    threshold = torch.topk(sampled, wanted, sorted=False).values.min()
    indices = (magnitudes >= threshold).nonzero().view(-1)
    for _ in range(10):
        if len(indices) > 1.3 * k:
            threshold = threshold * 1.3
        elif len(indices) < 0.8 * k:
            threshold = threshold * 0.8
        else:
            break
        indices = (magnitudes >= threshold).nonzero().view(-1)
    return indices[:k]


# Measuring --------------------------------------------------------------------------------------


def measure(
    case: Case, k: int, repeats: int, clock: Callable[[], float], count: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each method and repetition: "select" and "step"."""
    last = find_finite(np.zeros_like(case.before), case.before, k).threshold
    methods = {
        FLOOR: floor,
        OURS[0]: ours(last, count),
        OURS[1]: ours(0.0, count),
        **({OURS[2]: ours(last, 1)} if count > 1 else {}),
        "DGC's sample": in_torch(dgc),
        "torch.topk": in_torch(topk),
        "torch.kthvalue": in_torch(kthvalue),
        "np.argpartition": argpartition,
    }
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
    """Small layers are measured more often: they are noisier, and it costs nothing."""
    return max(least, min(300, 3_000_000 // n))


def statistics(seconds: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return {"median": median, "low": low, "high": high, "min": min(seconds), "max": max(seconds)}


def run(args: argparse.Namespace) -> list[dict]:
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
    """The cases in which ours comes out worst against the best of the others."""
    ratios = []
    for row in rows:
        others = {m: s[part]["median"] for m, s in row["s"].items() if m not in (FLOOR, *OURS)}
        best = min(others, key=others.__getitem__)
        ratio = others[best] / row["s"][OURS[0]][part]["median"]
        ratios.append((ratio, f"{row['data']} n={row['n']} density={row['density']:g} {best}"))
    return f"{part}: best other / ours, worst cases: " + "; ".join(
        f"{ratio:.2f} ({where})" for ratio, where in sorted(ratios)[:3]
    )


def picture(rows: list[dict], path: Path) -> None:
    """Nanoseconds per entry of a step over the size: one panel per data and density."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(row["data"] for row in rows))
    densities = list(dict.fromkeys(row["density"] for row in rows))
    figure, panels = plt.subplots(
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
    figure.savefig(path, dpi=110)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=float, nargs="+", help="entries of a layer")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--threads", type=int, default=1, help="of ours")
    parser.add_argument("--repeats", type=int, help="at least (7; quick: 5)")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: for a machine that does other things"
    )
    parser.add_argument("--quick", action="store_true", help="sizes up to 25 million")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--picture", type=Path, help="also draw them here")
    args = parser.parse_args()
    if args.sizes is None:
        args.sizes = [n for n in SIZES if n <= 25_000_000] if args.quick else SIZES
    args.sizes = [int(n) for n in args.sizes]
    args.repeats = args.repeats or (5 if args.quick else 7)
    return args


def main() -> None:
    args = arguments()
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
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    if args.picture:
        picture(rows, args.picture)


if __name__ == "__main__":
    main()
