"""The page: what it shows of runs, in which order and words."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

import hvd_dls
from hvd_dls.core.session.stats import bytes_text
from hvd_dls.core.session.stopwatch import PARTS
from hvd_dls.insight.page.style import SCRIPT, STYLE
from hvd_dls.insight.page.svg import Bar, Line, bar_chart, colour_key, heat_map, line_chart
from hvd_dls.insight.reading import ModelLog, Run

_MANY = 60  # layers, more than which are drawn fainter
_RUN_STYLES = 6


@dataclass(frozen=True)
class Shown:
    """A model of a run, and how it is told from others.

    Attributes:
        name: of the run, and the model where the run has several.
        log: its lines.
        style: of its lines, as CSS.
        classes: of its lines.
    """

    name: str
    log: ModelLog
    style: str
    classes: str

    def line(self, y: np.ndarray, more: str = "", classes: str = "") -> Line:
        """Of numbers of each logged step."""
        return Line(self.name + more, self.log.steps, y, self.style, classes or self.classes)

    def a_step(self, name: str) -> np.ndarray:
        """(T,) of a field that is added up, the mean over each line's steps."""
        each: np.ndarray = self.log.column(name) / self.log.column("steps")
        return each

    def ms(self, part: str) -> np.ndarray:
        """(T,) milliseconds a step of a part or of all."""
        each: np.ndarray = 1e3 * self.log.seconds(part) / self.log.column("steps")
        return each


def page_of(runs: Sequence[Run], title: str = "hvd_dls report") -> str:
    """One page of HTML; it refers to nothing outside of it.

    Args:
        runs: at least one.
        title: of the page.
    """
    shown = _told_apart(runs)
    keys = _keys(shown) if len(shown) > 1 else ""
    compressing = [each for each in shown if each.log.layers]
    sections = [
        _section("Summary", _SUMMARY, _summary(shown, runs)),
        _section("Thresholds of all layers", _THRESHOLDS, _thresholds(compressing))
        if compressing
        else "",
        _section("Spread", _SPREAD, keys + _spread(compressing)) if compressing else "",
        _section("Density by layer", _DENSITY, _densities(compressing)) if compressing else "",
        _section("Bytes a step", _BYTES, keys + _bytes(shown)),
        _section("Time by part", _TIME, _times(shown)),
    ]
    now = time.strftime("%Y-%m-%d %H:%M")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main><h1>{escape(title)}</h1>"
        f"<p>Made {now} by hvd_dls {hvd_dls.__version__} from {len(runs)} log(s).</p>"
        f"{''.join(sections)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _told_apart(runs: Sequence[Run]) -> list[Shown]:
    models = [
        (run.name if len(run.models) == 1 else f"{run.name}, model {log.number + 1}", log)
        for run in runs
        for log in run.models
    ]
    return [
        Shown(
            name,
            log,
            f"stroke:var(--run{number % _RUN_STYLES})",
            f"dash{number % _RUN_STYLES}" if number else "",
        )
        for number, (name, log) in enumerate(models)
    ]


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{title}</h2><p>{text}</p>{content}</section>"


def _panels(figures: Iterable[tuple[str, str]]) -> str:
    drawn = (
        f"<figure><figcaption>{escape(caption)}</figcaption>{picture}</figure>"
        for caption, picture in figures
    )
    return f'<div class="panels">{"".join(drawn)}</div>'


def _keys(shown: Sequence[Shown]) -> str:
    items = (
        f'<li><svg viewBox="0 0 30 10" aria-hidden="true"><polyline class="{each.classes}" '
        f'style="{each.style}" points="0,5 30,5"/></svg>{escape(each.name)}</li>'
        for each in shown
    )
    return f'<ul class="keys">{"".join(items)}</ul>'


# Sections ---------------------------------------------------------------------------------------

_SUMMARY = (
    "Bytes are what this rank hands to Horovod in a step, beside dense training and as a ratio. "
    "Over a ring: the ratio of what it sends if collectives are rings. Times are medians."
)


def _summary(shown: Sequence[Shown], runs: Sequence[Run]) -> str:
    head = ["run", "rank", "steps", "skipped", "layers", "entries", "density", "spread"]
    head += ["handed over", "dense training", "ratio", "over a ring"]
    head += ["compression, ms", "step, ms"]
    rows = []
    for each in shown:
        log = each.log
        sent = np.nansum(log.column("sparse_bytes") + log.column("dense_bytes"))
        whole, steps = np.nansum(log.column("whole_bytes")), log.column("steps").sum()
        ring, whole_ring = (np.nansum(log.column(n)) for n in ("link_bytes", "whole_link_bytes"))
        skipped = log.column("skipped_so_far")
        elapsed = 1e3 * each.a_step("elapsed")
        rows.append(
            [
                escape(each.name),
                f"{log.rank} of {log.world_size}",
                f"{log.steps[-1]:,}",
                _number(skipped[-1], ",.0f"),
                f"{len(log.layers)} + {log.about.get('dense_layers', '?')} dense",
                f"{int(log.sizes.sum()):,}",
                _number(log.column("density")[-1], ".3%"),
                _number(log.column("spread")[-1], ".3g"),
                bytes_text(sent / steps),
                bytes_text(whole / steps),
                _number(whole / sent if sent else np.nan, ".3g"),
                _number(whole_ring / ring if ring else np.nan, ".3g"),
                _number(_median(each.ms("total")), ".3g"),
                _number(_median(elapsed), ".3g"),
            ]
        )
    notes = "".join(
        f'<p class="warn">{escape(run.name)}: {run.ignored} line(s) were not whole, or no log\'s, '
        "and are left out.</p>"
        for run in runs
        if run.ignored
    )
    return _table(head, rows) + notes


