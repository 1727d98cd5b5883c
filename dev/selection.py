#!/usr/bin/env python3
"""selection.py: what `./mamba model.bin "prompt" --show-selection` prints in a pipe, as a picture. Python's standard library only.

  ./mamba models/tales.bin "Once upon a time" --show-selection | python dev/selection.py -o selection.svg
  python dev/selection.py --copying 112 | ./mamba copying.bin - --show-selection | python dev/selection.py --ids -o selection.svg

Each token stands in a box whose colour says its mean step size delta, on a logarithmic scale from the smallest to the largest of
them: pale, the token hardly enters the state; dark, it does. The colours are those of the terminal (cli/selection.h), and the scale
spans a factor of 2 at least, so that tokens that differ by less look nearly the same. --ids prints ids instead of text (a task's tokens are no letters).
--copying L writes, instead of a picture, the bytes of one sequence of the copying task: 16 data tokens 1..14 among noise, 0, and
the 16 places at the end, 15, where the model must write them down (the layout of mamba.c's task_sequence).
"""
import argparse
import html
import math
import random
import sys

WIDTH, MARGIN, ROW, CHAR = 860, 16, 30, 8.4


# The terminal's colours 255, 153, 111, 68, 26, 19 and 17; from the fifth on text is white.
HEAT = ("#eeeeee", "#afd7ff", "#87afff", "#5f87d7", "#005fd7", "#0000af", "#00005f")
FIRST_DARK = 4


def shade(delta, low, high):
    return min(int((math.log(delta) - low) / (high - low) * len(HEAT)), len(HEAT) - 1)


def copying_sequence(length, seed):
    rng = random.Random(seed)
    ids = [0] * (length - 16) + [15] * 16
    for place in rng.sample(range(length - 16), 16):
        ids[place] = rng.randrange(1, 15)
    return bytes(ids)


def read_tokens(lines):
    tokens = []
    for number, line in enumerate(lines, 1):
        parts = line.rstrip("\n").split("\t", 2)
        try:
            tokens.append((int(parts[0]), float(parts[1]), parts[2] if len(parts) > 2 else ""))
        except (IndexError, ValueError):
            sys.exit(f"selection.py: line {number} is no `id, delta, text` of --show-selection: {line.rstrip()[:60]!r}")
        if not (tokens[-1][1] > 0 and math.isfinite(tokens[-1][1])):
            sys.exit(f"selection.py: line {number}: delta must be a positive number, not {parts[1]}")
    if not tokens:
        sys.exit("selection.py: no tokens on standard input")
    return tokens


def draw(tokens, ids, title):
    low, high = math.log(min(d for _, d, _ in tokens)), math.log(max(d for _, d, _ in tokens))
    lacks = max(0, math.log(2) - (high - low))
    low, high = low - lacks / 2, high + lacks / 2
    boxes, x, y = [], MARGIN, MARGIN + 54
    for token, delta, text in tokens:
        label = str(token) if ids else text.replace(" ", "·") or " "
        width = max(len(label), 2) * CHAR + 6
        if x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + ROW
        heat = shade(delta, low, high)
        ink = "#ffffff" if heat >= FIRST_DARK else "#1d2733"
        boxes.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 4}" fill="{HEAT[heat]}"/>'
                     f'<text x="{x + width / 2:.1f}" y="{y + 18}" fill="{ink}" text-anchor="middle">{html.escape(label)}</text>')
        x += width
    legend = "".join(f'<rect x="{MARGIN + i * 24}" y="{MARGIN + 24}" width="24" height="12" fill="{c}"/>' for i, c in enumerate(HEAT))
    legend += (f'<text x="{MARGIN + 24 * len(HEAT) + 8}" y="{MARGIN + 35}" fill="#1d2733">mean Δ from {math.exp(low):.3g} to {math.exp(high):.3g}, '
               "logarithmic</text>")
    height = y + ROW + MARGIN
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
            f'font-family="ui-monospace, monospace" font-size="14"><rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
            f'<text x="{MARGIN}" y="{MARGIN + 12}" fill="#1d2733" font-weight="bold">{html.escape(title)}</text>{legend}'
            + "\n".join(boxes) + "</svg>\n")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("-o", metavar="FILE", help="the picture; by default standard output")
    p.add_argument("--ids", action="store_true", help="ids instead of text")
    p.add_argument("--title", default="", help="a line above")
    p.add_argument("--copying", type=int, metavar="L", help="write the bytes of a copying sequence of L tokens")
    p.add_argument("--seed", type=int, default=1)
    args = p.parse_args()
    if args.copying is not None:
        if args.copying < 32:
            p.error("--copying needs a length of 32 or more")
        sys.stdout.buffer.write(copying_sequence(args.copying, args.seed))
        return
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # a token may be half a character
    picture = draw(read_tokens(sys.stdin), args.ids, args.title)
    if args.o:
        with open(args.o, "w", encoding="utf-8") as out:
            out.write(picture)
    else:
        sys.stdout.write(picture)


if __name__ == "__main__":
    main()
