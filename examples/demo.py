"""Dense training, layer-wise top-k and DLS side by side, on real data, under horovodrun.

    make demo                                   PyTorch, two ranks, density 1%
    make demo FRAMEWORK=tensorflow
    make demo DEMO_ARGS="-np 4 --density 0.05"

Runs the framework's example, the one to copy from, once for each; prints a table and draws every
layer's threshold over the steps.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections import deque
from pathlib import Path
from statistics import fmean, median

import matplotlib
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EXAMPLES = {"torch": "torch_digits.py", "tensorflow": "tensorflow2_digits.py"}
KINDS = {"none": "dense", "layerwise": "layer-wise top-k", "dls": "DLS"}
BALANCED = 1.5  # a threshold spread below this counts as balanced


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--framework", choices=EXAMPLES, default="torch")
    parser.add_argument("-np", "--ranks", type=int, default=2, help="number of ranks")
    parser.add_argument("--density", type=float, default=0.01, help="share of entries sent a step")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="results folder")
    return parser.parse_args()


def train(kind, args):
    """One job; returns its test accuracy and rank 0's record of each step."""
    records = args.output / f"{kind}.jsonl"
    command = [str(Path(sys.executable).with_name("horovodrun")), "-np", str(args.ranks), "--gloo"]
    example = Path(__file__).with_name(EXAMPLES[args.framework])
    command += [sys.executable, str(example), "--compression", kind, "--records", str(records)]
    command += ["--density", str(args.density), "--epochs", str(args.epochs)]
    command += ["--seed", str(args.seed), "--log-interval", "1"]
    env = {"OMP_NUM_THREADS": "1", **os.environ}  # ranks share the cores of this machine
    print_at_failure = deque(maxlen=60)
    accuracy = None
    pause = 0.2 if sys.stderr.isatty() else 10  # seconds between updates of the bar
    with (
        subprocess.Popen(
            command, text=True, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as job,
        tqdm(desc=f"{KINDS[kind]:16}", unit=" steps", mininterval=pause) as progress,
    ):
        for line in job.stdout:
            print_at_failure.append(line)
            if step := re.search(r"step (\d+)/(\d+) .*loss (\S+)", line):
                progress.total = int(step[2])
                progress.update(int(step[1]) - progress.n)
                progress.set_postfix_str(f"loss {step[3]}", refresh=False)
            elif score := re.search(r"test accuracy (\S+)", line):
                accuracy = float(score[1])
    if job.returncode or accuracy is None:
        sys.exit("".join(print_at_failure) + f"\n{' '.join(command)}\nfailed ({job.returncode})")
    return accuracy, [json.loads(line) for line in records.read_text().splitlines()]


def table(results):
    """Markdown; '-' where a column has no meaning."""
    head = ["", "test accuracy", "sent per step and rank", "spread: first", "last", "energy"]
    rows = [[*head, "misallocation"], ["---"] * (len(head) + 1)]
    for kind, (accuracy, records) in results.items():
        row = [
            KINDS[kind],
            f"{accuracy:.1%}",
            f"{fmean(r['bytes'] for r in records[1:]) / 1e3:.1f} kB",
        ]
        sparse = [r for r in records if "spread" in r]
        half, tail = sparse[len(sparse) // 2 :], sparse[-len(sparse) // 10 :]
        if sparse:
            row += [f"{sparse[0]['spread']:.2f}", f"{median(r['spread'] for r in tail):.2f}"]
            row += [
                f"{fmean(r[column] for r in half):.3f}" for column in ("energy", "misallocation")
            ]
        rows.append(row + ["-"] * (len(rows[0]) - len(row)))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def remarks(results):
    """What to look for in the table, in numbers."""
    sparse = [r for r in results["dls"][1] if "spread" in r]
    later = [r["spread"] for r in sparse if r["step"] > 50]
    reached = next((r["step"] for r in sparse if r["spread"] < BALANCED), None)
    yield (
        "Spread: largest over smallest threshold of the layers that send at least 10 entries, in "
        "the first sparse step and (median) in the last tenth of the steps."
    )
    yield (
        "Energy, misallocation: mean of the second half, beside exact global top-k of the same "
        "accumulators (1 and 0 are ideal)."
    )
    yield f"DLS: spread below {BALANCED} from step {reached} on" + (
        f"; later than step 50: {sum(s < BALANCED for s in later)} of {len(later)} steps, "
        f"median {median(later):.2f}, largest {max(later):.2f}."
        if later
        else "."
    )


def draw(results, file, density):
    """All layers' thresholds over the steps, layer-wise beside DLS."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, kind in zip(axes, ("layerwise", "dls"), strict=True):
        sparse = [r for r in results[kind][1] if "thresholds" in r]
        for name in sparse[0]["thresholds"]:
            values = [r["thresholds"][name] or float("nan") for r in sparse]
            axis.plot([r["step"] for r in sparse], values, label=name, linewidth=1)
        axis.set(title=KINDS[kind], xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("threshold: smallest magnitude sent")
    axes[1].legend(title="layer", fontsize="small")
    figure.suptitle(f"Thresholds of all compressed layers, density {density:g}")
    figure.savefig(file, dpi=110)


def main():
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    results = {kind: train(kind, args) for kind in KINDS}
    text = table(results)
    setting = f"{args.framework}, {args.ranks} ranks, density {args.density:g}"
    print(f"\nHandwritten digits, {setting}:\n\n{text}\n")
    for remark in remarks(results):
        print(remark)
    picture = args.output / "thresholds.png"
    draw(results, picture, args.density)
    (args.output / "table.md").write_text(text + "\n")
    print(f"\nPicture: {picture}\nTable:   {args.output / 'table.md'}")


if __name__ == "__main__":
    main()
