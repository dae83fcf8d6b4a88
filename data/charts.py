"""Line charts, histograms, heat maps and spectrograms as SVG text, for pages that need no network and no library."""

import html
import math
from collections.abc import Callable, Mapping, Sequence

Points = Sequence[tuple[float, float]]

STYLE = """
svg { --c0: #2563eb; --c1: #dc2626; --c2: #059669; --c3: #b45309; --c4: #7c3aed; --c5: #0e7490; }
@media (prefers-color-scheme: dark) {
  svg { --c0: #7aa2ff; --c1: #ff7b7b; --c2: #3ddc97; --c3: #fbbf5b; --c4: #b79cff; --c5: #45c8e0; }
}
svg { font-family: system-ui, sans-serif; max-width: 100%; height: auto; }
svg text { fill: currentColor; font-size: 11px; } svg .title { font-size: 14px; font-weight: 600; }
svg .tick { opacity: .7; } svg .grid { stroke: currentColor; opacity: .15; }
svg line.mark { stroke: currentColor; opacity: .7; }
"""
"""CSS of a page with charts: they take its colour of text, on light and on dark."""

_WIDTH, _HEIGHT = 520, 184
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 22, 30, 42
_NUM_COLOURS = 6
_LINE, _CHARACTER = 16, 6.4
"""Height of a line of the legend, and about the width of a character."""

_MAX_POINTS = 300
_BINS = 40


def line_chart(
    title: str, series: Mapping[str, Points], *, x: str = "step", y: str = "", includes: Sequence[float] = ()
) -> str:
    """One chart of some lines.

    Args:
      title: above the chart.
      series: label -> (step, value) in order of steps; long ones are averaged down to what can be seen. The horizontal
        axis goes from 0 to the last step of all.
      x, y: what the axes count.
      includes: values that the vertical axis reaches in any case.
    Returns:
      An <svg> element; empty text where there is nothing to draw.
    """
    drawn = {label: _thin(points) for label, points in series.items() if points}
    if not drawn:
        return ""
    colours = _colours(series, drawn)
    last = max(points[-1][0] for points in series.values() if points)
    values = [value for points in drawn.values() for _, value in points] + list(includes)
    x_ticks = [tick for tick in ticks(0, last, are_whole=True) if tick <= last]
    parts, place, height = _axes(title, last, x_ticks, ticks(min(values), max(values)), x, y, colours)
    for label, points in drawn.items():
        places = [place(*point) for point in points]
        path = " ".join(f"{across:.1f},{up:.1f}" for across, up in places)
        parts.append(f'<polyline points="{path}" style="stroke:{colours[label]}" fill="none" stroke-width="1.6"/>')
        if len(points) < 20:
            dot = f'r="2.5" style="fill:{colours[label]}"'
            parts += [f'<circle cx="{across:.1f}" cy="{up:.1f}" {dot}/>' for across, up in places]
    return _svg(_WIDTH, height, title, parts)


