#!/usr/bin/env python3
"""Writes the Unicode tables of tokenizer.c by asking the `tokenizers` library about every code point.

The library's normalizer, its regular expressions and its punctuation test each carry a Unicode version of their own,
and none needs to be Python's, so nothing here comes from `unicodedata`. Run it when a new release of the library should
be followed:   pip install tokenizers && python3 dev/make_unicode.py tokenizer.c
The text between the two marker lines is replaced. Every fact is probed, about 20 seconds."""
import argparse
import sys

BEGIN = "// ---- tables begin (dev/make_unicode.py) ----"
END = "// ---- tables end ----"
LETTER, NUMBER, SPACE, WORD, PUNCT, UNSAFE = 1, 2, 4, 8, 16, 32
DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz+-"
S_BASE, S_COUNT = 0xAC00, 11172                                  # Hangul syllables: arithmetic, no table


def code_points():
    return (c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF)


def varint(n):
    """Five bits a character, least first; 32 is added to all but the last."""
    out = ""
    while n > 31:
        out += DIGITS[32 + (n & 31)]
        n >>= 5
    return out + DIGITS[n]


def zigzag(n):
    return varint(2 * n if n >= 0 else -2 * n - 1)


def probe_classes():
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True).pre_tokenize_str
    punct = pre_tokenizers.Punctuation("contiguous").pre_tokenize_str
    marked = Tokenizer(models.BPE())
    marked.add_tokens([AddedToken("<w>", single_word=True, normalized=False),
                       AddedToken("<l>", lstrip=True, normalized=False)])
    w_id, = marked.encode("<w>").ids
    table = [0] * 0x110000
    for c in code_points():
        s = chr(c)
        ends = [end for _, (_, end) in split("a" + s + "1")]
        if 2 in ends and 1 not in ends:
            table[c] |= LETTER
        elif 1 in ends and 2 not in ends and s != " ":
            table[c] |= NUMBER
        elif len(split("!" + s + "!")) > 1:                      # anything else joins a run of '!'
            table[c] |= SPACE
        if len(punct("a" + s)) > 1:
            table[c] |= PUNCT
        if w_id not in marked.encode(s + "<w>").ids:
            table[c] |= WORD
        stripped = marked.encode("a" + s + "<l>").offsets[-1][0] == 1
        if stripped != bool(table[c] & SPACE):
            sys.exit("U+%04X: lstrip and \\s disagree; tokenizer.c uses one class for both" % c)
    numeric = pre_tokenizers.Digits(individual_digits=False).pre_tokenize_str
    found = [c for c in range(256) if len(numeric("a" + chr(c))) > 1]
    if found != list(range(48, 58)) + [0xB2, 0xB3, 0xB9, 0xBC, 0xBD, 0xBE] or \
            any(len(numeric("a" + chr(c))) > 1 for c in range(256, 324)):
        sys.exit("the numeric characters of the byte alphabet changed: see is_numeric_byte in tokenizer.c")
    return table


