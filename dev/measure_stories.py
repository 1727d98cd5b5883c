#!/usr/bin/env python3
"""measure_stories.py: what can be counted of a story model's texts, to steer by. Needs NumPy.

  for s in $(seq 20); do ./mamba model.bin "Once upon a time" -n 200 -s $s; printf '<|endoftext|>'; done > a.txt
  python dev/measure_stories.py text/books.txt text/cool.txt --texts a.txt text/stories_held.txt

Of each file's texts, of which the first --words words count: words that the training texts have not twice, trigrams of
words that came before in their text, names (words with a capital inside a sentence) that come again, and the longest run
of words that stands in a training text, where all names that dev/make_cooldown.py changes count as one, and so do things
of a kind and words of like meaning: a model that recites is not a model that tells. Stories by people that nothing was
trained on say which figures are usual.
"""
import argparse
import collections
import os
import re
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from make_cooldown import ALIKE, PERSON, THINGS, plural
from make_text import END_OF_TEXT, read

SHORT = 5    # words: shorter runs are not looked for


ONE = {word: line[0] for line in THINGS + ALIKE for word in line}
ONE.update((plural(word), plural(line[0])) for line in THINGS for word in line)
ANY = re.compile(r"\b(?:" + "|".join(sorted((word.lower() for word in ONE), key=len, reverse=True)) + r")\b")
LOW = {word.lower(): one.lower() for word, one in ONE.items()}


def words(text, kinds=False):
    text = PERSON.sub("Somebody", text).lower()
    if kinds:
        text = re.sub(r"\ban\b", "a", ANY.sub(lambda found: LOW[found.group()], text))
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text)


class Corpus:
    """The words of the training texts as numbers, and where each run of SHORT of them stands, by its hash."""

    def __init__(self, paths):
        self.number = collections.defaultdict(lambda: len(self.number))
        self.ids = np.array([self.number[w] for path in paths for w in words(read(path), True)], dtype=np.uint64)
        self.count = np.bincount(self.ids.astype(np.int64))
        hashes = self.hashes(self.ids)
        self.order = np.argsort(hashes, kind="stable")
        self.sorted = hashes[self.order]

    @staticmethod
    def hashes(ids):
        n = max(0, len(ids) - SHORT + 1)
        sums = np.zeros(n, dtype=np.uint64)
        for i in range(SHORT):
            sums = sums * np.uint64(0x9E3779B97F4A7C15) + ids[i:i + n] + np.uint64(1)
        return sums

    def known(self, word):
        return word in self.number and self.count[self.number[word]] >= 2

    def longest_run(self, text):
        """Of text, a list of words: (words, the run itself)."""
        ids = np.array([self.number[w] if w in self.number else 2**40 for w in text], dtype=np.uint64)
        best, begin = 0, 0
        for i, value in enumerate(self.hashes(ids)):
            first, last = np.searchsorted(self.sorted, [value, value + np.uint64(1)])
            for at in self.order[first:last]:
                n = 0
                while i + n < len(ids) and at + n < len(self.ids) and ids[i + n] == self.ids[at + n]:
                    n += 1
                if n > best:
                    best, begin = n, i
        return best, " ".join(text[begin:begin + best])


def measure(path, corpus, most):
    texts = [" ".join(text.split(" ")[:most]) for text in read(path).split(END_OF_TEXT) if text.strip()]
    total = unknown = trigrams = repeated = names = names_again = 0
    runs = []
    for text in texts:
        mine = words(text)
        total += len(mine)
        kinds = words(text, True)
        unknown += sum(not corpus.known(word) for word in kinds)
        seen = set()
        for i in range(len(mine) - 2):
            trigrams += 1
            repeated += tuple(mine[i:i + 3]) in seen
            seen.add(tuple(mine[i:i + 3]))
        count = collections.Counter(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", text))
        names += len(count)
        names_again += sum(len(re.findall(rf"\b{name}\b", text)) > 1 for name in count)
        runs.append(corpus.longest_run(kinds))
    runs.sort()
    print(f"{path}: {len(texts)} texts, {total} words, {unknown} unknown; {100 * repeated / max(1, trigrams):.1f}% of trigrams "
          f"repeated; {names_again} of {names} names come again; longest run in training: median "
          f"{runs[len(runs) // 2][0]}, largest {[n for n, _ in runs[-3:]]} words: {runs[-1][1]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("training", nargs="+", help="the training texts")
    parser.add_argument("--texts", nargs="+", required=True, help="files, their texts end with <|endoftext|>")
    parser.add_argument("--words", type=int, default=160, metavar="N", help="of a text (default 160)")
    args = parser.parse_args()
    corpus = Corpus(args.training)
    for path in args.texts:
        measure(path, corpus, args.words)


if __name__ == "__main__":
    main()