def histogram(
    title: str, series: Mapping[str, Sequence[float]], *, x: str, y: str, marks: Mapping[str, float] | None = None
) -> str:
    """How often values are how large, of each series on top of those before it.

    Args:
      title: above the chart.
      series: label -> values, at least 0, in no order.
      x: unit of the values.
      y: of what there are so many, such as "documents".
      marks: label -> a value that is marked by a vertical line, if it is not far beyond the others.
    Returns:
      An <svg> element; empty text where there is nothing to draw.
    """
    drawn = {label: values for label, values in series.items() if values}
    if not drawn:
        return ""
    most = max(map(max, drawn.values()))
    x_ticks = ticks(0, max([most, *(mark for mark in (marks or {}).values() if mark <= 2 * most)]), are_whole=True)
    width = x_ticks[-1] / _BINS
    counts = {label: [0] * _BINS for label in drawn}
    for label, values in drawn.items():
        for value in values:
            counts[label][min(_BINS - 1, int(value / width))] += 1
    y_ticks = ticks(0, max(map(sum, zip(*counts.values(), strict=True))), are_whole=True)
    colours = _colours(series, drawn)
    parts, place, height = _axes(title, x_ticks[-1], x_ticks, y_ticks, x, y, colours)
    below = [0] * _BINS
    for label, column in counts.items():
        for i, count in enumerate(column):
            if count:
                (left, bottom), (right, top) = place(i * width, below[i]), place((i + 1) * width, below[i] + count)
                shown = f"{label}, {_number(i * width)} to {_number((i + 1) * width)} {x}: {count:,} {y}"
                size = f'width="{right - left - 1:.1f}" height="{bottom - top:.1f}" style="fill:{colours[label]}"'
                told = f"<title>{html.escape(shown)}</title>"
                parts.append(f'<rect x="{left + 0.5:.1f}" y="{top:.1f}" {size}>{told}</rect>')
                below[i] += count
    for label, value in (marks or {}).items():
        if value <= x_ticks[-1]:
            (across, bottom), (_, top) = place(value, 0), place(value, y_ticks[-1])
            line = f'x1="{across:.1f}" x2="{across:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"'
            parts.append(f'<line {line} class="mark" stroke-dasharray="4 3"/>')
            is_left = across < _WIDTH / 2
            parts.append(_text(across + (4 if is_left else -4), top + 9, label, "start" if is_left else "end", "mark"))
    return _svg(_WIDTH, height, title, parts)


def heat_map(
    title: str, rows: Sequence[Sequence[float]], *, row_name: str, column_name: str, columns: Sequence[float] = ()
) -> str:
    """A map of cells that are white at 1, blue below it and red above.

    Args:
      title: above the map.
      rows: values, at least 0, of rows of one length.
      row_name, column_name: what a row and a column are.
      columns: the number of each column; none for 0, 1, ...
    Returns:
      An <svg> element.
    """
    names = list(columns) or list(range(len(rows[0])))
    cell_width, cell_height = (_WIDTH - _LEFT - _RIGHT) / len(names), max(3.0, min(24.0, 240 / len(rows)))
    bottom = _TOP + cell_height * len(rows)
    parts = [_text(_LEFT, 18, title, "start", "title")]
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            x, y = _LEFT + j * cell_width, _TOP + i * cell_height
            parts.append(
                f'<rect x="{x:.2f}" y="{y:.2f}" width="{cell_width + 0.3:.2f}" height="{cell_height + 0.3:.2f}" '
                f'fill="{_heat(value)}"><title>{row_name} {i}, {column_name} {names[j]}: {value:.2f}</title></rect>'
            )
    for i in range(0, len(rows), math.ceil(max(len(rows) / 8, 12 / cell_height))):
        parts.append(_text(_LEFT - 6, _TOP + cell_height * (i + 0.5) + 4, str(i), "end"))
    for j in range(0, len(names), math.ceil(len(names) / 8)):
        parts.append(_text(_LEFT + cell_width * (j + 0.5), bottom + 14, _number(names[j]), "middle"))
    parts += _names_of_axes(column_name, row_name, _TOP, bottom)
    return _svg(_WIDTH, bottom + _BOTTOM, title, parts)


def spectrogram(source: str, seconds: float, places: Mapping[str, float]) -> str:
    """The picture of a sound, time to the right, with its axes.

    Args:
      source: of the picture, a data: URI.
      seconds: that it lasts.
      places: label -> how far up on the vertical axis, between 0 and 1.
    Returns:
      An <svg> element.
    """
    width, height, left, top = 60 + 24 * min(seconds, 30.0), 112, 46, 6
    size = f'width="{width:.1f}" height="{height}" preserveAspectRatio="none"'
    parts = [f'<image href="{source}" x="{left}" y="{top}" {size}/>']
    for tick in ticks(0, seconds) if width > 200 else (0, seconds):
        if tick <= seconds:
            parts.append(_text(left + width * tick / seconds, top + height + 13, f"{_number(tick)} s", "middle"))
    parts += [_text(left - 4, top + height * (1 - up) + 4, label, "end") for label, up in places.items()]
    return _svg(left + width + 20, top + height + 20, "spectrogram", parts)


