"""Pictures for a page: pure functions from numbers to SVG. No library, no colours: classes, which a stylesheet paints.

A label is a text, or a pair of one in English and one in Chinese, of which the stylesheet shows one.
"""

import math
from html import escape

Label = str | tuple[str, str]


def label(x: float, y: float, text: Label, kind: str = "", anchor: str = "start") -> str:
    """A text at a place, once or in both languages."""
    if isinstance(text, tuple):
        return "".join(
            label(x, y, part, f"{kind} {name}", anchor) for name, part in zip(("en", "zh"), text, strict=True)
        )
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} class="{escape(kind.strip())}">{escape(text)}</text>'


def picture(width: float, height: float, kind: str, title: Label, content: str) -> str:
    """An SVG that fills the width it is given, at most its own."""
    name = " / ".join(dict.fromkeys(title)) if isinstance(title, tuple) else title
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    size += f' style="--width: {width:.0f}px"'
    role = "group" if "<a " in content else "img"  # what can be followed is no image
    return f'<svg class="{kind}" {size} role="{role}" aria-label="{escape(name)}">{content}</svg>'


# -- the chain -------------------------------------------------------------------------------------------------------

NODE_WIDTH, NODE_HEIGHT, GAP_X, GAP_Y, EDGE, ARROW = 230, 78, 60, 20, 2, 7


def place_nodes(names: list[str], edges: list[tuple[str, str, str]]) -> dict[str, tuple[int, float]]:
    """Find a column and a row for every node of a chain.

    A node stands one column behind the last of those it came from; each leaf has its own row, and what others came
    from stands in the middle of them.

    Args:
        names: in an order in which each stands behind what it came from.
        edges: (from, to, "parent" or "feed"); at most one parent to a node.

    Returns:
        {name: (column, row)}
    """
    columns = {}
    for name in names:
        columns[name] = max(
            (columns[first] + 1 for first, second, _ in edges if second == name and first in columns), default=0
        )
    children = {
        name: [second for first, second, kind in edges if first == name and kind == "parent"] for name in names
    }
    grown = {second for _, second, kind in edges if kind == "parent"}
    rows: dict[str, float] = {}
    count = 0

    def settle(name):
        nonlocal count
        if name in rows:  # a circle, which only damaged files make
            return
        rows[name] = -1
        for child in children[name]:
            settle(child)
        own = [rows[child] for child in children[name] if rows[child] >= 0]
        rows[name] = (min(own) + max(own)) / 2 if own else count
        count += not own

    for name in sorted(names, key=lambda name: name in grown):
        settle(name)
    return {name: (columns[name], rows[name]) for name in names}


def chain(nodes: list[dict], edges: list[tuple[str, str, str]], title: Label) -> str:
    """Draw who came from whom, from left to right.

    Args:
        nodes: {"id", "title", "lines": labels, "mark": label or None, "kind": classes, "href": or None}.
        edges: see place_nodes.
        title: what the picture is, for those who do not see it.
    """
    places = place_nodes([node["id"] for node in nodes], edges)
    corners = {
        name: (EDGE + column * (NODE_WIDTH + GAP_X), EDGE + GAP_Y / 2 + row * (NODE_HEIGHT + GAP_Y))
        for name, (column, row) in places.items()
    }
    drawn = "".join(_edge(corners[first], corners[second], kind) for first, second, kind in edges)
    drawn += "".join(_node(node, *corners[node["id"]]) for node in nodes)
    width = max(x for x, _ in corners.values()) + NODE_WIDTH + EDGE
    height = max(y for _, y in corners.values()) + NODE_HEIGHT + EDGE
    return picture(width, height, "chain", title, drawn)


def _edge(first, second, kind):
    x, y = first[0] + NODE_WIDTH, first[1] + NODE_HEIGHT / 2
    to_x, to_y = second[0] - ARROW, second[1] + NODE_HEIGHT / 2
    side = 1 if second[1] > first[1] else -1
    if kind == "feed":
        y += 10 * side
        if to_x - x > GAP_X:  # above the row where it ends, whose boxes are others, and down
            return _draw(kind, x, y, second[0] + NODE_WIDTH / 4, second[1] - GAP_Y / 2, second[1] - ARROW)
        to_y -= 14 * side  # apart from the line of the parent
    return _draw(kind, x, y, to_x, to_y)


