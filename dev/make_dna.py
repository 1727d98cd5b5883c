#!/usr/bin/env python3
"""make_dna.py: genomes (FASTA) to bytes to train on and bytes to be measured on. Python's standard library only.

  python dev/make_dna.py E.Coli.fasta V.Cholerae.fasta --extra lambda_virus.fa -o dna/

The name lines and line ends go: they would tell the model which genome it reads, and where. What is left must be A, C, G
and T. In the middle of each sequence of at least a million bases, and of at least twice what is taken out of it, a
stretch of --stretch bases is held out, and --gap bases on both sides of it are thrown away, so that no window of the
training text comes nearer to it than that. train.dna has what is left, each piece followed by its other strand (the
reverse complement; --one-strand leaves that out); heldout.dna has the stretches one after another, which pieces of a
power of two of at most --stretch bases divide evenly; --extra files become NAME.dna whole, never trained on; --whole
files are trained on whole. Bacteria's chromosomes are rings: with --ring what is left of one is a single piece, across
the place where the file begins.

A stretch of another organism could still be a copy of something in the training text, for genomes share genes. So runs
of 24 bases (--run) that stand in both are counted, on either strand; the share is printed for each held-out stretch.
"""
import argparse
import lzma
import os
import sys

OTHER = str.maketrans("ACGT", "TGCA")
SHORTEST = 1000000


def sequences(path):
    """[(name, bases)] of a FASTA file."""
    try:
        with (lzma.open if path.endswith(".xz") else open)(path, "rt", encoding="ascii") as f:
            found = []
            for number, line in enumerate(f, 1):
                if line.startswith(">"):
                    found.append((line[1:].strip(), []))
                elif not found:
                    sys.exit(f"make_dna.py: {path}: does not start with a '>' line: no FASTA file")
                else:
                    bases = line.strip().upper()
                    if bases.strip("ACGT") or bases.translate(str.maketrans("", "", "ACGT")):
                        sys.exit(f"make_dna.py: {path}:{number}: something other than A, C, G and T: {bases[:40]}")
                    found[-1][1].append(bases)
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        sys.exit(f"make_dna.py: {path}: {getattr(error, 'strerror', None) or error}")
    return [(name, "".join(parts)) for name, parts in found]


def other_strand(bases):
    return bases.translate(OTHER)[::-1]


def write(folder, name, parts):
    data = "".join(parts)
    with open(os.path.join(folder, name), "w", newline="") as f:
        f.write(data)
    print(f"{name}: {len(data):,} bases")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="FASTA, .xz or plain")
    parser.add_argument("--extra", action="append", default=[], metavar="FILE", help="a genome that is only measured on")
    parser.add_argument("-o", "--output", default=".", metavar="DIR")
    parser.add_argument("--stretch", type=int, default=1 << 18, metavar="N", help="held out of each sequence (default 2^18)")
    parser.add_argument("--gap", type=int, default=1 << 17, metavar="N", help="thrown away on both sides (default 2^17)")
    parser.add_argument("--whole", action="append", default=[], metavar="FILE", help="a genome that is trained on whole")
    parser.add_argument("--ring", action="store_true", help="join what is left of a chromosome across its start")
    # By chance 13 million bases hold a given run of 24 with a probability of 1 in 20 million.
    parser.add_argument("--run", type=int, default=24, metavar="N", help="length of the runs that are counted (default 24)")
    parser.add_argument("--one-strand", action="store_true", help="without the reverse complement")
    args = parser.parse_args()
    if args.stretch < 1 or args.gap < 0 or args.run < 2:
        sys.exit("make_dna.py: --stretch needs at least 1, --gap 0, --run 2")
    taken = args.stretch + 2 * args.gap
    shortest = max(SHORTEST, 2 * taken)
    train, held, thrown = [], [], 0
    for path in args.files + args.whole:
        for name, bases in sequences(path):
            pieces = [bases]
            if len(bases) >= shortest and path not in args.whole:
                at = (len(bases) - args.stretch) // 2
                pieces = [bases[:at - args.gap], bases[at + args.stretch + args.gap:]]
                if args.ring:
                    pieces = [pieces[1] + pieces[0]]
                held.append((name, bases[at:at + args.stretch]))
                thrown += 2 * args.gap
                print(f"{name}: {len(bases):,} bases, held out {at:,} to {at + args.stretch:,}")
            for piece in pieces:
                train += [piece] if args.one_strand else [piece, other_strand(piece)]
    if not held:
        sys.exit(f"make_dna.py: no sequence has {shortest} bases: nothing to hold out")
    os.makedirs(args.output, exist_ok=True)
    write(args.output, "train.dna", train)
    write(args.output, "heldout.dna", [bases for _, bases in held])
    extra = []
    for path in args.extra:
        name = os.path.basename(path).split(".")[0]
        extra.append((name, "".join(bases for _, bases in sequences(path))))
        write(args.output, name + ".dna", [extra[-1][1]])
    print(f"thrown away beside what is held out: {thrown:,} bases")
    # Runs are looked up by the held-out ones, of which there are few; the training text is walked once.
    where = {}
    for i, (_, bases) in enumerate(held + extra):
        for strand in bases, other_strand(bases):
            for at in range(0, len(bases) - args.run + 1, args.run // 2):
                where.setdefault(strand[at:at + args.run], set()).add(i)
    found = {run for piece in train for at in range(len(piece) - args.run + 1) if (run := piece[at:at + args.run]) in where}
    for i, (name, bases) in enumerate(held + extra):
        runs = [bases[at:at + args.run] for at in range(0, len(bases) - args.run + 1, args.run // 2)]
        shared = sum(run in found or other_strand(run) in found for run in runs)
        print(f"  {100 * shared / len(runs):.2f}% of the runs of {args.run} bases stand in train.dna too: {name}")


if __name__ == "__main__":
    main()
