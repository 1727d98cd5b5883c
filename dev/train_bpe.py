#!/usr/bin/env python3
"""Trains a byte-level BPE vocabulary on text files and writes a tokenizer.json that export.py accepts.

NFC normalizer, GPT-2 pre-tokenizer, no prefix space; id 0 is <|endoftext|>, all 256 bytes have a symbol. A corpus line
that holds <|endoftext|> is split there, so that the marker itself is not learned as text.
    pip install tokenizers
    python3 dev/train_bpe.py --vocab 2048 --out tokenizer.json book1.txt book2.txt"""
import argparse
import os
import sys

END_OF_TEXT = "<|endoftext|>"


def lines(paths):
    for path in paths:
        with open(path, encoding="utf-8", newline="") as f:      # newline="": \r\n reaches the tokenizer as it is
            for line in f:
                yield from (part for part in line.split(END_OF_TEXT) if part)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text files to train on")
    parser.add_argument("--vocab", type=int, default=2048, metavar="N",
                        help="size of the vocabulary, the 256 bytes and %s included (default 2048, least 257)" % END_OF_TEXT)
    parser.add_argument("--out", default="tokenizer.json", metavar="FILE", help="default tokenizer.json")
    parser.add_argument("--min-count", type=int, default=2, metavar="N", help="rarer pairs are not merged (default 2)")
    args = parser.parse_args()
    if args.vocab < 257:
        parser.error("--vocab %d: needs at least 257, one for each byte and one for %s" % (args.vocab, END_OF_TEXT))
    if args.vocab > 1 << 24:
        parser.error("--vocab %d: more than tokenizer.c takes (%d)" % (args.vocab, 1 << 24))
    if args.min_count < 1:
        parser.error("--min-count %d: needs at least 1" % args.min_count)
    for path in args.files:
        if not os.path.isfile(path):
            sys.exit("train_bpe.py: %s: no such file" % path)
    try:
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    except ImportError:
        sys.exit("train_bpe.py needs the library: pip install tokenizers")

    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=args.vocab, min_frequency=args.min_count, special_tokens=[END_OF_TEXT],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=sys.stderr.isatty())
    try:
        tok.train_from_iterator(lines(args.files), trainer)
    except UnicodeDecodeError as error:
        sys.exit("train_bpe.py: not UTF-8: %s" % error)
    try:
        tok.save(args.out)
    except Exception as error:                                   # the library raises a bare Exception
        sys.exit("train_bpe.py: cannot write %s: %s" % (args.out, error))
    size = tok.get_vocab_size()
    print("%s: %d ids" % (args.out, size) + ("" if size == args.vocab else "; the text has no more pairs to merge"))


if __name__ == "__main__":
    main()
