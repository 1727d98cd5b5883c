#!/usr/bin/env python3
"""Writes tests/tokenizer.cases: small tokenizers with strings, ids and decoded text as the `tokenizers` library gives them,
so that machines without Python can check tokenizer.c (test_tokenizer in test_all.c reads it).

File, little-endian: "mtcs", u32 version 1, then records until the end of the file, each starting with a u32 type:
  1 a tokenizer: u32 length, the blob; the records after it belong to it
  2 encode, 3 decode: u32 length, the text; u32 count, that many u32 ids"""
import argparse
import json
import os
import random
import struct
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "tests"))
FIXED = ["", " ", "Hello, world!", "Once upon a time there was a little girl.", "don't we'll I'd 'S ''s", "  two  spaces \n\n end  ",
         "cafe\u0301 = caf\u00e9", "a\u0327\u0301 a\u0301\u0327 \u1112\u1161\u11ab \u0958 \u2126 \ufb2a", "x\u00b2 \u00bd 1234567 3.14",
         "\u0000\u0001\t\r\n\x1c\x85\xa0\u2028\u3000", "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd",
         "<|endoftext|>a<|endoftext|><|endof text|>", "e" + "\u0301\u0316\u0334" * 12, "ab" * 60, "\u65e5\u672c\u8a9e", "!?...--"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="tokenizer.json files to include besides the made ones (default: that of "
                        "../shared/checkpoints/tales-3m-hf)",
                        default=[os.path.join(ROOT, "..", "shared", "checkpoints", "tales-3m-hf", "tokenizer.json")])
    parser.add_argument("--out", default=os.path.join(ROOT, "tests", "tokenizer.cases"), help="default tests/tokenizer.cases")
    parser.add_argument("--count", type=int, default=24, help="random strings per tokenizer (default 24)")
    parser.add_argument("--seed", type=int, default=3, help="default 3")
    args = parser.parse_args()
    from tokenizers import Tokenizer
    import test_tokenizer
    export = test_tokenizer.load_export()
    rng = random.Random(args.seed)
    sources = []
    for path in args.files:
        with open(path, encoding="utf-8") as f:
            sources.append((path, json.load(f)))
    sources += test_tokenizer.made_tokenizers(rng)
    sources += [("k-mers", test_tokenizer.kmers(export, k)) for k in (1, 3)]

    out, n_cases = [b"mtcs", struct.pack("<I", 1)], 0

    def case(kind, text, ids):
        out.append(struct.pack("<2I", kind, len(text)) + text + struct.pack("<%dI" % (1 + len(ids)), len(ids), *ids))

    for _, data in sources:
        blob = export.tokenizer_blob(data, source=b"{}" if len(out) % 2 else b"")
        library = Tokenizer.from_str(json.dumps(data))
        out.append(struct.pack("<2I", 1, len(blob)) + blob)
        specials = [entry["content"] for entry in data["added_tokens"]]
        known = sorted(library.get_vocab().values())
        for text in FIXED + [test_tokenizer.random_string(rng, specials, []) for _ in range(args.count)]:
            case(2, text.encode("utf-8"), library.encode(text, add_special_tokens=False).ids)
        for _ in range(args.count // 2):
            ids = [rng.choice(known) for _ in range(rng.randrange(12))]
            case(3, test_tokenizer.decoded(library, data, ids), ids)
        n_cases += len(FIXED) + args.count + args.count // 2
    blob = export.bytes_tokenizer_blob()
    out.append(struct.pack("<2I", 1, len(blob)) + blob)
    case(2, bytes(range(256)), list(range(256)))
    with open(args.out, "wb") as f:
        f.write(b"".join(out))
    print("%s: %d tokenizers, %d cases, %d bytes" % (args.out, len(sources) + 1, n_cases + 1, sum(map(len, out))))


if __name__ == "__main__":
    main()
