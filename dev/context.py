#!/usr/bin/env python3
"""context.py: what context is worth: bits per byte of the same bytes of a text, with ever more of it before them.

  pip install numpy
  python dev/context.py heldout.dna dna.bin other.bin --mamba ./mamba --window 1024,16384,1048576 -o context.csv

The text is cut into stretches of --stretch bytes that have nothing to do with each other. Scored is the second half of
each stretch, at every window W the same bytes: windows of W bytes are read from a new state, each W / 2 bytes after the one
before, and the second half of each counts. So every byte has at least W / 2 and fewer than W bytes before it; and a window
as long as the stretch is the whole of it.

`mamba eval --each` gives the numbers, so the vocabulary must be bytes. CSV on stdout or in -o: bits per byte of each model,
stretch, window, and block of --block bytes. With them comes, on stderr, the mean of each window, and how much less it is
than that of the window before: the mean of the differences of the blocks, and their standard error.
"""
import argparse
import math
import os
import subprocess
import sys
import tempfile

try:
    import numpy as np
except ImportError:
    sys.exit("context.py needs numpy: pip install numpy")


def windows(text, stretch, W):
    """The windows of W bytes that begin W / 2 bytes after each other, whose second halves are those of the stretches."""
    starts = [at + a for at in range(0, len(text), stretch) for a in range(stretch // 2 - W // 2, stretch - W + 1, W // 2)]
    return b"".join(text[a:a + W] for a in starts)


def scores(args, model, text, W):
    """Bits of each scored byte: (stretches, blocks, bytes)."""
    with tempfile.NamedTemporaryFile(suffix=".txt") as f:
        f.write(windows(text, args.stretch, W))
        f.flush()
        command = [args.mamba, "eval", model, f.name, "--context", str(W), "--each", "-q"] + args.options.split()
        done = subprocess.run(command, capture_output=True)
    if done.returncode:
        sys.exit(f"context.py: {' '.join(command)}: {done.stderr.decode(errors='replace').strip()}")
    nats = np.array(done.stdout.split(), dtype=np.float64)
    wanted = len(text) // W * (W - 1)
    if len(nats) != wanted:
        sys.exit(f"context.py: {model}: {len(nats)} numbers where {wanted} bytes are predicted: is its vocabulary bytes?")
    return nats.reshape(-1, W - 1)[:, W // 2 - 1:].reshape(len(text) // args.stretch, -1, args.block) / math.log(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", metavar="FILE")
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--window", default=",".join(str(1 << i) for i in range(10, 21)), metavar="N,N,...",
                        help="powers of two from 4 on (default 2^10 to 2^20)")
    parser.add_argument("--stretch", type=int, default=1 << 20, metavar="N", help="bytes of a stretch (default 2^20)")
    parser.add_argument("--block", type=int, default=1 << 13, metavar="N", help="bytes of a block (default 2^13)")
    parser.add_argument("--mamba", default="./mamba", metavar="PROGRAM")
    parser.add_argument("--options", default="", metavar="'...'", help="more options of eval, such as '-T 1'")
    parser.add_argument("-o", "--output", metavar="FILE", help="CSV (default stdout)")
    args = parser.parse_args()
    sizes = [int(n) for n in args.window.split(",")]
    try:
        with open(args.text, "rb") as f:
            text = f.read()
    except OSError as error:
        sys.exit(f"context.py: {args.text}: {error.strerror}")
    for n in sizes + [args.stretch, args.block]:
        if n < 4 or n & (n - 1):
            sys.exit(f"context.py: {n} is no power of two from 4 on")
    if max(sizes) > args.stretch or 2 * args.block > args.stretch or not text or len(text) % args.stretch:
        sys.exit(f"context.py: {args.text}: {len(text)} bytes are no stretches of {args.stretch}; a window is at most a "
                 "stretch, a block at most half of one")
    out = open(args.output, "w") if args.output else sys.stdout
    print("model,stretch,window,block,bits", file=out)
    for model in args.models:
        name, before = os.path.basename(model).removesuffix(".bin"), None
        for W in sizes:
            bits = scores(args, model, text, W).mean(axis=2)
            for stretch, row in enumerate(bits):
                for block, value in enumerate(row):
                    print(f"{name},{stretch},{W},{block},{value:.6f}", file=out)
            out.flush()
            told = f"{name} {W}: " + "  ".join(f"{row.mean():.5f}" for row in bits) + f"  all {bits.mean():.5f}"
            if before is not None:
                less = (before - bits).ravel()
                told += f"  less by {less.mean():.5f} +- {less.std(ddof=1) / math.sqrt(len(less)):.5f}"
            print(told, file=sys.stderr)
            before = bits


if __name__ == "__main__":
    main()
