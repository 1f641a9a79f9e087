"""Draws one step of a Horovod timeline: a lane for each operation, and backward behind them.

    python -m benchmarks.hosts --rate 100mbit -- horovodrun -np 2 --gloo --cache-capacity 0 \\
        --timeline-filename /tmp/timeline.json python -m benchmarks.timeline train
    python -m benchmarks.timeline draw /tmp/timeline.json timeline.png

`train` is an example; the timeline of any other torch job can be drawn, too. With
`--cache-capacity 0` Horovod writes down when each rank was ready; otherwise only for operations
that it sees the first time.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.command_line import make_parser
from benchmarks.common.reporting import pyplot, save_picture

LAYERS, WIDTH, BATCH, STEPS = 6, 1024, 512, 8
BUCKET = re.compile(r"allgather\.dls\.\d+\.\d+\.\d+")
COLORS = {
    "negotiation": "#cccccc",
    "allgather": "#2c7fb8",
    "allreduce": "#d95f02",
}


class Phase(NamedTuple):
    """A phase of an operation.

    Attributes:
        name: as Horovod calls it.
        depth: how many other phases it is a part of.
        start, end: in seconds.
    """

    name: str
    depth: int
    start: float
    end: float


class Operation(NamedTuple):
    """One operation of one step.

    Attributes:
        tensor: its name, "allgather.dls.0.1.0" or "allreduce.fc.weight".
        ready: when each rank asked for it, in seconds; empty if Horovod did not negotiate.
        phases: by their ends.
    """

    tensor: str
    ready: dict[int, float]
    phases: list[Phase]

    @property
    def start(self) -> float:
        """When the first rank asked for it, or when its first phase began."""
        return min([*self.ready.values(), *(phase.start for phase in self.phases)])

    @property
    def end(self) -> float:
        """When its last phase ended."""
        return max(phase.end for phase in self.phases)


def read(text: str) -> list[Operation]:
    """Reads a timeline.

    Args:
        text: what Horovod has written, which lacks its last bracket while the job runs.

    Returns:
        All operations, by their start.
    """
    text = text.strip().rstrip(",]").rstrip().rstrip(",")
    tensors: dict[int, str] = {}
    under_way: dict[int, Operation] = {}
    open_phases: dict[int, list[tuple[str, float]]] = {}
    done = []
    for event in json.loads(text + "]"):
        lane, seconds = event.get("pid"), event.get("ts", 0) / 1e6
        if event["ph"] == "M" and "name" in event["args"]:
            tensors[lane] = event["args"]["name"]
        if lane not in tensors:
            continue
        stack = open_phases.setdefault(lane, [])
        operation = under_way.setdefault(lane, Operation(tensors[lane], {}, []))
        if event["ph"] == "B":
            stack.append((event["name"], seconds))
        elif event["ph"] == "X" and event["name"].isdecimal():
            operation.ready[int(event["name"])] = seconds
        elif event["ph"] == "E" and stack:
            name, start = stack.pop()
            operation.phases.append(Phase(name, len(stack), start, seconds))
            if not stack and not name.startswith("NEGOTIATE"):
                done.append(under_way.pop(lane))
    return sorted(done, key=lambda operation: operation.start)


def step_of(operations: Iterable[Operation], number: int) -> list[Operation]:
    """Picks the operations of one step.

    Args:
        operations: of some steps.
        number: of the step, counted from the last, which is 0.

    Returns:
        The operations of buckets, then all others, by their start.

    Raises:
        ValueError: there is no allgather of a bucket.
    """
    of_tensor: dict[str, list[Operation]] = {}
    for operation in operations:
        of_tensor.setdefault(operation.tensor, []).append(operation)
    buckets = {name: found for name, found in of_tensor.items() if BUCKET.fullmatch(name)}
    if not buckets:
        raise ValueError(
            "no bucket's allgather (dls.<process set>.<model>.<bucket>) is in this timeline"
        )
    steps = max(map(len, buckets.values()))
    chosen = [x[-1 - number] for x in of_tensor.values() if steps - 1 <= len(x) > number]
    return sorted(chosen, key=lambda operation: (operation.tensor not in buckets, operation.start))


def kind(phase: Phase) -> str | None:
    """Returns which of COLORS a phase has; None for what surrounds the transfer."""
    if phase.name.startswith("NEGOTIATE"):
        return "negotiation"
    found = re.fullmatch(r"(?:GLOO|MPI|NCCL)_(ALLGATHER|ALLREDUCE)", phase.name)
    return found[1].lower() if found else None


def draw(operations: Sequence[Operation], file: Path) -> None:
    """Draws operations, which are those of one step."""
    from matplotlib.patches import Patch

    plt = pyplot()
    begin = min(operation.start for operation in operations)
    size = (11, 1.4 + 0.28 * len(operations))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    # A gradient's own operation starts when backward has made it; buckets start with their last.
    made = [x.ready[0] for x in operations if 0 in x.ready and not BUCKET.fullmatch(x.tensor)]
    legend: list[Any] = [Patch(color=color, label=name) for name, color in COLORS.items()]
    if made:
        axis.axvspan(1e3 * (min(made) - begin), 1e3 * (max(made) - begin), color="#e5f5e0")
        label = "backward on rank 0, from its first gradient to its last"
        legend.append(Patch(color="#e5f5e0", label=label))
    for lane, operation in enumerate(operations):
        for phase in operation.phases:
            if name := kind(phase):
                left, width = phase.start - begin, phase.end - phase.start
                bar: dict[str, Any] = {"height": 0.7, "color": COLORS[name], "linewidth": 1}
                axis.barh(lane, 1e3 * width, left=1e3 * left, edgecolor=COLORS[name], **bar)
        for seconds in operation.ready.values():
            axis.plot(1e3 * (seconds - begin), lane, "|", color="black", markersize=7)
    if made:
        legend += axis.plot([], [], "|", color="black", label="a rank is ready")
    names = [operation.tensor for operation in operations]
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="milliseconds")
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.legend(handles=legend, fontsize="small", ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    save_picture(figure, file, dpi=110)


def train() -> None:
    """Trains a model for a few steps, with layers that are large enough to be seen."""
    import horovod.torch as hvd
    import torch
    from torch import nn

    from hvd_dls.torch import DLSCompressor

    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    model = nn.Sequential(*layers)
    parameters = list(model.named_parameters())
    compression = DLSCompressor(parameters, density=0.05, bucket_bytes=8 << 20)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01),
        named_parameters=parameters,
        compression=compression,
    )
    for _ in range(STEPS):
        images = torch.randn(BATCH, WIDTH)
        optimizer.zero_grad()
        (model(images) - images).square().mean().backward()
        optimizer.step()
    hvd.shutdown()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the commands; returns the exit status."""
    parser = make_parser("timeline", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="a job to make a timeline of; run it with horovodrun")
    drawing = commands.add_parser("draw", help="draw a step of a timeline")
    drawing.add_argument("timeline", type=Path, help="written by horovodrun --timeline-filename")
    drawing.add_argument("picture", type=Path, help="file to write: .png, .svg, ...")
    drawing.add_argument("--before-last", type=int, default=1, help="steps before the last one")
    options = parser.parse_args(arguments)
    if options.command == "train":
        train()
        return 0
    try:
        operations = step_of(read(options.timeline.read_text()), options.before_last)
    except (OSError, ValueError) as problem:
        print(f"timeline: {problem}", file=sys.stderr)
        return 2
    draw(operations, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
