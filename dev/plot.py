#!/usr/bin/env python3
"""plot.py: columns of CSV files as curves in an SVG. Python's standard library only.

  python dev/plot.py train.csv -o curve.svg                        the loss of a training run and its held-out loss
  python dev/plot.py small.csv large.csv -o curve.svg --x seconds  two runs against wall-clock time
  python dev/plot.py speed.csv -o speed.svg --x length --y scan,parallel --logx --logy    any table with a header

With one file each column has a colour; with more, each file has one and the columns differ in their dashes. A column
with a value on every line is a line; one with fewer values than lines (held_out) gets markers, and so does any curve of
at most 40 points. --smooth N draws the mean over N lines around each above the curve itself, which then is pale; sparse
columns are left as they are. Lines without a value (or with nan or inf) are skipped, and so are values that are not
positive on a logarithmic axis. The picture follows the reader's light or dark setting.
"""
import argparse
import csv
import math
import os
import sys
from xml.sax.saxutils import escape

COLOURS = ("#2f6fb0", "#d1602b", "#3a8f4f", "#8a5bb0", "#b0304a", "#7a6a3a", "#2c9aa0", "#555555")
DASHES = ("", "7 3", "2 3", "9 3 2 3")
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 820, 480, 74, 24, 54
INK, GRID, FAINT, PAPER = "#222222", "#e3e3e3", "#f1f1f1", "#ffffff"
# The same colours where the reader's screen is dark: CSS in the picture replaces them.
DARK = {INK: "#d6dbe1", GRID: "#2f353d", FAINT: "#21262c", PAPER: "#14181d", "#2f6fb0": "#6db1f2", "#d1602b": "#f0905a",
        "#3a8f4f": "#6cc585", "#8a5bb0": "#bd93e0", "#b0304a": "#ee7b91", "#7a6a3a": "#c2ad6a", "#2c9aa0": "#5fcfd5",
        "#555555": "#a5a5a5"}
LABELS = {"held_out": "held-out loss", "loss": "training loss", "seconds": "time (s)", "tokens_per_second": "tokens/s",
          "learning_rate": "learning rate", "gradient_norm": "gradient norm"}
# An axis says more than a curve: what is counted, and in which unit.
AXES = {"held_out": "held-out loss (nats per token)", "loss": "training loss (nats per token)", "step": "optimizer step",
        "tokens": "tokens trained on", "seconds": "training time (s)", "tokens_per_second": "tokens a second",
        "gradient_norm": "norm of the gradient, before clipping"}


class PlotError(Exception):
    """What a file or a flag caused: one line for the reader."""


# ---------------------------------------------------------------------------------------------------------------------
# CSV in. Only the columns that are asked for have to hold numbers.

def read_table(path, columns):
    """{column: values, None where empty}, all of one length."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = csv.reader(f, skipinitialspace=True)
            header = [name.strip() for name in next(rows, [])]
            if not header:
                raise PlotError(f"{path}: the file is empty")
            missing = [name for name in columns if name not in header]
            if missing:
                raise PlotError(f"{path}: no column {missing[0]}; it has {', '.join(header)}")
            table = {name: [] for name in columns}
            for row in rows:
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) > len(header):
                    raise PlotError(f"{path}:{rows.line_num}: {len(row)} values under {len(header)} column names")
                for name in table:
                    i = header.index(name)
                    table[name].append(number(row[i] if i < len(row) else "", f"{path}:{rows.line_num}: {name}"))
    except OSError as e:
        raise PlotError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise PlotError(f"{path}: not a text file in UTF-8") from None
    except csv.Error as e:
        raise PlotError(f"{path}:{rows.line_num}: {e}") from None
    if not table[columns[0]]:
        raise PlotError(f"{path}: a header, and no lines below it")
    return table


def number(cell, where):
    """The cell's value; None for an empty one and for what no axis can show (nan, inf)."""
    if not cell.strip():
        return None
    try:
        value = float(cell)
    except ValueError:
        raise PlotError(f"{where} is {cell.strip()!r}, not a number") from None
    return value if math.isfinite(value) else None


