"""Pictures as SVG that fill the page's width, follow its themes, and say their values when pointed at.

Across, places are percentages, so that text keeps its size on any screen; down, they are pixels. A colour is CSS,
mostly a variable of the page's style sheet. Every name is escaped.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]

BEFORE, AFTER, REMOVED = "var(--before)", "var(--after)", "var(--removed)"

_TOP, _BOTTOM = 24, 40  # pixels above and below the plot, for titles and ticks
_SHAPES = {
    "circle": "",  # SVG has its own
    "square": "M-3.5-3.5h7v7h-7z",
    "diamond": "M0-5L5 0L0 5L-5 0z",
    "triangle": "M0-5L5 4H-5z",
    "cross": "M-1.5-5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
    "wedge": "M0 5L5-4H-5z",
    "star": "M0-8L2-2.5L7.6-2.5L3.1 1L4.7 6.5L0 3.2L-4.7 6.5L-3.1 1L-7.6-2.5L-2-2.5z",
}
SHAPES = tuple(_SHAPES)


@dataclass(frozen=True)
class Axis:
    """What values lie between the ends of a plot, and how its ticks read.

    Attributes:
        low, high: at the ends.
        title: of the axis.
        log: whether equal distances are equal factors.
        unit: follows every tick's number.
        whole: whether only whole numbers get ticks.
    """

    low: float
    high: float
    title: str = ""
    log: bool = False
    unit: str = ""
    whole: bool = False

    @classmethod
    def over(
        cls,
        values: Iterable[float],
        title: str = "",
        *,
        log: bool = False,
        zero: bool = False,
        unit: str = "",
    ) -> "Axis":
        """An axis that all finite values fit on, with some air; with `zero` it starts there."""
        found = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        low, high = (min(found), max(found)) if found else (1.0, 1.0)
        if log:
            air = max((high / low) ** 0.04, 1.1)
            return cls(low / air, high * air, title, True, unit)
        air = 0.06 * (high - low) or abs(high) / 10 or 1.0
        return cls(0.0 if zero and low >= 0 else low - air, high + air, title, False, unit)

    def at(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Round values between the ends, and how they read.

        >>> [text for _, text in Axis(0, 97, unit=" %").ticks()]
        ['0 %', '20 %', '40 %', '60 %', '80 %']
        >>> [text for _, text in Axis(0.02, 150, log=True).ticks()]
        ['0.1', '1', '10', '100']
        >>> [text for _, text in Axis(3, 120, log=True).ticks()]
        ['5', '10', '20', '50', '100']
        """
        decades = (
            range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1) if self.log else ()
        )
        steps = [n * 10.0**power for power in decades for n in (1, 2, 5)]
        values = [value for value in steps if self.low <= value <= self.high]
        if len(values) > most:
            powers = [10.0**power for power in decades if self.low <= 10.0**power <= self.high]
            values = powers[:: 1 + (len(powers) - 1) // most]
        if len(values) < 2:
            values = self._even_ticks(most)
        return [(value, number(value) + self.unit) for value in values]

    def _even_ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        size = 10 ** math.floor(math.log10(rough))
        step = next(size * n for n in (1, 2, 5, 10) if size * n >= rough * 0.999)
        if self.whole:
            step = max(1, step)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


def number(value: float) -> str:
    """A number as short as it can be read, with four digits at most.

    >>> number(0.30000000000000004), number(12345678.0), number(-0.5), number(1e-7)
    ('0.3', '12,350,000', '−0.5', '1e−07')
    """
    short = float(f"{value:.4g}")
    text = (
        f"{short:,.0f}" if abs(short) >= 1000 and short == int(short) and abs(short) < 1e9 else f"{short:.4g}"
    )
    return text.replace("-", "−")


class Chart:
    """A plot with two axes, to which series of shapes are added.

    Args:
        x, y: the axes.
        height: of all of it, pixels.
    """

    def __init__(self, x: Axis, y: Axis, height: int = 300) -> None:
        self.x, self.y, self.height = x, y, height
        self._parts: list[str] = []

    def add(self, color: str, *shapes: str, name: str = "") -> None:
        """Draw shapes in one colour; `name` lets the page's script find them."""
        data = f' data-series="{escape(name)}"' if name else ""
        self._parts.append(f'<g style="--c:{color}"{data}>{"".join(shapes)}</g>')

    def line(
        self, points: Sequence[Point], title: str = "", *, dashed: bool = False, thin: bool = False
    ) -> str:
        """A line through points."""
        kind = "line" + " dashed" * dashed + " thin" * thin
        through = " ".join(f"{100 * self.x.at(x):.2f},{self._down(y):.1f}" for x, y in points)
        return (
            f'<svg viewBox="0 0 100 {self.height}" preserveAspectRatio="none" width="100%" height="{self.height}">'
            f'<polyline class="{kind}" points="{through}">{_title(title)}</polyline></svg>'
        )

    def mark(self, x: float, y: float, title: str, shape: str = "circle", kind: str = "") -> str:
        """A mark at a point; of kind "hollow", or "faint" until it is pointed at."""
        across, down, said = self._across(x), f"{self._down(y):.1f}", _title(title)
        if shape == "circle":
            return f'<circle cx="{across}" cy="{down}" r="4" class="mark {kind}">{said}</circle>'
        return f'<svg x="{across}" y="{down}" class="mark {kind}"><path d="{_SHAPES[shape]}"/>{said}</svg>'

    def bar(self, left: float, right: float, low: float, high: float, title: str) -> str:
        """A filled rectangle between two values of each axis."""
        top, bottom = self._down(high), self._down(low)
        width = 100 * (self.x.at(right) - self.x.at(left))
        return (
            f'<rect class="bar" x="{self._across(left)}" width="{width:.2f}%" y="{top:.1f}" '
            f'height="{max(bottom - top, 0.5):.1f}">{_title(title)}</rect>'
        )

    def rule(self, start: Point, end: Point, kind: str = "thin") -> str:
        """A straight line between two points."""
        return (
            f'<line class="line {kind}" x1="{self._across(start[0])}" x2="{self._across(end[0])}" '
            f'y1="{self._down(start[1]):.1f}" y2="{self._down(end[1]):.1f}"/>'
        )

    def note(self, x: float, text: str) -> str:
        """Words above the plot, from a place on."""
        return f'<text class="note" x="{self._across(x)}" y="{_TOP - 8}">{escape(text)}</text>'

    def draw(self, label: str, axes: bool = True) -> Markup:
        """The picture; `label` says what it shows to who cannot see it."""
        left, frame = self._frame() if axes else (0, [])
        place = f"margin-left:{left}px;width:calc(100% - {left + 20}px)"
        return Markup(
            f'<svg class="chart" role="img" aria-label="{escape(label)}" height="{self.height}" style="{place}">'
            f"{''.join(frame)}{''.join(self._parts)}</svg>"
        )

    def _frame(self) -> tuple[int, list[str]]:
        """Room to the left of the plot, in pixels, and grid, ticks and titles."""
        floor = self.height - _BOTTOM
        frame, widest = [], 0
        for value, text in self.y.ticks(max(3, self.height // 60)):
            down, widest = self._down(value), max(widest, len(text))
            frame.append(f'<line class="grid" x2="100%" y1="{down:.1f}" y2="{down:.1f}"/>')
            frame.append(
                f'<text class="tick" x="-8" y="{down:.1f}" dy=".35em" text-anchor="end">{text}</text>'
            )
        for value, text in self.x.ticks(5):
            across = self._across(value)
            frame.append(f'<line class="grid" x1="{across}" x2="{across}" y1="{_TOP}" y2="{floor}"/>')
            frame.append(
                f'<text class="tick" x="{across}" y="{floor + 16}" text-anchor="middle">{escape(text)}</text>'
            )
        left = 14 + 7 * widest
        if self.y.title:
            frame.append(f'<text class="tick" x="{-left + 2}" y="{_TOP - 12}">{escape(self.y.title)}</text>')
        if self.x.title:
            frame.append(
                f'<text class="tick" x="100%" y="{floor + 34}" text-anchor="end">{escape(self.x.title)}</text>'
            )
        return left, frame

    def _across(self, x: float) -> str:
        return f"{100 * self.x.at(x):.2f}%"

    def _down(self, y: float) -> float:
        return _TOP + (1 - self.y.at(y)) * (self.height - _TOP - _BOTTOM)


def strip(width: float, height: float, shapes: Iterable[str], title: str = "") -> Markup:
    """A small picture for a row of a table, as wide as its cell; the row says in words what it shows.

    Args:
        width, height: in units of the shapes; both are stretched to the cell.
        shapes: from `box`, `cells` and `steps`.
        title: said when it is pointed at.
    """
    return Markup(
        f'<svg class="strip" viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="none" aria-hidden="true">'
        f"{_title(title)}{''.join(shapes)}</svg>"
    )


def box(
    color: str, x: float, y: float, width: float, height: float, share: float = 1, title: str = ""
) -> str:
    """A filled rectangle; `share` of 1 is the full colour."""
    faint = f' opacity="{share:.2f}"' if share < 1 else ""
    place = f'x="{x:.5g}" y="{y:.5g}" width="{width:.5g}" height="{height:.5g}"'
    return f'<rect style="--c:{color}" {place}{faint}>{_title(title)}</rect>'


def cells(color: str, shares: Sequence[float]) -> str:
    """A row of cells of width 1 and height 10, in ten shades; `shares` of 1 have the full colour."""
    shades: dict[int, str] = {}
    place = 0
    for shade, run in itertools.groupby(max(1, round(10 * share)) for share in shares):
        length = len(list(run))
        shades[shade] = shades.get(shade, "") + f"M{place} 5h{length}"
        place += length
    drawn = (f'<path opacity="{shade / 10:g}" d="{path}"/>' for shade, path in shades.items())
    return f'<g class="cells" style="--c:{color}">{"".join(drawn)}</g>'


def steps(color: str, base: float, heights: Sequence[float]) -> str:
    """A filled outline of columns of width 1 between a base and each height, both counted downwards."""
    runs = (
        (f"{height:.1f}".removesuffix(".0"), len(list(run))) for height, run in itertools.groupby(heights)
    )
    path = "".join(f"V{height}h{length}" for height, length in runs)
    return f'<path style="--c:{color}" d="M0 {base:g}{path}V{base:g}z"/>'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""