_THRESHOLDS = (
    "The smallest magnitude that this rank sent of each layer. When all have come together, the "
    "choice is that of global top-k. First layer <span class=fade></span> last."
)


def _thresholds(shown: Sequence[Shown]) -> str:
    same = all(each.log.layers == shown[0].log.layers for each in shown)
    limits = [each.log.thresholds for each in shown] if same else []
    figures = []
    for each in shown:
        log, many = each.log, "many" if len(each.log.layers) > _MANY else "layer"
        lines = [
            Line(name, log.steps, log.thresholds[:, row], _depth(row, len(log.layers)), many)
            for row, name in enumerate(log.layers)
        ]
        figures.append((each.name, line_chart(lines, "threshold", limits=limits)))
    return _panels(figures)


def _depth(row: int, layers: int) -> str:
    share = row / max(layers - 1, 1)
    saturation, lightness = 75 - 60 * share * (1 - share) * 2, 55
    return f"stroke:hsl({215 + 170 * share:.0f} {saturation:.0f}% {lightness}%)"


_SPREAD = (
    "The largest threshold over the smallest, of layers that send ten entries or more; 1 is ideal."
)


def _spread(shown: Sequence[Shown]) -> str:
    lines = [each.line(each.log.column("spread")) for each in shown]
    return _panels([("spread", line_chart(lines, "spread"))])


_DENSITY = (
    "The share of its entries that each layer sends, from the first layer down to the last. What "
    "is left blank sent nothing."
)


def _densities(shown: Sequence[Shown]) -> str:
    densities = [each.log.k / np.maximum(each.log.sizes, 1) for each in shown]
    positive = [d[np.isfinite(d) & (d > 0)] for d in densities]
    low = min((float(d.min()) for d in positive if d.size), default=0.01)
    high = max((float(d.max()) for d in positive if d.size), default=1.0)
    bounds = (low / 1.05, high * 1.05)
    figures = [
        (each.name, heat_map(each.log.steps, each.log.layers, np.nan_to_num(density), bounds))
        for each, density in zip(shown, densities, strict=True)
    ]
    return colour_key(bounds, _percent) + _panels(figures)


_BYTES = (
    "What this rank hands to Horovod, payloads and layers that go dense together; and what it "
    "sends if Horovod's collectives are rings. Dotted: dense training."
)


def _bytes(shown: Sequence[Shown]) -> str:
    figures = []
    for caption, own, whole in (
        ("handed over", ("sparse_bytes", "dense_bytes"), "whole_bytes"),
        ("over a ring", ("link_bytes",), "whole_link_bytes"),
    ):
        lines = []
        for each in shown:
            lines.append(each.line(sum((each.a_step(n) for n in own), np.zeros(1))))
            lines.append(each.line(each.a_step(whole), ", dense training", "dense"))
        figures.append((caption, line_chart(lines, "bytes a step", bytes_text)))
    return _panels(figures)


_TIME = (
    "What compression takes of a step on this rank, without the log's first line, in which "
    "loops are compiled. <i>Wait</i> is for other ranks; <i>other</i> is Python around the parts, "
    "handing over to Horovod among it."
)


def _times(shown: Sequence[Shown]) -> str:
    bars, rows = [], []
    for each in shown:
        after = _after_first(each.log)
        steps = each.log.column("steps")[after].sum()
        parts = {p: 1e3 * np.nansum(each.log.seconds(p)[after]) / steps for p in PARTS}
        total = 1e3 * np.nansum(each.log.seconds("total")[after]) / steps
        whole = 1e3 * np.nansum(each.log.column("elapsed")[after]) / steps
        parts["other"] = max(0.0, total - sum(parts.values()))
        bars.append(Bar(each.name, [(p, ms) for p, ms in parts.items() if ms > 0]))
        share = _number(total / whole if whole else np.nan, ".1%")
        figures = [*(f"{ms:.3g}" for ms in parts.values()), f"{total:.3g}", f"{whole:.3g}", share]
        rows.append([escape(each.name), *figures])
    used = {part for bar in bars for part, _ in bar.parts}
    items = "".join(
        f'<li><i style="background:var(--{part})"></i>{part}</li>'
        for part in (*PARTS, "other")
        if part in used
    )
    lines = [
        Line(
            each.name,
            each.log.steps[_after_first(each.log)],
            each.ms("total")[_after_first(each.log)],
            each.style,
            each.classes,
        )
        for each in shown
    ]
    pictures = [
        ("milliseconds a step, by part", bar_chart(bars, "ms a step")),
        ("milliseconds over steps", line_chart(lines, "compression, ms a step")),
    ]
    colours = "".join(f".part-{p}{{fill:var(--{p})}}" for p in (*PARTS, "other"))
    head = ["ms a step", *PARTS, "other", "compression", "whole step", "share"]
    return (
        f'<style>{colours}</style><ul class="keys">{items}</ul>{_panels(pictures)}'
        f"<details><summary>The same as a table</summary>{_table(head, rows)}</details>"
    )


def _after_first(log: ModelLog) -> slice:
    return slice(1, None) if len(log.steps) > 1 else slice(None)


# Words ------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _number(value: float, form: str) -> str:
    return format(value, form) if np.isfinite(value) else "–"


def _median(values: np.ndarray) -> float:
    good = values[np.isfinite(values)]
    return float(np.median(good)) if good.size else float("nan")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
