"""Training with what a user would pick instead: dense, PowerSGD, layer-wise top-k and DLS.

    python -m benchmarks.convergence.peers
    python -m benchmarks.convergence.peers --tasks images --seeds 0

Four workers, simulated as in ``benchmarks.convergence``: the same tasks, batches and learning
rates, tuned for dense. PowerSGD has momentum in the optimizer, as with torch's hook, and is dense
for the tenth of the steps that is warm-up for the sparse ones. Bytes are what a worker puts on the
wire in a step, mean of all steps: a ring allreduce for what is dense or a factor, P - 1 payloads
for what is sparse. *Steps*: until the held-out loss is what dense training of that seed has after
80 % of its steps. Each run is kept in build/convergence-peers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common.command_line import make_parser
from benchmarks.common.paths import ROOT
from benchmarks.common.reporting import markdown
from benchmarks.convergence.settings import MOMENTUM, SEEDS, WARMUP, WORKERS
from benchmarks.convergence.sweep import make_missing, result_of
from benchmarks.convergence.tasks import TASKS
from benchmarks.convergence.times import TARGET_AT, loss_at, steps_to

KEPT = ROOT / "build" / "convergence-peers"
Results = dict[tuple[str, str, int], dict[str, Any]]


class Peer(NamedTuple):
    """A way to train.

    Attributes:
        title: its name in the table.
        options: of the compressor; None: none.
        rank: of PowerSGD; None: another way.
    """

    title: str
    options: dict[str, Any] | None = None
    rank: int | None = None


PEERS = {
    "dense": Peer("dense"),
    **{f"powersgd-{r}": Peer(f"PowerSGD, rank {r}", rank=r) for r in (1, 2, 4)},
    "layerwise-0.01": Peer("layer-wise top-k, 1 %", {"strategy": "layerwise", "density": 0.01}),
    "dls-0.01": Peer("DLS, 1 %", {"density": 0.01}),
    "dls-0.001": Peer("DLS, 0.1 %", {"density": 0.001}),
}


def description(task: str, name: str, seed: int, steps: int | None) -> dict[str, Any]:
    """Returns all that a run's result follows from: see ``training.train``."""
    of, peer = TASKS[task], PEERS[name]
    steps = steps or of.steps
    about = {
        "task": task,
        "workers": WORKERS,
        "seed": seed,
        "steps": steps,
        "rate": of.rate,
        "batch": of.batch,
        "options": None,
        "optimizer_momentum": MOMENTUM,
    }
    if peer.rank is not None:
        about |= {"powersgd": peer.rank, "dense_steps": round(WARMUP[0.01] * steps)}
    if peer.options is not None:
        warmup = WARMUP[peer.options["density"]]
        about["optimizer_momentum"] = 0.0
        about["options"] = peer.options | {
            "momentum": MOMENTUM,
            "momentum_masking": of.masking,
            "warmup_steps": round(warmup * steps),
            "measure_every": 0,
        }
    return about


def bytes_of(result: dict[str, Any]) -> float:
    """Returns the bytes that a worker puts on the wire in a step."""
    dense, sparse = float(result["dense_bytes"]), float(result["sparse_bytes"])
    p = int(result["about"]["workers"])
    return 2 * (p - 1) / p * dense + (p - 1) * sparse


def table(task: str, results: Results) -> str:
    """Formats the figures of a task: mean of all seeds and its standard deviation."""
    of, rows = TASKS[task], []
    targets = {
        seed: loss_at(result, TARGET_AT)
        for (t, name, seed), result in results.items()
        if (t, name) == (task, "dense")
    }
    for name, peer in PEERS.items():
        own = {seed: r for (t, n, seed), r in results.items() if (t, n) == (task, name)}
        values = [r["accuracy"] if of.accuracy else r["loss"] for r in own.values()]
        good = np.array([value for value in values if value is not None])
        if not len(good):
            continue
        mean, deviation = good.mean(), good.std(ddof=1) if len(good) > 1 else 0.0
        steps = [steps_to(r, targets[s]) for s, r in own.items() if s in targets]
        reached = f"{np.median(steps):.0f}" if steps and np.isfinite(np.median(steps)) else "-"
        rows.append(
            [
                peer.title,
                f"{np.mean([bytes_of(r) for r in own.values()]) / 1e3:.0f}",
                f"{100 * mean:.1f} ± {100 * deviation:.1f}"
                if of.accuracy
                else f"{mean:.3f} ± {deviation:.3f}",
                reached,
                f"{len(good)} of {len(own)}",
            ]
        )
    metric = "accuracy, %" if of.accuracy else "loss, nats"
    return markdown([task, "kB a step", metric, "steps", "seeds"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the runs that are missing and prints the tables; returns the exit status."""
    parser = make_parser("convergence.peers", __doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of a thread each")
    parser.add_argument("--steps", type=int, help="of every run (default: the task's)")
    parser.add_argument("--folder", type=Path, default=KEPT, help="where results are kept")
    args = parser.parse_args(arguments)
    runs = {}
    for seed in args.seeds:
        for task in args.tasks:
            for name in args.peers:
                about = description(task, name, seed, args.steps)
                runs[task, name, seed] = about, args.folder / task / f"{name}-{seed}.json"
    failed = make_missing(runs.values(), args.jobs)
    results = {key: result for key, each in runs.items() if (result := result_of(*each))}
    for task in args.tasks:
        print(f"\n{table(task, results)}")
    print(*failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
