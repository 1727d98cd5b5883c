#!/usr/bin/env python3
"""markov.py: Markov models as a baseline for sequences of bytes: bits per byte of one file after counting in another.

  pip install numpy
  python dev/markov.py train.dna heldout.dna --order 12
  python dev/markov.py train.mulaw heldout.mulaw --order 4

Order k predicts a byte from the k before it. Its counts are smoothed with the order below, down to order 0 and the
uniform distribution over the bytes that stand in the training file:

  p_k(s | c) = (n(c s) + alpha_k p_{k-1}(s | c without its first)) / (n(c) + alpha_k)

alpha_k is the weight, in counts, of the order below: of the powers of 2, the one that predicts a tenth of the training
file best (every tenth of 1000 pieces, for a file may change on the way) from the rest; then everything is counted again
over all of it. So the file that is measured has no say in anything. Its first K bytes, K the largest order, are only context, for every order.
"""
import argparse
import csv
import os
import sys

try:
    import numpy as np
except ImportError:
    sys.exit("markov.py needs numpy: pip install numpy")

DENSE = 1 << 27      # up to so many contexts and symbols there is a counter for each; beyond, runs are sorted
ALPHAS = [2.0 ** i for i in range(-6, 21)]


def read(path):
    try:
        return np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        sys.exit(f"markov.py: {path}: {error.strerror}")


def keys(symbols, k, A):
    """Each run of k symbols as a number, those that end before symbols[k], symbols[k+1], ..., the last of all included."""
    key = np.zeros(len(symbols) - k + 1, dtype=np.int64)
    for i in range(k):
        key = key * A + symbols[i:len(symbols) - k + 1 + i]
    return key


def count(train, asked, size):
    """How often each key of `asked` is in train; keys are below size."""
    if size <= DENSE:
        return np.bincount(train, minlength=size)[asked]
    train = np.sort(train)
    return np.searchsorted(train, asked, "right") - np.searchsorted(train, asked, "left")


def counts(train, asked, k, first, A):
    """(n(c s), n(c)) of order k for asked[first], asked[first + 1], ..."""
    both = count(keys(train, k + 1, A), keys(asked, k + 1, A)[first - k:], A ** (k + 1))
    # a context at the very end of train is followed by nothing
    context = count(keys(train, k, A)[:-1], keys(asked, k, A)[first - k:-1], A ** k)
    return both, context


def smoothed(below, both, context, alpha):
    return (both + alpha * below) / (context + alpha)


def bits(p):
    return float(-np.log2(p).mean())


def fit(train, order, A):
    """The alphas, each for the best prediction of the tenth that is not counted."""
    tenth = np.arange(len(train)) * 1000 // len(train) % 10 == 9
    known, asked = train[~tenth], train[tenth]
    p, alphas = np.full(len(asked) - order, 1 / A), []
    for k in range(order + 1):
        both, context = counts(known, asked, k, order, A)
        alphas.append(min(ALPHAS, key=lambda alpha: bits(smoothed(p, both, context, alpha))))
        p = smoothed(p, both, context, alphas[-1])
    return alphas


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="file to count in")
    parser.add_argument("measure", nargs="+", help="files to predict, none of it counted")
    parser.add_argument("--order", type=int, default=12, metavar="K", help="largest order (default 12)")
    parser.add_argument("--out", metavar="CSV", help="the table: order, alpha, a column of bits per byte for each file")
    args = parser.parse_args()
    data = read(args.train)
    symbols = np.unique(data)
    A, order = len(symbols), args.order
    if order < 0 or A ** (order + 1) >= 1 << 63:
        sys.exit(f"markov.py: --order {order}: with {A} different bytes the order must be from 0 to {int(63 / np.log2(max(A, 2))) - 1}")
    code = np.full(256, -1, dtype=np.int64)
    code[symbols] = np.arange(A)
    train, files = code[data], []
    for path in args.measure:
        asked = code[read(path)]
        if len(asked) < order + 2 or len(train) < 10 * (order + 2):
            sys.exit(f"markov.py: {path if len(asked) < order + 2 else args.train}: too short for order {order}")
        if (asked < 0).any():
            sys.exit(f"markov.py: {path} has a byte that {args.train} has not, at {int(np.argmax(asked < 0))}")
        files.append(asked)
    alphas = fit(train, order, A)
    names = [os.path.basename(path) for path in args.measure]
    print(f"{len(train)} bytes of {A} kinds counted; bits per byte of\norder   alpha  " + "  ".join(names))
    p, rows = [np.full(len(asked) - order, 1 / A) for asked in files], []
    for k, alpha in enumerate(alphas):
        p = [smoothed(below, *counts(train, asked, k, order, A), alpha) for below, asked in zip(p, files)]
        rows.append([k, alpha] + [round(bits(x), 6) for x in p])
        print(f"{k:5d} {alpha:7g}  " + "  ".join(f"{b:{len(n)}.4f}" for b, n in zip(rows[-1][2:], names)), flush=True)
    if args.out:
        with open(args.out, "w", newline="") as f:
            csv.writer(f).writerows([["order", "alpha"] + names] + rows)


if __name__ == "__main__":
    main()
