"""Ways to exchange, at equal bytes: each rank's entries gathered, or added up by owners.

    python -m benchmarks.convergence.exchanges
    python -m benchmarks.convergence.exchanges --tasks code --layouts 64x1 --schemes gathered kept

Workers are simulated with NumPy alone (``schemes.py`` says what each way does), with momentum
correction and a warm-up.  *Layouts* are hosts x ranks on each; where a host has several, their
gradients are averaged first.  The batch is the same for all, shared out among the ranks.  Each run
is kept in build/convergence-exchanges; what is there is not run again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from benchmarks.common.command_line import make_parser
from benchmarks.common.paths import ROOT
from benchmarks.common.reporting import markdown
from benchmarks.convergence.schemes import SCHEMES, Scheme, density_for, received
from benchmarks.convergence.settings import MOMENTUM
from benchmarks.convergence.sweep import keep, result_of
from benchmarks.convergence.tasks import TASKS, Examples, Task, batch, evaluate, rate_at
from benchmarks.convergence.training import data_of, finite, machine
from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.schedule import density_at

KEPT = ROOT / "build" / "convergence-exchanges"
DENSE = "dense"
LAYOUTS = ("16x1", "32x1", "64x1", "8x8", "32x2")
TITLES = {
    DENSE: "dense",
    "gathered": "own top-k, gathered",
    "returned": "owners re-select, the rest returns to its senders",
    "kept": "owners re-select, and keep the rest",
    "oracle": "top-k of the sums (oracle)",
}
BATCH = {"code": 64}  # as many as the most ranks; else the task's
STEPS = {"code": 500, "images": 300}  # else the task's
RATES = {"code": 0.35}  # half of what is best over 2,400 steps of half the batch; else the task's
WARMUP = 0.1  # share of the steps
LIMIT = 0.1  # bytes that a host receives in a step, for each entry of the model


def description(
    task: str, layout: str, scheme: str, seed: int, steps: int | None, limit: float
) -> dict[str, Any]:
    """Returns all that a run's result follows from."""
    of, hosts = TASKS[task], int(layout.split("x")[0])
    return {
        "version": 2,
        "task": task,
        "layout": layout,
        "scheme": scheme,
        "seed": seed,
        "steps": steps or STEPS.get(task, of.steps),
        "batch": BATCH.get(task, of.batch),
        "rate": RATES.get(task, of.rate),
        "density": None if scheme == DENSE else round(density_for(scheme, hosts, limit), 8),
    }


def train(about: dict[str, Any]) -> dict[str, Any]:
    """Trains a model.

    Args:
        about: the ``description`` of a run.

    Returns:
        It, loss and accuracy on what was held out (None if it diverged), and the mean share of
        entries that were updated in a step behind the warm-up.
    """
    task, steps, density = TASKS[about["task"]], about["steps"], about["density"]
    hosts, each = map(int, about["layout"].split("x"))
    data, model = data_of(task.name), task.make_model(about["seed"])
    parameters = dict(model.named_parameters())
    n = sum(p.numel() for p in parameters.values())
    gradients_of = _gradients_of(task, model)
    momentum = MOMENTUM if density is None else 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
    scheme, config = None, DLSConfig()
    if density is not None:
        scheme = Scheme(about["scheme"], hosts, n, MOMENTUM, task.masking)
        config = DLSConfig(density=density, warmup_steps=round(WARMUP * steps))
    whole = replace(task, batch=about["batch"])  # the task's own may be smaller
    updated: list[float] = []
    for step in range(steps):
        examples = batch(whole, data.training, about["seed"], step, 0, 1)  # all ranks'
        gradients = gradients_of(examples, hosts * each)
        if not np.isfinite(gradients).all():
            return {"about": about, "loss": None, "accuracy": None, "updated": None}
        ours = gradients.reshape(hosts, each, n).mean(axis=1)
        if scheme is None:
            mean = ours.mean(axis=0)
        else:
            out = scheme.exchange(ours, max(1, round(density_at(config, step) * n)))
            mean = out.total / np.float32(hosts)
            if step >= config.warmup_steps:
                updated.append(out.updated / n)
        start = 0
        for parameter in parameters.values():
            part = torch.from_numpy(mean[start : start + parameter.numel()])
            parameter.grad = part.view_as(parameter)
            start += parameter.numel()
        optimizer.param_groups[0]["lr"] = about["rate"] / task.rate * rate_at(task, step, steps)
        optimizer.step()
    loss, accuracy = evaluate(model, data.validation)
    return {
        "about": about,
        "loss": finite(loss),
        "accuracy": finite(accuracy),
        "updated": float(np.mean(updated)) if updated else 1.0,
        "machine": machine(),
    }