def _draw(kind, x, y, to_x, to_y, down_to=None):
    """A line that bends in the gap behind its first column, then goes along a row; and its head."""
    bend, end = (GAP_X - ARROW) * 0.6, x + GAP_X - ARROW
    path = f"M{x:.1f} {y:.1f}C{x + bend:.1f} {y:.1f} {end - bend:.1f} {to_y:.1f} {end:.1f} {to_y:.1f}H{to_x:.1f}"
    head = f"M{to_x:.1f} {to_y - 4:.1f}l{ARROW} 4l-{ARROW} 4z"
    if down_to is not None:
        path += f"V{down_to:.1f}"
        head = f"M{to_x - 4:.1f} {down_to:.1f}l4 {ARROW}l4 -{ARROW}z"
    return f'<path class="edge {kind}" d="{path}"/><path class="head {kind}" d="{head}"/>'


def _node(node, x, y):
    box = f'<rect class="box" x="{x:.1f}" y="{y:.1f}" width="{NODE_WIDTH}" height="{NODE_HEIGHT}" rx="8"/>'
    dot = f'<rect class="swatch" x="{x + 14:.1f}" y="{y + 15:.1f}" width="10" height="10" rx="2.5"/>'
    words = label(x + 31, y + 24.5, shorten(node["title"]), "name")
    if node["mark"]:
        words += label(x + NODE_WIDTH - 13, y + 24.5, node["mark"], "mark", "end")
    for place, line in enumerate(node["lines"]):
        words += label(x + 14, y + 46 + 18 * place, line, "line")
    title = f"<title>{escape(node['title'])}</title>"
    inside = f'<g class="node {escape(node["kind"])}">{title}{box}{dot}{words}</g>'
    return f'<a href="{escape(node["href"])}">{inside}</a>' if node["href"] else inside


def shorten(text: str, most: int = 17) -> str:
    """A name that fits a box: its end says more than its beginning."""
    return text if len(text) <= most else "…" + text[1 - most :]


# -- a dot with its interval -----------------------------------------------------------------------------------------


def scale(values: list[float], pad: float = 0.06) -> tuple[float, float, bool]:
    """(lowest, highest, logarithmic) of an axis on which all the values have room; far apart they go by powers."""
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > 20
    if logarithmic:
        return low / (high / low) ** pad, high * (high / low) ** pad, True
    room = (high - low) * pad or abs(high) * 0.1 or 1.0
    return low - room, high + room, False


def position(value: float, axis: tuple[float, float, bool]) -> float:
    """Where a value stands on an axis, in percent of its length."""
    low, high, logarithmic = axis
    if logarithmic:
        value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
    return min(100.0, max(0.0, 100 * (value - low) / (high - low)))


def interval(cell: dict, origin: dict | None, axis: tuple[float, float, bool]) -> str:
    """A dot at a value and a line over its interval, before the band of the interval of what it came from.

    Args:
        cell, origin: {"value", and "low", "high" where there is an interval}.
        axis: what scale returned, the same in a whole column.
    """
    drawn = '<line class="rule" x1="0" x2="100%" y1="8" y2="8"/>'
    if origin and "low" in origin and "high" in origin:
        left, right = position(origin["low"], axis), position(origin["high"], axis)
        drawn += f'<rect class="band" x="{left:.1f}%" width="{max(right - left, 0.8):.1f}%" y="1" height="14" rx="2"/>'
    if "low" in cell and "high" in cell:
        ends = position(cell["low"], axis), position(cell["high"], axis)
        drawn += f'<line class="span" x1="{ends[0]:.1f}%" x2="{ends[1]:.1f}%" y1="8" y2="8"/>'
    drawn += f'<circle class="dot" cx="{position(cell["value"], axis):.1f}%" cy="8" r="3.6"/>'
    return f'<svg class="interval" width="100%" height="16" aria-hidden="true">{drawn}</svg>'


# -- curves ----------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 290, 156, 36, 62, 12, 24
POINTS = 160  # of a line: more cannot be seen on its width
DOTS = 30  # more of them hide the line, which then goes without


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that divide a range into about `count` parts."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_texts(values: list[float], share: bool = False) -> list[str]:
    """Ticks with as many decimals as their distance needs; shares of 1 in percent."""
    values = [100 * value if share else value for value in values]
    step = min(
        (second - first for first, second in zip(values, values[1:], strict=False)), default=abs(sum(values)) or 1
    )
    digits = next((digits for digits in range(6) if abs(step - round(step, digits)) < step / 100), 6)
    return [f"{value:,.{digits}f}".replace("-", "−") + "%" * share for value in values]


