"""Pictures: lines over steps, a map of layers over steps, bars of parts."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from hvd_dls.insight.page.axes import Scale, number_text, scale_of

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 10, 40
_POINTS = 40_000  # of all lines of a picture together, about
_COLUMNS = 160  # of a map
_NAME = 26  # characters of a layer's name on an axis
LEVELS = 255  # of a map's colours; 0 is for nothing sent


@dataclass(frozen=True)
class Line:
    """A line of a picture.

    Attributes:
        name: of what it shows.
        x: (T,) steps.
        y: (T,) NaN where there is nothing to draw.
        style: of the element: its colour, as CSS.
        classes: of the element.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    style: str
    classes: str = ""


def line_chart(
    lines: Sequence[Line],
    what: str,
    text: Callable[[float], str] = number_text,
    log: bool = True,
    limits: Sequence[np.ndarray] = (),
) -> str:
    """Lines over steps.

    Args:
        lines: at least one.
        what: is drawn, for those who do not see it, and along its side.
        text: of a number, on the axis.
        log: whether equal ratios have equal heights; else the axis begins at zero.
        limits: numbers there is to be room for, besides the lines'.
    """
    x = scale_of([line.x for line in lines], LEFT, WIDTH - RIGHT)
    y = scale_of([*(line.y for line in lines), *limits], HEIGHT - BOTTOM, TOP, log, not log)
    most = int(np.clip(_POINTS / len(lines), 60, 400))
    drawn = "".join(_polylines(line, x, y, most) for line in lines)
    axes = json.dumps({"x": _axis(x), "y": _axis(y)})
    return (
        f'<svg class="lines" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f"aria-label=\"{escape(what)} over steps\" data-axes='{axes}'>"
        f"{_grid(x, y, what, text)}{drawn}</svg>"
    )


def _polylines(line: Line, x: Scale, y: Scale, most: int) -> str:
    chosen = np.unique(np.linspace(0, len(line.x) - 1, min(most, len(line.x))).astype(int))
    values = line.y[chosen]
    good = np.isfinite(values) & ((values > 0) | (not y.log))
    with np.errstate(all="ignore"):
        points = np.stack([x(line.x[chosen].astype(float)), y(values)], axis=1)
    pieces = np.split(np.arange(len(chosen)), np.flatnonzero(np.diff(good)) + 1)
    drawn = []
    for piece in pieces:
        if good[piece[0]]:
            text = " ".join(f"{a:.1f},{b:.1f}" for a, b in points[piece].tolist())
            if len(piece) == 1:  # a line of one point is not seen
                text = f"{text} {points[piece[0], 0] + 0.1:.1f},{points[piece[0], 1]:.1f}"
            drawn.append(
                f'<polyline class="{line.classes}" style="{line.style}" '
                f'data-name="{escape(line.name)}" points="{text}"/>'
            )
    return "".join(drawn)


def _axis(scale: Scale) -> list[float | bool]:
    return [scale.start, scale.end, scale.low, scale.high, scale.log]


def _grid(x: Scale, y: Scale, what: str, text: Callable[[float], str]) -> str:
    parts = []
    for tick in y.ticks():
        at = f"{y.at(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{at}" dy=".32em">{text(tick)}</text>')
    parts.append(_steps(x, HEIGHT - BOTTOM))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="middle" transform="translate(12 {middle}) rotate(-90)">{escape(what)}</text>'
    )
    return "".join(parts)


def _steps(x: Scale, bottom: float, left: float = LEFT) -> str:
    y = f"{bottom + 16:.1f}"
    marks = "".join(
        f'<text class="middle" x="{x.at(tick):.1f}" y="{y}">{number_text(tick)}</text>'
        for tick in x.ticks()
        if tick == round(tick)
    )
    line = f'<line class="axis" x1="{left}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    middle = (left + WIDTH - RIGHT) / 2
    return f'{line}{marks}<text class="middle" x="{middle}" y="{bottom + 33:.1f}">step</text>'


# A map ------------------------------------------------------------------------------------------