def running_mean(values, n):
    """The mean over n values with each in the middle, so that it does not lag. The window narrows to nothing at the start,
    where a loss falls fast, and is cut in half at the end, where one value alone would be noise."""
    means = []
    for i in range(len(values)):
        half = min(n // 2, i)
        window = values[i - half:i + half + 1]
        means.append(math.fsum(window) / len(window))
    return means


# ---------------------------------------------------------------------------------------------------------------------
# Axes. An axis maps values to 0..1 and knows its ticks: (value, label), the label empty for a minor one.

class Axis:
    def __init__(self, values, log):
        self.log, self.base2, low, high = log, log == 2, min(values), max(values)
        if log:
            low, high = math.log10(low), math.log10(high)
        gap = (high - low) * 0.03 or abs(high) * 0.1 or 1.0
        self.low, self.high = low - gap, high + gap

    def flush(self, values):
        """Starts and ends at the data: for x."""
        if min(values) < max(values):
            self.low, self.high = (math.log10(v) if self.log else v for v in (min(values), max(values)))
        return self

    def at(self, value):
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)

    def ticks(self, wanted):
        if self.base2:
            powers = range(math.ceil(self.low / math.log10(2) - 1e-9), math.floor(self.high / math.log10(2) + 1e-9) + 1)
            every = -(-len(powers) // (2 * wanted))
            return [(2.0 ** i, "" if (i - powers[0]) % every else power_of_two(i)) for i in powers]
        if not self.log or self.high - self.low < 0.7:
            low, high = (10 ** self.low, 10 ** self.high) if self.log else (self.low, self.high)
            return linear_ticks(low, high, wanted)
        every = max(1, math.ceil((self.high - self.low) / (wanted + 1)))
        labelled = range(1, 10) if self.high - self.low < 1.1 else (1, 2, 5) if self.high - self.low < 2.5 else (1,)
        ticks = []
        for power in range(math.floor(self.low), math.ceil(self.high) + 1):
            for digit in range(1, 10):
                named = digit in labelled and power % every == 0
                if (named or every == 1) and self.low - 1e-9 <= power + math.log10(digit) <= self.high + 1e-9:
                    value = digit * 10.0 ** power
                    ticks.append((value, short(value) if named else ""))
        return ticks


def power_of_two(i):
    """2^10 is 1k, 2^20 1M: of tokens, as they are counted."""
    return f"{2.0 ** i:g}" if i < 10 else next(f"{2 ** (i - n)}{unit}" for n, unit in ((30, "G"), (20, "M"), (10, "k")) if i >= n)


def linear_ticks(low, high, wanted):
    rough = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * f for f in (1, 2, 5, 10) if unit * f >= rough * 0.999)
    span = high - low
    first, last = math.ceil((low - span * 1e-9) / step), math.floor((high + span * 1e-9) / step)
    largest = max(abs(first), abs(last)) * step
    return [(i * step, short(i * step, largest, step)) for i in range(first, last + 1)]


def short(value, largest=None, step=None):
    """1500000 is 1.5M; with a step, the unit suits the axis's largest value, and the decimals tell neighbours apart."""
    size = abs(value) if largest is None else largest
    unit, suffix = next(((u, s) for u, s in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= u), (1, ""))
    if size < 1e4:
        unit, suffix = 1, ""
    if value == 0:
        return "0"
    if size < 1e-4 or size >= 1e16:
        return f"{value:.3g}"
    text = f"{value / unit:.{decimals(step / unit)}f}" if step else f"{value / unit:.10g}"
    return text + suffix


def decimals(step):
    return next((d for d in range(10) if abs(step * 10 ** d - round(step * 10 ** d)) < 1e-6 * step * 10 ** d), 10)


# ---------------------------------------------------------------------------------------------------------------------
# SVG out. A curve: (label, colour, dash, points, smooth points or None, markers).

def word(column):
    return LABELS.get(column, column.replace("_", " "))


def axis_label(columns, log):
    """What an axis shows: one column, or the loss of both kinds; of other columns together nobody knows."""
    if len(columns) == 1:
        label = AXES.get(columns[0], word(columns[0]))
    else:
        label = "loss (nats per token)" if set(columns) == {"loss", "held_out"} else ""
    return ", ".join(part for part in (label, "logarithmic scale" if log else "") if part)


def curves_of(tables, names, x, columns, smooth, logx, logy):
    curves = []
    usable = lambda value, log: value is not None and (value > 0 or not log)
    for i, (table, name) in enumerate(zip(tables, names)):
        for j, column in enumerate(columns):
            points = [(a, b) for a, b in zip(table[x], table[column]) if usable(a, logx) and usable(b, logy)]
            if not points:
                continue
            sparse = len(points) < 0.8 * len(table[x])
            colour = COLOURS[(i if len(tables) > 1 else j) % len(COLOURS)]
            dash = DASHES[j % len(DASHES)] if len(tables) > 1 and not sparse else ""
            mean = None
            if smooth > 1 and not sparse and len(points) > 2:
                mean = list(zip([p[0] for p in points], running_mean([p[1] for p in points], smooth)))
            label = word(column) if len(tables) == 1 else name if len(columns) == 1 else f"{name}: {word(column)}"
            curves.append((label, colour, dash, points, mean, sparse or len(points) <= 40))
    return curves


