"""Line charts, histograms and heat maps as SVG text, for pages that need no network and no plotting library."""

import html
import math
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 520, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 30, 26
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706")
_MAX_POINTS = 300
_BINS = 40


def line_chart(title: str, series: Mapping[str, Points], *, includes: Sequence[float] = ()) -> str:
    """One chart of some lines over steps.

    Args:
      title: above the chart.
      series: label -> (step, value) in order of steps; long ones are averaged down to what can be seen. The horizontal
        axis goes from 0 to the last step of all.
      includes: values that the vertical axis reaches in any case.
    Returns:
      An <svg> element; empty text where there is nothing to draw.
    """
    drawn = {label: _thin(points) for label, points in series.items() if points}
    if not drawn:
        return ""
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points] + list(includes)
    last = max(xs)
    x_ticks, y_ticks = [tick for tick in ticks(0, last, are_whole=True) if tick <= last], ticks(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = x / last
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_text(_LEFT, 18, title, "start", "title")]
    for tick in y_ticks:
        _, y = place(0, tick)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(_text(_LEFT - 6, y + 4, _number(tick), "end"))
    for tick in x_ticks:
        parts.append(_text(place(tick, y_ticks[0])[0], _HEIGHT - 8, _number(tick), "middle"))
    for i, (label, points) in enumerate(drawn.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" stroke="{colour}" fill="none" stroke-width="1.6"/>')
        if len(points) < 20:
            places = [place(*point) for point in points]
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places]
        if len(drawn) > 1:
            parts.append(_text(_WIDTH - _RIGHT - 90 * (len(drawn) - 1 - i), 18, label, "end", colour=colour))
    return _svg(_WIDTH, _HEIGHT, parts)


def histogram(title: str, values: Sequence[float], *, unit: str, marks: Mapping[str, float] | None = None) -> str:
    """How often values are how large.

    Args:
      title: above the chart.
      values: at least 0, in no order.
      unit: of what there are so many, such as "documents".
      marks: label -> a value that is marked by a vertical line, if the axis reaches so far.
    Returns:
      An <svg> element; empty text where there is nothing to draw.
    """
    if not values:
        return ""
    x_ticks = ticks(0, max(values), are_whole=True)
    width = x_ticks[-1] / _BINS
    counts = [0] * _BINS
    for value in values:
        counts[min(_BINS - 1, int(value / width))] += 1
    y_ticks = ticks(0, max(counts), are_whole=True)
    across, up = (_WIDTH - _LEFT - _RIGHT) / x_ticks[-1], (_HEIGHT - _TOP - _BOTTOM) / y_ticks[-1]
    parts = [_text(_LEFT, 18, title, "start", "title")]
    for tick in y_ticks:
        y = _HEIGHT - _BOTTOM - tick * up
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(_text(_LEFT - 6, y + 4, _number(tick), "end"))
    parts += [_text(_LEFT + tick * across, _HEIGHT - 8, _number(tick), "middle") for tick in x_ticks]
    for i, count in enumerate(counts):
        if count:
            label = f"{_number(i * width)} to {_number((i + 1) * width)}: {count:,} {unit}"
            parts.append(
                f'<rect x="{_LEFT + i * width * across + 0.5:.1f}" y="{_HEIGHT - _BOTTOM - count * up:.1f}" '
                f'width="{width * across - 1:.1f}" height="{count * up:.1f}" fill="{_COLOURS[0]}">'
                f"<title>{html.escape(label)}</title></rect>"
            )
    for label, value in (marks or {}).items():
        if value <= x_ticks[-1]:
            x = _LEFT + value * across
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" stroke="{_COLOURS[1]}"/>'
            )
            parts.append(_text(x - 4, _TOP + 8, label, "end", colour=_COLOURS[1]))
    return _svg(_WIDTH, _HEIGHT, parts)


def heat_map(title: str, rows: Sequence[Sequence[float]], *, row_name: str, column_name: str) -> str:
    """A map of cells that are white at 1, blue below it and red above.

    Args:
      title: above the map.
      rows: values, at least 0, of rows of one length.
      row_name, column_name: what a row and a column are.
    Returns:
      An <svg> element.
    """
    columns = len(rows[0])
    cell_width, cell_height = (_WIDTH - _LEFT - _RIGHT) / columns, max(3.0, min(24.0, 240 / len(rows)))
    height = _TOP + cell_height * len(rows) + _BOTTOM
    parts = [_text(_LEFT, 18, title, "start", "title")]
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            x, y = _LEFT + j * cell_width, _TOP + i * cell_height
            parts.append(
                f'<rect x="{x:.2f}" y="{y:.2f}" width="{cell_width + 0.3:.2f}" height="{cell_height + 0.3:.2f}" '
                f'fill="{_heat(value)}"><title>{row_name} {i}, {column_name} {j}: {value:.2f}</title></rect>'
            )
    parts.append(_text(_LEFT - 6, _TOP + cell_height * len(rows) / 2 + 4, row_name, "end"))
    parts.append(_text(_LEFT + (_WIDTH - _LEFT - _RIGHT) / 2, height - 8, column_name, "middle"))
    return _svg(_WIDTH, height, parts)


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


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick", colour: str = "") -> str:
    fill = f' style="fill:{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}"{fill}>{html.escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img">{"".join(parts)}</svg>'