def heat_map(
    steps: np.ndarray, names: Sequence[str], values: np.ndarray, bounds: tuple[float, float]
) -> str:
    """Layers over steps, the first layer at the top; colours have equal distances for equal ratios.

    Args:
        steps: (T,)
        names: of the L layers.
        values: (T, L), 0 for nothing.
        bounds: the smallest and the largest value there is a colour for.
    """
    columns = np.linspace(steps[0], steps[-1], min(len(steps), _COLUMNS))
    values = values[np.searchsorted(steps, columns, side="right") - 1].T
    low, high = np.log(bounds)
    with np.errstate(divide="ignore"):
        share = (np.log(values) - low) / max(high - low, 1e-9)
    levels = np.where(values > 0, 1 + np.clip(share, 0, 1) * (LEVELS - 1), 0).round()
    levels = levels.astype(np.uint8)
    height = float(np.clip(14 * len(names), 60, 560))
    left, top = _room(names), 6
    x = Scale(float(steps[0]), float(max(steps[-1], steps[0] + 1)), left, WIDTH - RIGHT)
    every = max(1, -(-len(names) * 12 // int(height)))
    row = height / len(names)
    labels = "".join(
        f'<text class="end small" x="{left - 6}" y="{top + (i + 0.5) * row:.1f}" dy=".32em">'
        f"{escape(shortened(names[i]))}</text>"
        for i in range(0, len(names), every)
    )
    about = {
        "box": [left, top, WIDTH - RIGHT - left, height],
        "steps": [round(step) for step in columns.tolist()],
        "names": list(names),
        "log": [low, high],
        "levels": base64.b64encode(levels.tobytes()).decode(),
    }
    return (
        f'<svg class="map" viewBox="0 0 {WIDTH} {top + height + 40:.0f}" role="img" '
        f'aria-label="density of each of {len(names)} layers over steps" '
        f'data-map="{escape(json.dumps(about))}">'
        f'<image x="{left}" y="{top}" width="{WIDTH - RIGHT - left}" height="{height}" '
        f'preserveAspectRatio="none" href="{_png(levels)}"/>{labels}'
        f"{_steps(x, top + height, left)}</svg>"
    )


def colour_key(bounds: tuple[float, float], text: Callable[[float], str]) -> str:
    """The colours of a map, and what they stand for."""
    levels = np.arange(1, LEVELS + 1, dtype=np.uint8)[None, :]
    x = Scale(*bounds, 10, 310, log=True)
    marks = "".join(
        f'<text class="middle" x="{x.at(tick):.1f}" y="32">{text(tick)}</text>'
        for tick in x.ticks(5)
    )
    return (
        '<svg class="key" viewBox="0 0 320 36" role="img" aria-label="colours of densities">'
        f'<image x="10" y="2" width="300" height="14" preserveAspectRatio="none" '
        f'href="{_png(levels)}"/>{marks}</svg>'
    )


# From dark blue by green to yellow; each is seen on white and on black.
_STOPS = np.array([[68, 40, 140], [49, 104, 142], [33, 145, 140], [94, 201, 98], [253, 231, 37]])


def _png(levels: np.ndarray) -> str:
    """(rows, columns) uint8 as a picture with colours; level 0 can be seen through."""
    at = np.linspace(0, len(_STOPS) - 1, LEVELS)
    colours = [np.interp(at, np.arange(len(_STOPS)), _STOPS[:, i]).round() for i in range(3)]
    palette = np.vstack([np.zeros((1, 3)), np.stack(colours, axis=1)]).astype(np.uint8)
    rows, columns = levels.shape
    lines = np.hstack([np.zeros((rows, 1), np.uint8), levels])  # each begins with its filter: none
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
        (b"PLTE", palette.tobytes()),
        (b"tRNS", b"\0"),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


# Bars -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A bar of parts, one after the other.

    Attributes:
        name: of the bar.
        parts: name and length of each; lengths are milliseconds.
    """

    name: str
    parts: Sequence[tuple[str, float]]


def bar_chart(bars: Sequence[Bar], what: str) -> str:
    """Bars below each other; each part has the class ``part-NAME``."""
    left, row = _room([bar.name for bar in bars]), 30
    totals = np.array([sum(length for _, length in bar.parts) for bar in bars])
    x = scale_of([totals], left, WIDTH - RIGHT - 50, zero=True)
    bottom, drawn = TOP + row * len(bars), []
    for tick in x.ticks():
        at = f"{x.at(tick):.1f}"
        drawn.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{bottom}"/>')
        drawn.append(f'<text class="middle" x="{at}" y="{bottom + 16}">{number_text(tick)}</text>')
    for number, bar in enumerate(bars):
        y, start = TOP + row * number, 0.0
        label = escape(shortened(bar.name))
        drawn.append(
            f'<text class="end" x="{left - 6}" y="{y + row / 2}" dy=".32em">{label}</text>'
        )
        for part, length in bar.parts:
            begin, end = x.at(start), x.at(start + length)
            drawn.append(
                f'<rect class="part-{part}" x="{begin:.1f}" y="{y + 4}" '
                f'width="{max(end - begin, 0):.1f}" height="{row - 8}">'
                f"<title>{escape(bar.name)}: {part} {length:.3g} ms</title></rect>"
            )
            start += length
        behind = x.at(start) + 5
        drawn.append(f'<text x="{behind:.1f}" y="{y + row / 2}" dy=".32em">{start:.3g}</text>')
    middle = (left + WIDTH - RIGHT) / 2
    drawn.append(f'<text class="middle" x="{middle}" y="{bottom + 33}">{escape(what)}</text>')
    return (
        f'<svg viewBox="0 0 {WIDTH} {bottom + 40}" role="img" aria-label="{escape(what)}">'
        f"{''.join(drawn)}</svg>"
    )


def _room(names: Sequence[str]) -> int:
    """For names beside a picture."""
    return 20 + round(6.2 * max((len(shortened(name)) for name in names), default=0))


def shortened(name: str) -> str:
    """A name that fits beside a picture: its end tells most."""
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"