def disc(x, y, colour):
    """The marker, with a rim, so that it shows on a line."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" fill="{colour}" stroke="{PAPER}" stroke-width="1"/>'


def dark_style():
    rules = "".join(f'[{a}="{light}"]{{{a}:{dark}}}' for light, dark in DARK.items() for a in ("fill", "stroke"))
    return f"<style>@media (prefers-color-scheme:dark){{{rules}}}</style>"


def dashes(dash):
    return f' stroke-dasharray="{dash}"' if dash else ""


def text(x, y, content, anchor="start", size=12, extra=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{extra}>{escape(content)}</text>'


def thinned(points, axis, places):
    """At most the first, lowest, highest and last point of each place on the x axis: looks the same, in far less text."""
    if len(points) <= 4 * places:
        return points
    kept, column, at = [], [], None
    for p in points + [None]:
        place = p and int(axis.at(p[0]) * places)
        if column and place != at:
            pick = {0, len(column) - 1, *(f(range(len(column)), key=lambda i: column[i][1]) for f in (min, max))}
            kept += [column[i] for i in sorted(pick)]
            column = []
        at = place
        column.append(p)
    return kept


def draw(curves, xlabel, ylabel, title, logx, logy, ylim=None):
    shown = [p for c in curves for p in c[3]]
    xs, ys = [p[0] for p in shown], [p[1] for p in shown]
    ax, ay = Axis(xs, logx).flush(xs), Axis(ys, logy)
    if ylim:
        ay.flush(ylim)
    top = 52 if title else 22
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - top - BOTTOM
    px, py = (lambda v: LEFT + ax.at(v) * width), (lambda v: top + (1 - ay.at(v)) * height)
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
           f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" fill="{INK}">',
           dark_style(), f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>',
           f'<clipPath id="frame"><rect y="{top}" width="{WIDTH}" height="{height}"/></clipPath>']
    if title:
        svg.append(text(LEFT, 30, title, size=16, extra=' font-weight="bold"'))

    for value, label in ax.ticks(8):
        x = px(value)
        svg.append(f'<path d="M{x:.1f} {top}V{top + height}" stroke="{GRID if label else FAINT}"/>')
        if label:
            svg += [f'<path d="M{x:.1f} {top + height}v5" stroke="{INK}"/>', text(x, top + height + 19, label, "middle")]
    for value, label in ay.ticks(6):
        y = py(value)
        svg.append(f'<path d="M{LEFT} {y:.1f}H{LEFT + width}" stroke="{GRID if label else FAINT}"/>')
        if label:
            svg += [f'<path d="M{LEFT} {y:.1f}h-5" stroke="{INK}"/>', text(LEFT - 9, y + 4, label, "end")]
    svg.append(f'<path d="M{LEFT} {top}V{top + height}H{LEFT + width}" fill="none" stroke="{INK}"/>')
    svg.append(text(LEFT + width / 2, HEIGHT - 14, xlabel, "middle", 13))
    svg.append(text(18, top + height / 2, ylabel, "middle", 13, f' transform="rotate(-90 18 {top + height / 2:.1f})"'))

    svg.append('<g clip-path="url(#frame)">' if ylim else "<g>")
    for _, colour, dash, points, mean, markers in curves:
        lines = [(points, 0.3, 1, ""), (mean, 1, 1.8, dash)] if mean else [(points, 1, 1.5 if markers else 1, dash)]
        for line, opacity, thick, dash in lines:
            d = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in thinned(line, ax, width))
            svg.append(f'<polyline points="{d}" fill="none" stroke="{colour}" stroke-width="{thick}" stroke-opacity="{opacity}" '
                       f'stroke-linejoin="round"{dashes(dash)}/>')
    for _, colour, _, points, _, markers in curves:                                      # over all lines
        svg += [disc(px(x), py(y), colour) for x, y in points] if markers else []
    svg.append("</g>")
    svg += legend(curves, top, px, py, width, height)
    return "\n".join(svg + ["</svg>", ""])


def legend(curves, top, px, py, width, height):
    """In the corner where it hides the fewest points."""
    w, h = 52 + 7.0 * max(len(c[0]) for c in curves), 12 + 19 * len(curves)
    corners = [(LEFT + width - w - 10, top + 10), (LEFT + width - w - 10, top + height - h - 10),
               (LEFT + 12, top + height - h - 10), (LEFT + 12, top + 10)]
    places = [(px(x), py(y)) for c in curves for x, y in c[3]]
    for c in curves:                                                                     # and on the lines between few points
        ends = [(px(x), py(y)) for x, y in c[3]] if len(c[3]) <= 40 else []
        places += [(a + (u - a) * i / 10, b + (v - b) * i / 10) for (a, b), (u, v) in zip(ends, ends[1:]) for i in range(1, 10)]
    hidden = lambda corner: sum(-6 < x - corner[0] < w + 6 and -6 < y - corner[1] < h + 6 for x, y in places)
    x, y = min(corners, key=hidden)
    svg = [f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h}" rx="3" fill="{PAPER}" fill-opacity="0.9" stroke="{GRID}"/>']
    for i, (label, colour, dash, _, _, markers) in enumerate(curves):
        line = y + 16 + 19 * i
        svg.append(f'<path d="M{x + 10:.1f} {line:.1f}h26" stroke="{colour}" stroke-width="1.8"{dashes(dash)}/>')
        svg += [disc(x + 23, line, colour)] if markers else []
        svg.append(text(x + 44, line + 4, label))
    return svg


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def limits(text, log):
    """The two numbers of --ylim, or None."""
    if text is None:
        return None
    try:
        low, high = (float(v) for v in text.split(","))
    except ValueError:
        raise PlotError(f"--ylim {text}: two numbers with a comma between them") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high and (low > 0 or not log)):
        raise PlotError(f"--ylim {text}: the second must be larger{', both positive' if log else ''}")
    return low, high


def run(a):
    columns = [name.strip() for name in a.y.split(",") if name.strip()]
    if not columns:
        raise PlotError("--y names no column")
    if a.smooth < 1:
        raise PlotError(f"--smooth {a.smooth}: must be at least 1")
    if os.path.realpath(a.output) in map(os.path.realpath, a.csv):
        raise PlotError(f"--output {a.output}: would overwrite the CSV")
    tables = [read_table(path, [a.x] + columns) for path in a.csv]
    names = [os.path.splitext(os.path.basename(path))[0] for path in a.csv]
    if len(set(names)) < len(names):                              # runs/a/train.csv runs/b/train.csv
        names = [os.path.splitext(path)[0] for path in a.csv]
    logx = 2 if a.log2x else a.logx
    curves = curves_of(tables, names, a.x, columns, a.smooth, logx, a.logy)
    if not curves:
        raise PlotError(f"{a.csv[0]}: no line has a number to show for {a.x} and {a.y}")
    xlabel, ylabel = a.xlabel or axis_label([a.x], logx), a.ylabel or axis_label(columns, a.logy)
    svg = draw(curves, xlabel, ylabel, a.title, logx, a.logy, limits(a.ylim, a.logy))
    try:
        with open(a.output, "w", encoding="utf-8") as f:
            f.write(svg)
    except OSError as e:
        raise PlotError(f"{a.output}: {e.strerror}") from None
    print(f"wrote {a.output}: {', '.join(f'{c[0]} ({len(c[3])})' for c in curves)}")


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("csv", nargs="+", help="files with a header line")
    parser.add_argument("-o", "--output", required=True, metavar="SVG", help="the picture")
    parser.add_argument("--x", default="step", metavar="COLUMN", help="horizontal: step, tokens, seconds, ... (default step)")
    parser.add_argument("--y", default="loss,held_out", metavar="COLUMN,...", help="curves (default loss,held_out)")
    parser.add_argument("--logx", action="store_true", help="logarithmic horizontal axis")
    parser.add_argument("--log2x", action="store_true", help="the same with a tick for each power of two: 1k is 1,024")
    parser.add_argument("--logy", action="store_true", help="logarithmic vertical axis")
    parser.add_argument("--ylim", metavar="LOW,HIGH", help="ends of the vertical axis; what lies outside is cut off (default: all fits)")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="running mean over N lines (default 1: none)")
    parser.add_argument("--title", default="")
    parser.add_argument("--xlabel", help="instead of the column's name")
    parser.add_argument("--ylabel", help="instead of the column's name (several columns: none)")
    try:
        run(parser.parse_args())
    except PlotError as e:
        sys.exit(f"plot.py: {e}")


if __name__ == "__main__":
    main()
