#!/usr/bin/env python3
"""make_text.py: the training text and the held-out text of the model that ships. Python's standard library only.

  python dev/make_text.py children_pd.txt.xz novels_pd.txt.xz tinystories_sample.txt.xz -o text/

Each file (xz or plain) is a row of texts that <|endoftext|> ends. The last three books of the first file are held out:
they go to heldout.txt as they stand, and nothing else does. All other texts go to train.txt, each file as often as
--times says. The trainer draws its windows at random from the whole of train.txt, so the order of the books means
nothing, and the number of times is the share of the training.

The same book may stand in two collections. So texts are compared by their shingles, runs of 12 words without regard to
case and punctuation: a text that shares with the held-out books more than a quotation (--quotation shingles) is left
out of the training, and so is the second of two texts of which more than half is the same. Both are reported, with the
largest overlap that was let pass.
"""
import argparse
import hashlib
import lzma
import os
import re
import sys

END_OF_TEXT = "<|endoftext|>"
SHINGLE = 12    # words: long enough that two authors do not write the same by chance
SAMPLE = 16     # of the texts that are not held out, one shingle in so many is kept: for copies of whole books that is plenty


def read(path):
    try:
        with (lzma.open if path.endswith(".xz") else open)(path, "rb") as f:
            return f.read().decode("utf-8")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        sys.exit(f"make_text.py: {path}: {getattr(error, 'strerror', None) or error}")


def texts_of(path):
    """Each with its end marker and the white space after it, so that joining them gives the file again."""
    return re.findall(rf"(?s).+?{re.escape(END_OF_TEXT)}\s*|.+$", read(path))


def shingles(text):
    """Hashes that do not change from run to run; distinct."""
    words = re.findall(r"[^\W_]+", text.replace(END_OF_TEXT, " ").casefold())
    return {hash_of(words[i:i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def hash_of(words):
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "little")


def title(text):
    return " ".join(text.split())[:48]


def times(argument, n):
    try:
        counts = [int(part) for part in argument.split(",")]
    except ValueError:
        counts = []
    if len(counts) != n or min(counts) < 0:
        sys.exit(f"make_text.py: --times {argument}: {n} whole numbers with commas between, one for each file")
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="texts, .xz or plain; the first gives the held-out books")
    parser.add_argument("-o", "--output", default=".", metavar="DIR", help="where train.txt and heldout.txt go (default here)")
    parser.add_argument("--held-out", type=int, default=3, metavar="N", help="last texts of the first file (default 3)")
    parser.add_argument("--times", metavar="N,...", help="how often each file goes into train.txt (default once)")
    parser.add_argument("--quotation", type=int, default=20, metavar="N",
                        help="shingles of 12 words that a text may share with the held-out books (default 20)")
    args = parser.parse_args()
    repeat = times(args.times, len(args.files)) if args.times else [1] * len(args.files)
    corpora = [texts_of(path) for path in args.files]
    if not 0 < args.held_out < len(corpora[0]):
        sys.exit(f"make_text.py: --held-out {args.held_out}: {args.files[0]} has {len(corpora[0])} texts")
    held, corpora[0] = corpora[0][-args.held_out:], corpora[0][:-args.held_out]
    forbidden = set().union(*map(shingles, held))

    seen, kept, largest = [], [], (0, "none")      # seen: (sampled shingles, title) of texts that were kept
    owner = {}                                     # sampled shingle -> index in seen of the first text that has it
    for path, corpus in zip(args.files, corpora):
        kept.append([])
        for text in corpus:
            mine = shingles(text)
            quoted = len(mine & forbidden)
            sample = [s for s in mine if s % SAMPLE == 0]
            shared = {}
            for s in sample:
                if s in owner:
                    shared[owner[s]] = shared.get(owner[s], 0) + 1
            twin = max(shared, key=shared.get, default=None)
            if quoted > args.quotation:
                print(f"left out, shares {quoted} shingles with the held-out books: {path}: {title(text)}")
            elif twin is not None and shared[twin] > len(sample) / 2:
                print(f"left out, {shared[twin] / len(sample):.0%} of it is in '{seen[twin]}': {path}: {title(text)}")
            else:
                largest = max(largest, (quoted, title(text)))
                seen.append(title(text))
                for s in sample:
                    owner.setdefault(s, len(seen) - 1)
                kept[-1].append(text)
    print(f"largest overlap let pass: {largest[0]} shingles of the held-out books' {len(forbidden)} ({largest[1]})")

    os.makedirs(args.output, exist_ok=True)
    for name, parts in ("train.txt", [t for k, n in zip(kept, repeat) for t in k * n]), ("heldout.txt", held):
        data = "".join(parts).encode("utf-8")
        with open(os.path.join(args.output, name), "wb") as f:
            f.write(data)
        print(f"{name}: {len(parts)} texts, {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()[:16]}")
    for path, k, n in zip(args.files, kept, repeat):
        print(f"  {n} x {os.path.basename(path)}: {len(k)} texts, {sum(len(t.encode()) for t in k):,} bytes")
    for text in held:
        print(f"  held out: {title(text)} ...")


if __name__ == "__main__":
    main()