def ticks(low: float, high: float, *, are_whole: bool = False) -> list[float]:
    """Two to seven round numbers, evenly spaced, the first at most `low` and the last at least `high`.

    Args:
      low, high: what they enclose; where both are the same, the numbers around it, and 0 to 1 around 0.
      are_whole: whole numbers only.
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 2
        low, high = (low - margin, high + margin) if margin else (0.0, 1.0)
    rough = max((high - low) / 4, 1.0 if are_whole else 0.0)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    multiples = (1, 2, 5, 10) if are_whole else (1, 2, 2.5, 5, 10)
    spacing = next(m * magnitude for m in multiples if m * magnitude >= rough)
    first, last = math.floor(low / spacing), math.ceil(high / spacing)
    return [i * spacing for i in range(first, last + 1)]


def _thin(points: Points) -> Points:
    size = math.ceil(len(points) / _MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _heat(value: float) -> str:
    """White at 1; full blue at 0, full red at 2 and above."""
    strength = min(abs(value - 1), 1.0)
    far = (220, 38, 38) if value > 1 else (37, 99, 235)
    return "#" + "".join(f"{round(255 + (c - 255) * strength):02x}" for c in far)


def _number(value: float) -> str:
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.4g}"


def _axes(
    title: str,
    last: float,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x: str,
    y: str,
    colours: Mapping[str, str],
) -> tuple[list[str], Callable[[float, float], tuple[float, float]], float]:
    """What stands around a chart whose horizontal axis goes from 0 to `last`.

    Returns:
      (its elements, the function from a value to its place, the height of it all).
    """
    legend, lines = _legend(colours) if len(colours) > 1 else ([], 0)
    top = _TOP + _LINE * lines
    bottom = top + _HEIGHT

    def place(across: float, up: float) -> tuple[float, float]:
        share = (up - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + across / last * (_WIDTH - _LEFT - _RIGHT), bottom - share * _HEIGHT

    parts = [_text(_LEFT, 18, title, "start", "title"), *legend]
    for tick in y_ticks:
        _, height = place(0, tick)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}" class="grid"/>')
        parts.append(_text(_LEFT - 6, height + 4, _number(tick), "end"))
    parts += [_text(place(tick, y_ticks[0])[0], bottom + 15, _number(tick), "middle") for tick in x_ticks]
    return parts + _names_of_axes(x, y, top, bottom), place, bottom + _BOTTOM


def _names_of_axes(x: str, y: str, top: float, bottom: float) -> list[str]:
    middle = (top + bottom) / 2
    turned = f' transform="rotate(-90 14 {middle:.1f})"'
    across = _text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 32, x, "middle", "name")
    return [across, _text(14, middle, y, "middle", "name", turned)] if y else [across]


def _legend(colours: Mapping[str, str]) -> tuple[list[str], int]:
    """The labels in their colours, in as many lines as they need; and how many these are."""
    parts, left, line = [], float(_LEFT), 0
    for label, colour in colours.items():
        shown = label if len(label) <= 40 else label[:39] + "…"
        width = 16 + _CHARACTER * len(shown) + 14
        if left > _LEFT and left + width > _WIDTH:
            left, line = float(_LEFT), line + 1
        y = _TOP + _LINE * line
        parts.append(f'<rect x="{left:.1f}" y="{y - 3:.1f}" width="10" height="10" style="fill:{colour}"/>')
        parts.append(_text(left + 15, y + 6, shown, "start", "label"))
        left += width
    return parts, line + 1


def _colours(series: Mapping[str, object], drawn: Mapping[str, object]) -> dict[str, str]:
    """Label -> colour of what is drawn, the same whatever else is."""
    return {label: f"var(--c{i % _NUM_COLOURS})" for i, label in enumerate(series) if label in drawn}


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}"{more}>{html.escape(text)}</text>'


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
    return f'<svg {size} role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
