#!/usr/bin/env python3
"""read_blind.py: texts of two models side by side, for readers who are not told which is which. Python's standard library.

  python dev/read_blind.py write "OLD COMMAND" "NEW COMMAND" -o pairs/       {seed} in a command is 1 to 20
  python dev/read_blind.py score pairs/ answers.csv                          lines `pair,1` or `pair,2`: the better text

write makes pairs/pairs.txt for the readers, with a first and a second text for each seed, and pairs/key.csv, which they
do not get: a generator of its own seed (--coin) draws which model stands first. Texts are what the commands print, none
left out; a command is read as a shell does. score counts how often the new one was preferred, and how often a fair coin
would be at least as often on its side.
"""
import argparse
import csv
import math
import os
import random
import subprocess
import sys

QUESTIONS = """Each pair has two beginnings of a story, by two programs. Read both and say which is the better story:
Does a person stay the same person? Does one sentence follow from the last? Does it say something
that makes sense as a whole? The end of a text may be cut off; do not count that against it. Answer with
lines `pair,1` or `pair,2`, the number of the better text; there are no ties.
"""


def text_of(command, seed):
    done = subprocess.run(command.replace("{seed}", str(seed)), shell=True, capture_output=True)
    if done.returncode:
        sys.exit(f"read_blind.py: {command}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode().strip()


def write(args):
    for command in args.old, args.new:
        if "{seed}" not in command:
            sys.exit(f"read_blind.py: {command}: no {{seed}} in it")
    coin = random.Random(args.coin)
    os.makedirs(args.output, exist_ok=True)
    with open(os.path.join(args.output, "pairs.txt"), "w") as pairs, \
            open(os.path.join(args.output, "key.csv"), "w") as key:
        pairs.write(QUESTIONS)
        key.write("pair,first\n")
        for seed in range(1, args.pairs + 1):
            texts = {"old": text_of(args.old, seed), "new": text_of(args.new, seed)}
            first = coin.choice(("old", "new"))
            second = "new" if first == "old" else "old"
            pairs.write(f"\n\n======== PAIR {seed} ========\n\n---- text 1 ----\n\n{texts[first]}\n\n"
                        f"---- text 2 ----\n\n{texts[second]}\n")
            key.write(f"{seed},{first}\n")
    print(f"{args.pairs} pairs in {args.output}/pairs.txt; keep key.csv from the readers")


def rows(path):
    with open(path) as f:
        return [row for row in csv.reader(f) if row and row[0].strip().isdigit()]


def score(args):
    first = {int(pair): who.strip() for pair, who in rows(os.path.join(args.folder, "key.csv"))}
    answers = {int(row[0]): row[1].strip() for row in rows(args.answers)}
    if set(answers) - set(first) or not set(answers.values()) <= {"1", "2"}:
        sys.exit(f"read_blind.py: {args.answers}: lines `pair,1` or `pair,2`, of the pairs in {args.folder}")
    n = len(answers)
    new = sum((first[pair] == "new") == (answer == "1") for pair, answer in answers.items())
    chance = sum(math.comb(n, k) for k in range(new, n + 1)) / 2 ** n
    print(f"the new one is preferred in {new} of {n}; a fair coin does as well with probability {chance:.2g}")
    print("the old one in pairs", *[p for p, a in answers.items() if (first[p] == "new") != (a == "1")])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("write")
    sub.add_argument("old")
    sub.add_argument("new")
    sub.add_argument("-o", "--output", required=True, metavar="DIR")
    sub.add_argument("--pairs", type=int, default=20)
    sub.add_argument("--coin", type=int, default=1, help="seed of the order (default 1)")
    sub.set_defaults(run=write)
    sub = commands.add_parser("score")
    sub.add_argument("folder")
    sub.add_argument("answers")
    sub.set_defaults(run=score)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