def probe_normalizer(table):
    """Returns the decomposition entries and the ranges of combining order, and marks the unsafe code points."""
    from tokenizers import normalizers
    nfc, nfd = normalizers.NFC().normalize_str, normalizers.NFD().normalize_str
    full = {}                                                    # code point -> its full decomposition
    for c in code_points():
        d = nfd(chr(c))
        if d != chr(c) and not S_BASE <= c < S_BASE + S_COUNT:
            full[c] = d
    for s in range(S_COUNT):
        c = chr(S_BASE + s)
        parts = chr(0x1100 + s // 588) + chr(0x1161 + s % 588 // 28) + (chr(0x11A7 + s % 28) if s % 28 else "")
        assert nfd(c) == parts and nfc(parts) == c, hex(ord(c))

    # Combining order: the rank among the classes in use, 0 for starters. Marks of low rank move before higher ones.
    def below(a, b):
        return nfd(b + a) == a + b and a != b
    low, high = "\u0334", "\u0345"
    marks = [chr(c) for c in code_points()
             if c not in full and (below(low, chr(c)) or below(chr(c), high))]
    classes = []                                                 # one mark of each class, in order
    rank_of = {}
    for m in marks:
        lo, hi = 0, len(classes)
        while lo < hi:
            mid = (lo + hi) // 2
            if below(classes[mid], m):
                lo = mid + 1
            else:
                hi = mid
        if lo == len(classes) or below(m, classes[lo]):
            classes.insert(lo, m)
    for m in marks:
        rank_of[ord(m)] = 1 + next(i for i, k in enumerate(classes) if not below(m, k) and not below(k, m))
    assert len(classes) < 64

    # One entry per decomposable code point: first and second part, and whether the two parts compose again.
    whole = {d: c for c, d in full.items()}
    entries, seconds = [], set()
    for c, d in sorted(full.items()):
        if len(d) == 1:
            entries.append((c, 0, ord(d), 0))
            continue
        first = nfc(d[:-1])
        composes = nfc(d) == chr(c)
        if len(first) != 1:                                      # the prefix does not compose: any name for it will do
            assert not composes
            first = chr(whole[d[:-1]])
        assert not composes or nfc(first + d[-1]) == chr(c)
        entries.append((c, 1 if composes else 2, ord(first), ord(d[-1])))
        if composes:
            seconds.add(ord(d[-1]))
    seconds |= set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))

    # Safe: a starter that NFC leaves alone and that joins nothing before it. Text of safe characters is its own NFC.
    for c in code_points():
        head = ord(full[c][0]) if c in full else c
        if nfc(chr(c)) != chr(c) or head in rank_of or head in seconds or c in rank_of or c in seconds:
            table[c] |= UNSAFE
    return entries, rank_of


def literal(name, comment, text, width=112):
    lines = ["static const char %s[] =  // %s" % (name, comment)]
    for i in range(0, len(text), width):
        lines.append('  "%s"' % text[i:i + width])
    return "\n".join(lines) + ";\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="tokenizer.c: its tables are replaced in place")
    args = parser.parse_args()
    try:
        import tokenizers
    except ImportError:
        sys.exit("make_unicode.py needs the library: pip install tokenizers")
    with open(args.file, encoding="utf-8") as f:
        source = f.read()
    if source.count(BEGIN) != 1 or source.count(END) != 1:
        sys.exit("%s: the two marker lines are missing" % args.file)

    table = probe_classes()
    entries, rank_of = probe_normalizer(table)

    runs, start = "", 0
    for c in range(1, 0x110001):
        if c == 0x110000 or table[c] != table[start]:
            runs += varint(c - start) + DIGITS[table[start]]
            start = c
    orders, n_orders, at = "", 0, 0
    for c in sorted(rank_of):
        if c < at:
            continue
        end = c
        while rank_of.get(end) == rank_of[c]:
            end += 1
        orders += varint(c - at) + varint(end - c) + DIGITS[rank_of[c]]
        n_orders += 1
        at = end
    parts, c0, a0, b0 = "", 0, 0, 0
    for c, kind, a, b in entries:
        parts += varint(4 * (c - c0) + kind) + zigzag(a - a0)
        c0, a0 = c, a
        if kind:
            parts += zigzag(b - b0)
            b0 = b
    pairs = sum(1 for e in entries if e[1] == 1)
    text = "// Probed from tokenizers %s. For the notation see table_number().\n" \
        % tokenizers.__version__
    text += literal("unicode_classes", "run length, then one character of class bits; covers U+0000..U+10FFFF", runs)
    text += literal("unicode_orders", "gap, length, rank of the combining class; all others are starters", orders)
    text += "enum { N_ORDERS = %d, N_PARTS = %d, N_PAIRS = %d };\n" % (n_orders, len(entries), pairs)
    text += literal("unicode_parts", "4 * step + kind, first part, and unless kind is 0 the second part", parts)
    head, rest = source.split(BEGIN)
    with open(args.file, "w", encoding="utf-8") as f:
        f.write(head + BEGIN + "\n" + text + END + rest.split(END)[1])
    print("tokenizers %s: %d combining marks, %d decompositions of which %d compose; %d bytes of source"
          % (tokenizers.__version__, len(rank_of), len(entries), pairs, len(text)))


if __name__ == "__main__":
    main()