def thin(points: list[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most about `most` points of a line: means over equal parts of it; the last point stays."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points) - 1, size)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [*means, points[-1]]


def curve(
    train: list, held_out: list[dict], kind: str, title: Label, names: tuple[Label, Label], show, share=False
) -> str:
    """Draw what training logged and what was measured on held-out rows, over the steps.

    Args:
        train: (step, value).
        held_out: {"step", "value", and "low", "high" where there is an interval}.
        kind: classes.
        title: what is drawn.
        names: of the two lines.
        show: number -> text.
        share: the values are shares of 1.
    """
    train = thin([(step, value) for step, value in train])
    values = [value for _, value in train]
    values += [point[end] for point in held_out for end in ("value", "low", "high") if end in point]
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1
    low, high = (
        (max(0, low - room), min(1, high + room)) if share and 0 <= low and high <= 1 else (low - room, high + room)
    )
    last = max([step for step, _ in train] + [point["step"] for point in held_out]) or 1

    def spot(step, value):
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))

    drawn = _grid(low, high, last, spot, share)
    ends = []
    if train:
        drawn += f'<polyline class="train" points="{_points(spot(*point) for point in train)}"/>'
        ends.append((spot(*train[-1])[1], names[0], show(train[-1][1]), "train"))
    if held_out:
        drawn += _held_out(held_out, spot, show)
        ends.append(
            (spot(held_out[-1]["step"], held_out[-1]["value"])[1], names[1], show(held_out[-1]["value"]), "held")
        )
    return picture(WIDTH, HEIGHT, f"curve {kind}", title, drawn + _end_labels(ends))


def _points(spots):
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)


def _grid(low, high, last, spot, share):
    drawn, values = "", ticks(low, high, 3)
    for value, text in zip(values, tick_texts(values, share), strict=True):
        y = spot(0, value)[1]
        drawn += f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        drawn += label(LEFT - 7, y + 3.5, text, "tick", "end")
    drawn += label(LEFT, HEIGHT - 7, "0", "tick")
    return drawn + label(WIDTH - RIGHT, HEIGHT - 7, (f"step {last:,.0f}", f"第 {last:,.0f} 步"), "tick", "end")


def _held_out(points, spot, show):
    line = thin([(point["step"], point["value"]) for point in points])
    drawn = f'<polyline class="held" points="{_points(spot(*point) for point in line)}"/>'
    for point in points if len(points) <= DOTS else points[-1:]:
        x, y = spot(point["step"], point["value"])
        if "low" in point and "high" in point:
            ends = [spot(point["step"], point[end])[1] for end in ("low", "high")]
            drawn += f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
        tip = f"{point['step']:,.0f}: {show(point['value'])}"
        if "low" in point and "high" in point:
            tip += f" ({show(point['low'])} … {show(point['high'])})"
        tip = escape(tip)
        drawn += f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="3" data-tip="{tip}"/>'
    return drawn


def _end_labels(ends):
    """Names and last values at the end of the lines, pushed apart where they meet."""
    ends = sorted(ends, key=lambda end: end[0])
    heights = [end[0] for end in ends]
    if len(ends) == 2 and heights[1] - heights[0] < 27:
        middle = sum(heights) / 2
        heights = [middle - 13.5, middle + 13.5]
        shift = max(0, TOP - heights[0]) - max(0, heights[1] - (HEIGHT - BOTTOM - 8))
        heights = [height + shift for height in heights]
    drawn = ""
    for y, (_, name, value, kind) in zip(heights, ends, strict=True):
        drawn += label(WIDTH - RIGHT + 8, y + 1, value, f"end {kind}")
        drawn += label(WIDTH - RIGHT + 8, y + 13, name, f"end name {kind}")
    return drawn


# -- bars ------------------------------------------------------------------------------------------------------------


def bar(shares: list[tuple[float, str]]) -> str:
    """A bar of parts side by side.

    Args:
        shares: (share of the whole, class), from left to right.
    """
    drawn, left = '<rect class="track" width="100%" height="6" rx="1.5"/>', 0.0
    for share, kind in shares:
        if share > 0:
            width = max(0.6, 100 * share)
            drawn += f'<rect class="{kind}" x="{100 * left:.2f}%" width="{width:.2f}%" height="6" rx="1.5"/>'
        left += share
    return f'<svg class="shares" width="100%" height="6" aria-hidden="true">{drawn}</svg>'


def dumbbell(first: float | None, second: float | None, highest: float) -> str:
    """Two values on one line from 0 to `highest`: a ring and a dot, and what lies between them."""
    places = [None if value is None else 4 + 92 * value / highest for value in (first, second)]
    drawn = '<line class="rule" x1="0" x2="100%" y1="9" y2="9"/>'
    if None not in places:
        drawn += f'<line class="between" x1="{min(places):.1f}%" x2="{max(places):.1f}%" y1="9" y2="9"/>'
    for place, kind in zip(places, ("ring", "dot"), strict=True):
        if place is not None:
            drawn += f'<circle class="{kind}" cx="{place:.1f}%" cy="9" r="4.5"/>'
    return f'<svg class="dumbbell" width="100%" height="18" aria-hidden="true">{drawn}</svg>'
