"""All figures as tables in Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.common.reporting import markdown
from benchmarks.gpu import launches as counting
from benchmarks.gpu.methods import FLOOR
from benchmarks.gpu.noise import NOISE
from benchmarks.gpu.stepping import PARTS

Rows = list[dict[str, Any]]

KINDS = {
    "device": "Time of the device",
    "host": "Time of the host to launch it",
    "elapsed": "Time until the result is there",
}
SPREAD = "Milliseconds: median (least to most)"


def number(value: float) -> str:
    """Rounds to three digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f}"


def spread(found: dict[str, float]) -> str:
    """Formats median and extremes."""
    return f"{number(found['median'])} ({number(found['min'])} to {number(found['max'])})"


def _names(rows: Rows) -> list[str]:
    """All methods, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in [*row["ms"], *row["errors"]]))


def _compared(rows: Rows, head: list[str], case: Callable[[dict[str, Any]], list[str]]) -> str:
    """A table for each kind of time: a row for each case, a column for each method."""
    parts = []
    names = _names(rows)
    for kind, title in KINDS.items():
        if not any(kind in times for row in rows for times in row["ms"].values()):
            continue
        lines = []
        for row in rows:
            floor = row["ms"].get(FLOOR, {}).get(kind)
            cells = [_cell(row, name, kind, floor) for name in names]
            lines.append([*case(row), *cells])
        parts.append(f"{title}. {SPREAD}; multiples of the {FLOOR}.\n")
        parts.append(markdown([*head, *names], lines))
    errors = {f"{name}: {text}" for row in rows for name, text in row["errors"].items()}
    parts += [f"Failed: {error}\n" for error in sorted(errors)]
    return "\n".join(parts)


def _cell(row: dict[str, Any], name: str, kind: str, floor: dict[str, float] | None) -> str:
    if name in row["errors"]:
        return "failed"
    times = row["ms"].get(name, {}).get(kind)
    if times is None:
        return "-"
    beside = f", {times['median'] / floor['median']:.2f}×" if floor and name != FLOOR else ""
    return spread(times) + beside


def selection(rows: Rows) -> str:
    """Formats the times of finding the largest entries."""

    def case(row: dict[str, Any]) -> list[str]:
        return [f"{row['n']:,}", f"{row['density']:g}"]

    checked = [good for row in rows for good in row["exact"].values()]
    exact = (
        f"Of this package's results, {sum(checked)} of {len(checked)} were those of torch.topk: "
        "as many entries, ascending, with these values and the same threshold.\n"
    )
    table = _compared(rows, ["entries", "density"], case)
    return f"{NOISE}\n\n{table}\n{exact}{_searched_again(rows)}"


def _searched_again(rows: Rows) -> str:
    """Tells of searches that had to be repeated."""
    lines = []
    for name in dict.fromkeys(name for row in rows for name in row["again"]):
        pairs = [row["again"][name] for row in rows if name in row["again"]]
        times, steps = (sum(column) for column in zip(*pairs, strict=True))
        if times:
            lines.append(
                f"{name}: {times} of {steps} steps (warm-up and check among them) had to search "
                "again when the result was asked for; only the time until the result is there has "
                "that in it.\n"
            )
    return "".join(lines)


def settle(rows: Rows) -> str:
    """Formats the times of adding up what all ranks sent."""

    def case(row: dict[str, Any]) -> list[str]:
        return [f"{row['n']:,}", f"{row['density']:g}", str(row["ranks"])]

    about = "Indices are uniform and independent, so that ranks hardly overlap.\n"
    return f"{about}\n{_compared(rows, ['entries', 'density', 'ranks'], case)}"


def step(rows: Rows) -> str:
    """Formats the times of whole steps."""
    lines = []
    for row in rows:
        floor = next(
            x["ms"]["whole"]["median"]
            for x in rows
            if (x["model"], x["method"]) == (row["model"], FLOOR)
        )
        whole = row["ms"]["whole"]
        cells = [number(row["ms"][part]["median"]) if part in row["ms"] else "-" for part in PARTS]
        cells[-1] = f"{spread(whole)}, {whole['median'] / floor:.1f}×"
        sent = f"{row['payload_bytes'] / 1e6:.3g}" if "payload_bytes" in row else "-"
        density = f"{row['density']:g}" if "density" in row else "-"
        lines.append([row["model"], row["method"], density, sent, *cells])
    ranks = next((row["ranks"] for row in rows if "ranks" in row), None)
    pretended = (
        f" The session is told of {ranks} ranks; what the others send is this rank's own payload "
        "again, so that all ranks' entries coincide. Layers that go dense are only looked at, "
        "whether they are finite."
        if ranks
        else ""
    )
    about = (
        "Nothing is sent anywhere: what is measured is what a rank does itself, by the host's "
        f"clock, from a device at rest to a device at rest, without backward.{pretended} Medians "
        f"in milliseconds; the whole with least and most, and as a multiple of the {FLOOR} of all "
        "gradients."
    )
    table = markdown(["model", "method", "density", "payloads, MB", *PARTS], lines)
    return f"{about}\n\n{table}{_same_bits(rows)}"


def _same_bits(rows: Rows) -> str:
    """Tells whether all ways have left the same residuals and sums."""
    cases = defaultdict[tuple[str, float], dict[str, int]](dict)
    for row in rows:
        if "checksum" in row:
            cases[row["model"], row["density"]][row["method"]] = row["checksum"]
    lines = []
    for (model, density), sums in cases.items():
        if len(sums) > 1:
            first, *others = sums
            same = [name for name in others if sums[name] == sums[first]]
            told = f"the same bits as {first}: {', '.join(same) or 'none'}"
            lines.append(
                f"- {model}, {density:g}: residuals and sums after all steps have {told}\n"
            )
    return "\n" + "".join(lines) if lines else ""


def launches(rows: Rows) -> str:
    """Formats what a step gives a device to do."""
    lines = []
    for row in rows:
        cells = [row["model"], row["method"]]
        for part in counting.PARTS:
            counts = [row["counts"][part].get(kind, 0) for kind in counting.KINDS]
            cells.append(" + ".join(map(str, counts)) + f"; {number(row['host_ms'][part])} ms")
        total, host = counting.total(row), sum(row["host_ms"].values())
        lines.append([*cells, f"{total:,}; {number(host)} ms", str(counting.again(row))])
    sizes = dict.fromkeys(
        f"{row['model']} has {row['layers']} layers, of which {row['compressed']} are compressed, "
        f"in {row['buckets']} buckets"
        for row in rows
    )
    about = (
        f"In a step at {counting.DENSITY:g}, as above: kernels of this package + operations of "
        "torch (but views and new memory) + copies between host and device; and the host's time "
        "outside of these, which is Python, packing and unpacking. Searching a layer "
        "again, rare but in first steps, is in none of these. "
    )
    head = ["model", "method", "compressed layers come in", "dense layers come in"]
    head += ["packed and unpacked", "settled", "in all", "layers searched again"]
    table = markdown(head, lines)
    return f"{about}{'; '.join(sizes)}.\n\n{table}{_same_bits(rows)}"


def stalls(rows: Rows) -> str:
    """Formats where the host waits for the device."""
    lines, details = [], []
    for row in rows:
        who = f"{row['model']}, {row['method']}"
        if "note" in row:
            details.append(f"- {who}: {row['note']}\n")
            continue
        asleep, warned, calls = row["behind_sleep"], row["warnings"], row["calls"]
        cells = [f"{asleep['did_not_wait']} of {row['layers']}", number(asleep["longest_ms"])]
        cells += [f"{warned['compress']}, {warned['rest']}"]
        if "note" in calls:
            cells += [calls["note"], "-", "-"]
        else:
            cells += [f"{_calls(calls['compress'])}; {_calls(calls['rest'])}"]
            cells += [f"{calls['compress']['launches']}, {calls['rest']['launches']}"]
            cells += [number(calls["device_busy_ms"])]
        lines.append([row["model"], row["method"], *cells])
        if asleep["waited"]:
            details.append(f"- {who}, the host waited at: {', '.join(asleep['waited'])}\n")
    head = ["model", "method", "layers back before a sleeping device woke", "longest of these, ms"]
    head += ["torch's warnings: in backward's hooks, in the rest", "calls of CUDA that may wait"]
    head += ["launches and copies", "device busy in a step, ms"]
    return (markdown(head, lines) if lines else "") + "\n" + "".join(details)


def _calls(part: dict[str, Any]) -> str:
    counted = part["calls"].items()
    return ", ".join(f"{n} {name} ({number(part['ms'][name])} ms)" for name, n in counted) or "none"


def memory(rows: Rows) -> str:
    """Formats memory of the device."""
    lines = []
    for row in rows:
        cells = [row["model"], row["method"], f"{row['density']:g}"]
        cells.append(f"{row['gradient_bytes'] / 1e6:,.1f}")
        for kind in ("steady_bytes", "peak_bytes"):
            cells.append(_megabytes(row, kind))
        lines.append(cells)
    head = ["model", "method", "density", "gradients, MB", "between steps, MB", "peak, MB"]
    notes = "".join(f"{note}\n" for note in {row["note"] for row in rows if "note" in row})
    about = "Beside the gradients, and as multiples of them; what stays has the residuals in it."
    return f"{about}\n\n{markdown(head, lines)}\n{notes}"


def _megabytes(row: dict[str, Any], kind: str) -> str:
    if kind not in row:
        return "-"
    return f"{row[kind] / 1e6:,.1f} ({row[kind] / row['gradient_bytes']:.2f}×)"


def two_ranks(rows: Rows) -> str:
    """Formats a training on two ranks."""
    lines = []
    for row in rows:
        if "note" in row:
            lines.append([row["method"], row["note"], "-", "-", "-"])
            continue
        first, last = row["loss"]
        same = f"{row['same']} of {row['compared']}"
        lines.append(
            [row["method"], spread(row["ms"]), same, f"{first:.3f}, {last:.3f}", str(row["steps"])]
        )
    head = ["method", SPREAD, "looks at which all ranks had the same parameters"]
    return markdown([*head, "loss at first, in the end", "steps"], lines)


def joined(parts: Iterable[str]) -> str:
    """Puts parts below each other."""
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)
