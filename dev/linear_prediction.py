#!/usr/bin/env python3
"""linear_prediction.py: the engineer's baseline for mu-law speech, in bits per byte of a file.

  pip install numpy
  python dev/linear_prediction.py train.mulaw heldout.mulaw

The last --order samples, weighted, predict the next one; the error is taken to be distributed after Laplace with a width
that follows the recent errors; that gives each of the 256 bytes a probability, and the bits are counted. Two ways to
find the weights:
  fixed      least squares over the first nine tenths of the training file, once and for all
  adaptive   least squares over the last samples of the file itself (the window), anew every --hop samples: no weights
             are trained, they follow the speaker
The window, the pace and a factor of the width, and the share of a uniform distribution are those that do best on 50 s
of the training file's last tenth.
The byte 0 before each recording is counted as the models count it, as a byte among 256.
"""
import argparse
import itertools
import os
import sys

try:
    import numpy as np
except ImportError:
    sys.exit("linear_prediction.py needs numpy: pip install numpy")

import mulaw

LEVEL = np.array([mulaw.level(max(c, 1)) for c in range(256)])
LEVEL[0] = 0                                   # the byte before a recording is silence to the predictor
EDGE = np.concatenate([[-np.inf], (LEVEL[1:-1] + LEVEL[2:]) / 2, [np.inf]])       # of the bytes 1 to 255
SMALLEST = 1e-4                                # of the width: silence has no error at all


def read(path):
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        sys.exit(f"linear_prediction.py: {path}: {error.strerror}")
    if len(data) < 20000:
        sys.exit(f"linear_prediction.py: {path}: {len(data)} bytes; at least 20000 are needed")
    return data


def past(x, order):
    """(len(x), order): the samples before each, zeros before the start."""
    padded = np.concatenate([np.zeros(order), x])
    return np.stack([padded[order - 1 - i:order - 1 - i + len(x)] for i in range(order)], 1)


def fixed(x, weights):
    return past(x, len(weights)) @ weights


def fit(x, order):
    rows = past(x, order)
    return np.linalg.solve(rows.T @ rows + 1e-9 * len(x) * np.eye(order), rows.T @ x)


def adaptive(x, order, window, hop):
    """Predictions of each block of hop samples with the weights that are best in the window that ends before it."""
    blocks = -(-len(x) // hop)
    sums = np.zeros((blocks + 1, order, order)), np.zeros((blocks + 1, order))
    for k in range(0, blocks, 1000):           # in pieces: rows of all blocks at once would be large
        part = np.arange(k * hop, min(len(x), (k + 1000) * hop))
        before = past(x[max(0, k * hop - order):part[-1] + 1], order)[-len(part):]
        room = -(-len(part) // hop) * hop
        rows = np.zeros((room, order)); rows[:len(part)] = before
        now = np.zeros(room); now[:len(part)] = x[part]
        rows, now = rows.reshape(-1, hop, order), now.reshape(-1, hop)
        sums[0][k + 1:k + 1 + len(rows)] = rows.transpose(0, 2, 1) @ rows
        sums[1][k + 1:k + 1 + len(rows)] = (rows.transpose(0, 2, 1) @ now[:, :, None])[:, :, 0]
    total = [np.cumsum(s, 0) for s in sums]
    n = window // hop
    xx, xy = (np.concatenate([t[:n], t[n:] - t[:-n]])[:blocks] for t in total)       # sums of the last n blocks
    weights = np.linalg.solve(xx + 1e-5 * np.eye(order), xy[:, :, None])[:, :, 0]
    prediction = np.empty(len(x))
    for k in range(0, blocks, 1000):
        part = slice(k * hop, min(len(x), (k + 1000) * hop))
        before = past(x[max(0, part.start - order):part.stop], order)[-(part.stop - part.start):]
        prediction[part] = np.einsum("ij,ij->i", before, np.repeat(weights[k:k + 1000], hop, 0)[:len(before)])
    return prediction


def widths(error, pace):
    """Mean size of the error so far, the latest counting most: E_t = pace E_{t-1} + (1 - pace) |e_{t-1}|."""
    out, mean = np.empty(len(error)), 0.02
    for t, e in enumerate(np.abs(error).tolist()):
        out[t] = mean
        mean = pace * mean + (1 - pace) * e
    return np.maximum(out, SMALLEST)


def cdf(x, width):
    half = 0.5 * np.exp(-np.abs(x) / width)
    return np.where(x < 0, half, 1 - half)


def bits(data, prediction, width, share):
    """Bits per byte, if a byte's probability is Laplace's mass between its edges and, by `share`, 1 / 256."""
    code = np.maximum(data, 1)
    mass = cdf(EDGE[code] - prediction, width) - cdf(EDGE[code - 1] - prediction, width)
    mass = np.where(data == 0, 0, np.maximum(mass, 0))
    return float(-np.log2((1 - share) * mass + share / 256).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train"), parser.add_argument("measure")
    parser.add_argument("--order", type=int, default=16, metavar="N", help="samples that predict the next (default 16)")
    parser.add_argument("--hop", type=int, default=40, metavar="N", help="samples between new weights (default 40: 5 ms)")
    args = parser.parse_args()
    if args.order < 1 or args.hop < 1:
        parser.error("--order and --hop must be at least 1")
    train, asked = read(args.train), read(args.measure)
    cut = len(train) * 9 // 10
    tune = train[cut:cut + 400000]
    weights = fit(LEVEL[train[:cut]], args.order)
    ways = [("fixed", None)] + [("adaptive", w) for w in (120, 160, 240, 480)]
    predict = lambda data, way: fixed(LEVEL[data], weights) if way[1] is None else adaptive(LEVEL[data], args.order, way[1], args.hop)
    for name, members in itertools.groupby(ways, key=lambda way: way[0]):
        best = None
        for way in members:
            prediction = predict(tune, way)
            for pace in (0.8, 0.85, 0.9, 0.95):
                width = widths(LEVEL[tune] - prediction, pace)
                for factor, share in itertools.product((0.85, 1.0, 1.2), (0.001, 0.003, 0.01)):
                    tried = bits(tune, prediction, factor * width, share), way, pace, factor, share
                    best = min(best or tried, tried, key=lambda t: t[0])
        _, way, pace, factor, share = best
        prediction = predict(asked, way)
        result = bits(asked, prediction, factor * widths(LEVEL[asked] - prediction, pace), share)
        print(f"{name:9s} order {args.order}" + (f", window {way[1]}" if way[1] else "") +
              f", pace {pace}, width x {factor}, uniform {share}: {result:.4f} bits per byte of {os.path.basename(args.measure)} "
              f"({best[0]:.4f} where it was tuned)", flush=True)


if __name__ == "__main__":
    main()