def _gradients_of(task: Task, model: nn.Module) -> Callable[[Examples, int], np.ndarray]:
    """Returns what computes the gradients (ranks, n) of all ranks at once, of a step's examples.

    Batch norm has each rank's own statistics; those that run are worker 0's.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def loss_of(weights: dict[str, torch.Tensor], inputs: Any, targets: Any) -> torch.Tensor:
        scores = functional_call(model, weights, (inputs,)).flatten(0, -2)
        smoothing = 0.1 if task.accuracy else 0.0  # as ``tasks.loss``
        return F.cross_entropy(scores, targets.flatten(), label_smoothing=smoothing)

    each = vmap(grad(loss_of), (None, 0, 0))

    def gradients(examples: Examples, ranks: int) -> np.ndarray:
        inputs, targets = (x.reshape(ranks, -1, *x.shape[1:]) for x in examples)
        weights = {name: p.detach() for name, p in model.named_parameters()}
        for norm in norms:
            norm.track_running_stats = False
        with sdpa_kernel(SDPBackend.MATH):
            found = each(weights, inputs, targets)
        for norm in norms:
            norm.track_running_stats = True
        if norms:
            with torch.no_grad():
                model(inputs[0])
        return torch.cat([x.reshape(ranks, -1) for x in found.values()], 1).numpy()

    return gradients


def table(results: Sequence[dict[str, Any]], limit: float) -> str:
    """Formats what came out, for each task, layout and scheme: means over seeds."""
    rows = []
    keys = {(r["about"]["task"], r["about"]["layout"], r["about"]["scheme"]) for r in results}
    order = [DENSE, *SCHEMES]
    for task, layout, scheme in sorted(keys, key=lambda x: (x[0], _ranks(x[1]), order.index(x[2]))):
        own = [
            r
            for r in results
            if (r["about"]["task"], r["about"]["layout"], r["about"]["scheme"])
            == (task, layout, scheme)
        ]
        what = "accuracy" if TASKS[task].accuracy else "loss"
        values = np.array([math.nan if r[what] is None else r[what] for r in own])
        scale = 100 if TASKS[task].accuracy else 1
        spread = f" ± {scale * values.std(ddof=1):.3f}" if len(values) > 1 else ""
        hosts, density = int(layout.split("x")[0]), own[0]["about"]["density"]
        if density is None:
            cells = ["-", "-", "-"]
        else:
            bytes_in = received(scheme, hosts, density)
            updated = np.mean([r["updated"] or math.nan for r in own])
            cells = [f"{100 * density:.3f} %", f"{bytes_in:.3f}", f"{100 * updated:.2f} %"]
        number = f"{scale * values.mean():.3f}{spread}"
        rows.append([task, layout, TITLES[scheme], *cells, f"{len(own)}", number])
    head = ["task", "hosts x ranks", "exchange", "density", "bytes an entry", "updated", "seeds"]
    return markdown([*head, "accuracy, % / loss, nats"], rows)


def _ranks(layout: str) -> tuple[int, int]:
    hosts, each = map(int, layout.split("x"))
    return each, hosts


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the runs that are missing and prints the table; returns the exit status."""
    parser = make_parser("convergence.exchanges", __doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["images", "code"])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), metavar="HOSTSxRANKS")
    parser.add_argument("--schemes", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of every run (default: 500 or 300)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="bytes received for an entry")
    parser.add_argument("--folder", type=Path, default=KEPT, help="where results are kept")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs = []
    for seed in args.seeds:
        for task in args.tasks:
            for layout in args.layouts:
                for scheme in args.schemes:
                    about = description(task, layout, scheme, seed, args.steps, args.limit)
                    name = f"{layout}-{scheme}-{seed}-{args.limit:g}.json"
                    runs.append((about, args.folder / task / name))
    missing = [] if args.table else [each for each in runs if result_of(*each) is None]
    for about, file in tqdm(missing, unit="run"):
        keep(train(about), file)
    print(table([r for each in runs if (r := result_of(*each))], args.limit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
