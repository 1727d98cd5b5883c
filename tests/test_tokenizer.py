#!/usr/bin/env python3
"""Compares tokenizer.c with the `tokenizers` library, id for id: encoding of random strings and
decoding of random ids.

A small C driver that includes tokenizer.c is compiled (cc, or $CC) and fed through pipes:
100,000 strings take about a minute. Needs: pip install tokenizers. Run from anywhere:
    python3 tests/test_tokenizer.py --count 2000"""
import argparse
import glob
import importlib.util
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
DRIVER = r"""
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static char message[512];
static int fail(const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(message, sizeof message, format, list);
    va_end(list);
    return -1;
}
static uint32_t u32_at(const unsigned char *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}
#define UNUSED __attribute__((unused))
#define SHARED UNUSED static
#include "files/memory.h"
#include "tokenizer.c"
static bool get(void *p, size_t n) { return fread(p, 1, n, stdin) == n; }
static void put(uint32_t n) { for (int i = 0; i < 4; i++) putchar((int)(n >> 8 * i & 255)); }
// In: length and bytes of the blob. Then requests:
//   'e' length text -> count ids, or -1 length message
//   'p' length text, length marks -> the same; bytes marked 1 are a user's, 0 a template's
//   'd' count ids   -> length text
int main(void) {
    unsigned char head[4], command, *blob, *in = NULL;
    if (!get(head, 4)) return 1;
    size_t n = u32_at(head);
    blob = malloc(n + 1);
    if (!blob || !get(blob, n)) return 1;
    (void)tokenizer_name;
    Tokenizer *t = tokenizer_open(blob, n);
    put(t ? 1 : 0);
    fflush(stdout);
    if (t && tokenizer_is_bytes(t) && tokenizer_size(t) != 256) return 1;
    if (t && (tokenizer_bos(t) >= tokenizer_size(t) || tokenizer_unknown(t) >= tokenizer_size(t)))
        return 1;
    if (!t) { put((uint32_t)strlen(message)); fputs(message, stdout); free(blob); return 0; }

    while (get(&command, 1) && get(head, 4)) {
        n = u32_at(head) * (size_t)(command == 'd' ? 4 : 1);
        free(in);
        in = malloc(n ? n : 1); // exactly n bytes: a sanitizer sees a read past the end
        if (!in || !get(in, n)) return 1;
        if (command != 'd') {
            int32_t *ids;
            size_t n_ids, n_pieces = 1;
            TextPiece *piece = malloc((n + 1) * sizeof *piece);
            if (!piece) return 1;
            piece[0] = (TextPiece){(char *)in, n, true};
            unsigned char *marks = malloc(n ? n : 1);
            if (command == 'p' && (!get(head, 4) || !get(marks, n))) return 1;
            for (size_t i = 0; command == 'p' && i < n; i++) {
                if (i == 0) n_pieces = 0;
                if (i == 0 || marks[i] != marks[i - 1])
                    piece[n_pieces++] = (TextPiece){(char *)in + i, 0, !marks[i]};
                piece[n_pieces - 1].bytes++;
            }
            int bad = tokenizer_encode(t, piece, n_pieces, &ids, &n_ids);
            free(piece);
            free(marks);
            if (bad) {
                put(UINT32_MAX); put((uint32_t)strlen(message)); fputs(message, stdout);
                fflush(stdout);
                continue;
            }
            put((uint32_t)n_ids);
            for (size_t i = 0; i < n_ids; i++) put((uint32_t)ids[i]);
            free(ids);
        } else {
            Utf8Pending pending = {.n = 0};
            size_t n_out = 0, room = 16;
            unsigned char *out = NULL;
            pending.at_start = true;
            for (int pass = 0; pass < 2; pass++) {    // first the size, then the text
                for (size_t i = 0; i < n; i += 4) {
                    size_t bytes;
                    const unsigned char *token = tokenizer_token(t, (int)u32_at(in + i), &bytes);
                    if (pass == 0) { room += 3 * (bytes + 4); continue; }
                    if ((token != NULL) != tokenizer_has(t, (int)u32_at(in + i))) return 1;
                    n_out += tokenizer_decode(t, &pending, (int)u32_at(in + i), out + n_out);
                }
                if (pass == 0 && !(out = malloc(room))) return 1;
            }
            n_out += utf8_flush(t, &pending, out + n_out);
            put((uint32_t)n_out);
            fwrite(out, 1, n_out, stdout);
            free(out);
        }
        fflush(stdout);
    }
    free(in);
    tokenizer_close(t);
    free(blob);
    return 0;
}
"""


def load_export():
    for name in ("export.py", "tok_section.py"):
        path = os.path.join(ROOT, name)
        if os.path.exists(path):
            spec = importlib.util.spec_from_file_location("export_module", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    sys.exit("export.py not found beside tests/")


def compile_driver(folder, flags):
    source, program = os.path.join(folder, "driver.c"), os.path.join(folder, "driver")
    with open(source, "w") as f:
        f.write(DRIVER)
    command = [os.environ.get("CC", "cc"), "-std=c11", "-O2", "-Wall", "-Wextra", "-I",
               ROOT] + flags + ["-o", program, source]
    subprocess.run(command, check=True)
    return program


class Driver:
    """One process of the C driver, holding one tokenizer."""

    def __init__(self, program, blob):
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.send(struct.pack("<I", len(blob)) + blob)
        if not self.number():
            message = self.read(self.number()).decode()
            self.close()
            raise ValueError(message)

    def send(self, data):
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def read(self, n):
        data = self.process.stdout.read(n)
        if len(data) != n:
            raise RuntimeError("the driver died")
        return data

    def number(self):
        return struct.unpack("<I", self.read(4))[0]

    def encode(self, data, marks=None):
        """marks: a byte for each byte of data, 1 where a user wrote it; None: as one text."""
        request = struct.pack("<I", len(data)) + data
        self.send(b"e" + request if marks is None else b"p" + request + struct.pack("<I", len(marks)) + marks)
        n = self.number()
        if n == 0xFFFFFFFF:
            return self.read(self.number()).decode()
        return list(struct.unpack("<%di" % n, self.read(4 * n)))

    def decode(self, ids):
        self.send(b"d" + struct.pack("<I", len(ids)) + struct.pack("<%dI" % len(ids), *ids))
        return self.read(self.number())

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        if self.process.wait() != 0:
            raise RuntimeError("the driver exited with %d" % self.process.returncode)


# -------------------------------------------------------------------------------------------------
# Made tokenizers: what the checkpoints at hand do not show.

def added(i, content, **flags):
    entry = {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False,
             "special": False}
    entry.update(flags)
    return entry


def made_tokenizers(rng):
    """[(name, tokenizer.json as a dict)], trained by the library on a few thousand random words."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    words = ["the", "of", "and", "naïve", "don't", "we'll", "1234567", "x²", "½", "日本語", "e\u0301",
             "straße", "12", "...",
             "--", "Ελλάδα", "привет", "한국어", "😀", "user_name", "A1b2", "\u0915\u094d\u0937",
             "3.14", "$9,999.00"]
    corpus = [" ".join(rng.choice(words) for _ in range(12)) for _ in range(400)]

    def train(pre, nfc, size=600):
        tok = Tokenizer(models.BPE())
        if nfc:
            tok.normalizer = normalizers.NFC()
        tok.pre_tokenizer = pre
        tok.decoder = decoders.ByteLevel()
        tok.train_from_iterator(corpus, trainers.BpeTrainer(
            vocab_size=size, show_progress=False, special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        return json.loads(tok.to_str())

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    falcon = pre_tokenizers.Sequence([pre_tokenizers.Punctuation("contiguous"), gpt2,
                                      pre_tokenizers.Digits(individual_digits=False),
                                      pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")])
    made = [("falcon", train(falcon, False)), ("no normalizer", train(gpt2, False)),
            ("prefix space", train(pre_tokenizers.ByteLevel(add_prefix_space=True), True))]

    odd = train(gpt2, True)
    n = len(odd["model"]["vocab"])
    texts = [("<l>", {"lstrip": True}), ("<r>", {"rstrip": True}),
             ("<lr>", {"lstrip": True, "rstrip": True}),
             ("word", {"single_word": True}), ("wo", {}),
             ("<s>", {"special": True, "single_word": True, "lstrip": True}),
             ("caf\u00e9", {"normalized": True}),
             ("r\u00e9sum\u00e9", {"normalized": True, "single_word": True}),
             ("no\u0308", {}), ("  ", {"normalized": True}),
             ("   ", {"normalized": True, "rstrip": True}), ("\u0301", {"normalized": True}),
             ("日本", {"rstrip": True}),
             ("<|endof", {}), ("text|>", {"special": True}),
             ("\n\n", {"rstrip": True, "single_word": True}), ("Ġqq", {}),
             ("\ud558", {"normalized": True}),
             ("<|im_start|>", {"special": True, "normalized": True, "lstrip": True})]
    odd["added_tokens"] += [added(n + i, text, **flags) for i, (text, flags) in enumerate(texts)]
    made.append(("odd added tokens", odd))
    plain = json.loads(json.dumps(odd))
    plain["normalizer"] = None
    made.append(("odd added tokens, no normalizer", plain))

    lacking = train(gpt2, False, 400)
    model = lacking["model"]
    for symbol in "aeĠéÂð1'":
        model["vocab"].pop(symbol)
    while True:                                          # and every merge that needs what is gone
        kept = [m for m in model["merges"]
                if all(p in model["vocab"] for p in (m[0], m[1], m[0] + m[1]))]
        made_of = {m[0] + m[1] for m in kept}
        gone = [t for t in model["vocab"] if len(t) > 1 and t not in made_of
                and t != "<|endoftext|>"]
        model["merges"] = kept
        if not gone:
            break
        for t in gone:
            model["vocab"].pop(t)
    lacking["added_tokens"] = [added(0, "<|endoftext|>", special=True)]
    model["vocab"]["a b"] = 500              # holes, and a token that is not made of byte symbols
    model["vocab"][" "] = 502
    made.append(("lacking bytes, holes", lacking))

    made += published(corpus, rng)

    spread = train(falcon, True)             # merges written the old way, one of them twice
    spread["model"]["merges"] = [" ".join(m) for m in spread["model"]["merges"]]
    spread["model"]["merges"].append(spread["model"]["merges"][0])
    made.append(("falcon with NFC, a merge twice", spread))
    return made


def published(corpus, rng):
    """The pipelines of public checkpoints and their relatives, as published, around small
    vocabularies."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, \
        processors, trainers

    def train(pre, decoder, special=("<|endoftext|>",), bytes_too=True, size=600, **options):
        tok = Tokenizer(models.BPE(unk_token=options.pop("unk_token", None)))
        tok.pre_tokenizer, tok.decoder = pre, decoder
        alphabet = pre_tokenizers.ByteLevel.alphabet() if bytes_too else []
        tok.train_from_iterator(corpus, trainers.BpeTrainer(
            vocab_size=size, show_progress=False, special_tokens=list(special),
            initial_alphabet=alphabet))
        data = json.loads(tok.to_str())
        data["model"].update(options)
        return data

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tail = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    gpt4 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)" + tail % r"\p{N}{1,3}"
    possessive = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
    qwen2 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)" + tail % r"\p{N}"

    def split(regex, behavior="isolated", invert=False):
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), behavior, invert),
                                        byte_level])

    def bos(data, token, i):
        data["post_processor"] = json.loads(processors.TemplateProcessing(
            single=token + " $A", special_tokens=[(token, i)]).__getstate__())

    made = []
    data = train(split(gpt4), decoders.ByteLevel(), ("<|begin_of_text|>", "<|eot_id|>"),
                 ignore_merges=True)
    data["model"]["vocab"][" don't we'll"] = 700                # a word that no merge can make
    data["model"]["vocab"]["ĠĠĠĠ1234"] = 701
    data["model"]["vocab"]["日本"] = 702
    bos(data, "<|begin_of_text|>", 0)
    data["post_processor"] = {"type": "Sequence", "processors": [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        data["post_processor"]]}
    data["truncation"] = {"direction": "Right", "max_length": 1 << 20, "strategy": "LongestFirst",
                          "stride": 0}
    made.append(("Llama 3", data))
    data = train(split(qwen2), decoders.ByteLevel(), ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    data["normalizer"] = {"type": "NFC"}
    data["model"].update(continuing_subword_prefix="", end_of_word_suffix="")
    made.append(("Qwen2", data))
    made.append(("GPT-4, cl100k", train(split(gpt4, "removed", True), decoders.ByteLevel())))
    made.append(("GPT-4, converted", train(split(possessive), decoders.ByteLevel())))
    for each in (True, False):
        made.append(("Digits, %s" % each, train(pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=each),
            pre_tokenizers.ByteLevel(add_prefix_space=False)]), decoders.ByteLevel())))
    made.append(("no regex", train(byte_level, decoders.ByteLevel())))
    data = train(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    data["pre_tokenizer"].update(use_regex=False, add_prefix_space=True)
    data["model"].update(dropout=0.0, unk_token="<|endoftext|>")
    data["normalizer"] = {"type": "Sequence", "normalizers": []}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [data["pre_tokenizer"]]}
    data["decoder"] = {"type": "Sequence", "decoders": [data["decoder"]]}
    made.append(("no regex, prefix space, harmless settings", data))

    # Llama 2 and Mistral (fla-hub), in the older and the newer spelling
    underscore = "\u2581"
    specials, byte_tokens = ["<unk>", "<s>", "</s>"], ["<0x%02X>" % b for b in range(256)]
    llama_decoder = decoders.Sequence([decoders.Replace(underscore, " "), decoders.ByteFallback(),
                                       decoders.Fuse(), decoders.Strip(" ", 1, 0)])

    def sentencepiece(across=False, keep=lambda b: True, **options):
        data = train(pre_tokenizers.Metaspace(split=not across), llama_decoder,
                     specials + [t for b, t in enumerate(byte_tokens) if keep(b)], False, 900,
                     unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        data["added_tokens"] = data["added_tokens"][:3]
        data["pre_tokenizer"] = None
        data["normalizer"] = {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": underscore},
            {"type": "Replace", "pattern": {"String": " "}, "content": underscore}]}
        data["model"].update(options)
        bos(data, "<s>", 1)
        return data

    made.append(("Llama 2, Prepend and Replace", sentencepiece()))
    data = sentencepiece()
    for entry in data["added_tokens"]:
        entry.update(normalized=True)
    made.append(("Llama 2, normalized specials", data))
    data = sentencepiece()
    n = len(data["model"]["vocab"])
    texts = [("<l>", {"lstrip": True}), ("<r>", {"rstrip": True, "normalized": True}),
             ("wo", {"normalized": True, "single_word": True}), ("  ", {"normalized": True}),
             ("<|x", {}), ("y|>", {"special": True}), ("\u2581\u2581\u2581q", {}),
             ("<lr>", {"lstrip": True, "rstrip": True, "normalized": True}), ("cafe\u0301", {})]
    data["added_tokens"] += [added(n + i, text, **flags) for i, (text, flags) in enumerate(texts)]
    made.append(("Llama 2, odd added tokens", data))
    for scheme in ("first", "always", "never"):
        data = sentencepiece()
        data["normalizer"] = None
        data["pre_tokenizer"] = {"type": "Metaspace", "replacement": underscore,
                                 "prepend_scheme": scheme, "split": False}
        if scheme == "first":
            data["added_tokens"] += [added(n + i, *text) for i, text in enumerate(
                [("  ",), ("<x>",), ("q\u2581",)])]
            data["added_tokens"][-1].update(normalized=True, lstrip=True)
        made.append(("Llama 2, Metaspace %s" % scheme, data))
    data = sentencepiece()
    data["normalizer"] = data["normalizer"]["normalizers"][1]
    data["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "},
                             "behavior": "MergedWithPrevious", "invert": False}
    data["decoder"] = json.loads(decoders.Sequence(
        [decoders.Replace(underscore, " "), decoders.ByteFallback(), decoders.Fuse()]).__getstate__())
    made.append(("Gemma", data))
    made.append(("Llama 2, merges across spaces", sentencepiece(across=True)))
    data = sentencepiece(ignore_merges=True)
    data["model"]["vocab"][underscore + "the"+ underscore + "of"] = 2000
    made.append(("Llama 2, ignore_merges", data))
    for fuse in (True, False):
        made.append(("Llama 2, some bytes, fuse_unk %s" % fuse, sentencepiece(
            keep=lambda b: b % 3 or b < 64, fuse_unk=fuse)))
    data = train(pre_tokenizers.Metaspace(), decoders.Metaspace(), specials, False, 400,
                 unk_token="<unk>", fuse_unk=True)
    made.append(("Metaspace twice, no bytes", data))
    data = train(pre_tokenizers.Whitespace(), None, specials, False, 400, unk_token="<unk>")
    data["decoder"] = None
    made.append(("characters, Whitespace, no decoder", data))
    data = train(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), specials,
                 False, 300, unk_token="<unk>", fuse_unk=True)
    made.append(("bytes with unknown ones", data))

    # words
    words = sorted({word for line in corpus for word in line.split()})
    for name, pre, decoder in (
            ("words, WhitespaceSplit", {"type": "WhitespaceSplit"}, None),
            ("words, Whitespace", {"type": "Whitespace"}, {"type": "Fuse"}),
            ("bases", {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated",
                       "invert": False}, {"type": "Fuse"})):
        vocab = {word: i for i, word in enumerate(["<unk>", "<cls>"] + list("ATCGN") + words)}
        data = {"version": "1.0", "truncation": None, "padding": None,
                "added_tokens": [added(1, "<cls>", special=True), added(0, "<unk>", special=True),
                                 added(len(vocab), "<x>"), added(9000, "<x>", lstrip=True)],
                "normalizer": None, "pre_tokenizer": pre, "post_processor": None,
                "decoder": decoder, "model": {"type": "WordLevel", "vocab": vocab,
                                              "unk_token": "<unk>"}}
        bos(data, "<cls>", 1)
        made.append((name, data))
    return made


def kmers(export, k):
    """The vocab.txt of plant-dnamamba, read as a tokenizer.json."""
    import itertools
    tokens = ["<unk>", "<pad>", "<mask>", "<cls>"]
    tokens += ["".join(word) for word in itertools.product("ATCG", repeat=k)] if k > 1 else []
    tokens += list("ATCGN") + ["<eos>", "<bos>"]
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "vocab.txt"), "w") as f:
            f.write("\n".join(tokens) + "\n")
        with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
            json.dump({"tokenizer_class": "EsmTokenizer", "cls_token": "<cls>"}, f)
        return export.vocab_txt_table(os.path.join(folder, "vocab.txt"), [])


# -------------------------------------------------------------------------------------------------
# Random strings.

MARKS = [0x300, 0x301, 0x308, 0x316, 0x323, 0x327, 0x334, 0x338, 0x345, 0x30A, 0x302, 0x303, 0x304,
         0x306, 0x31B, 0x5B0, 0x5B9,
         0x64B, 0x651, 0x93C, 0x94D, 0xE38, 0xF71, 0xF72, 0x1DC0, 0x20D0, 0x302A, 0x3099, 0x309A,
         0x1D165, 0x1D16E, 0x9BE, 0x9D7]
BASES = ("aeoucCAEOsSnzdtlkµßøïÅĘǖḍ̇ＡカハうǼﬁ각한가ᄒ"
         "\u1161\u11ab\u1112\u0958\u09c7\u0b47\u1025\u2260\u212b\u2126"
         "\uf900\U0001d15e\ufb2a\u0344\u0340")
SPACES = (" \t\n\r\v\f\x1c\x1d\x85\xa0"
          "\u1680\u180e\u2000\u2003\u2009\u200a\u200b\u2028\u2029\u202f\u205f\u3000\ufeff")
EMOJI = ["👩\u200d👩\u200d👧\u200d👦", "👍🏽", "🇫🇷", "❤\ufe0f", "1\ufe0f\u20e3", "😀",
         "🏴\U000e0067\U000e0062\U000e007f", "\u200d"]
PIECES = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "''", " '", "'", "’s", " the",
          "The", "don't", "x²", "½", "¹²³4567", "Ⅻ",
          "1234567890", "3.14", "...", "!?", "--", "user_name", "word", " word ", "résumé",
          "re\u0301sume\u0301", "café", "cafe\u0301",
          "wo", "<", "|", ">", "日本語", "한국어", "\u1112\u1161\u11ab", "नमस्ते", "العربية", "עברית",
          "ไทย", "ß", "Ǆ", "\u0000", "\x7f", "\x1b[0m",
          "٣٤٥", "๑๒๓", "ⅷ", "㉈", "𝟘𝟙", "௧", "_", "__init__", "http://a.b/c?d=1", "\r\n", "    ",
          "\t\t", "\n\n\n", "a" * 70, "1" * 100, "!" * 90, "'\u017f", "'\u017ft", "'Re", "'lL",
          "\u2581", "\u2581the", " \u2581 ", "<0x41>", "<0xE2>", "<s>", "</s>", "<unk>", "ATCGNN",
          "ATTACAGATTACA", "\r\n\r\n  ", " \n \n", "\t\n x", "\U00011de3", "\U00016ff5",
          "!\n\n", " ?\r\n", "\u0488a", "\u2029\n"]


def code_point(rng):
    while True:
        roll = rng.random()
        if roll < 0.45:
            c = rng.randrange(0x3000)
        elif roll < 0.75:
            c = rng.randrange(0x10000)
        elif roll < 0.95:
            c = rng.choice([0x10000, 0x11000, 0x16000, 0x1B000, 0x1D000, 0x1E000, 0x1F000, 0x20000,
                            0x2F800, 0x30000, 0xE0000]) \
                + rng.randrange(0x1000)
        else:
            c = rng.randrange(0x110000)
        if not 0xD800 <= c <= 0xDFFF:
            return chr(c)


def random_string(rng, specials, texts):
    kind = rng.randrange(10)
    if rng.random() < 0.001:                             # long: the cache of words, the heap
        return "".join(random_string(rng, specials, texts) for _ in range(400))
    if kind == 0:
        return "".join(chr(rng.randrange(128)) for _ in range(rng.randrange(60)))
    if kind == 1:
        return "".join(code_point(rng) for _ in range(rng.randrange(24)))
    if kind == 2:
        return "".join(rng.choice(BASES)
                       + "".join(chr(rng.choice(MARKS))
                                 for _ in range(rng.choice([0, 1, 2, 3, 5, 40])))
                       for _ in range(rng.randrange(8)))
    if kind == 3 and texts:
        text = rng.choice(texts)
        at = rng.randrange(max(1, len(text) - 400))
        return text[at:at + rng.randrange(1, 400)]
    out = []
    for _ in range(rng.randrange(14)):
        roll = rng.randrange(9)
        if roll < 3:
            out.append(rng.choice(PIECES))
        elif roll == 3 and specials:
            out.append(rng.choice(specials))
        elif roll == 4:
            out.append(" " * rng.choice([1, 1, 2, 3, 5, 8, 23, 24, 25, 49]))
        elif roll == 5:
            out.append(rng.choice(SPACES) * rng.randrange(1, 4))
        elif roll == 6:
            out.append(rng.choice(EMOJI))
        elif roll == 7:
            out.append(code_point(rng) + (chr(rng.choice(MARKS)) if rng.random() < 0.4 else ""))
        else:
            out.append("".join(rng.choice("abcdefghij 0123'.,") for _ in range(rng.randrange(12))))
    return "".join(out)


class Counter:
    def __init__(self):
        self.passed = self.failed = self.skipped = 0

    def check(self, same, what, *details):
        if same:
            self.passed += 1
            return
        self.failed += 1
        if self.failed <= 20:
            print("FAIL %s" % what)
            for line in details:
                print("     %s" % line)


def is_utf8(data):
    try:
        return data.decode("utf-8") is not None
    except UnicodeDecodeError:
        return False


def decoded(library, data, ids):
    """The library's text of ids. In a run of <0xNN> that is not UTF-8 as a whole, tokenizer.c keeps
    the characters that are (see its section 7): there, the run is cut, and the library decodes
    each part after a letter, which keeps a part from being the start of a text."""
    byte_of = {i: int(token[3:5], 16) for token, i in data["model"]["vocab"].items()
               if len(token) == 6 and token.startswith("<0x") and "Fallback" in str(data["decoder"])}
    parts, i = [[]], 0
    while i < len(ids):
        end = i
        while end < len(ids) and ids[end] in byte_of:
            end += 1
        run = bytes(byte_of[k] for k in ids[i:end])
        if not run or is_utf8(run):
            parts[-1] += ids[i:max(end, i + 1)]
            i = max(end, i + 1)
            continue
        at = 0
        while at < len(run):
            n = next((n for n in (4, 3, 2, 1) if at + n <= len(run) and is_utf8(run[at:at + n])
                      and len(run[at:at + n].decode()) == 1), 1)
            parts.append(ids[i + at:i + at + n])
            at += n
        parts.append([])
        i = end
    text = lambda part: library.decode(part, skip_special_tokens=False)
    letter = next((i for t, i in data["model"]["vocab"].items() if t == "e"), None)
    known = set(library.get_vocab(with_added_tokens=True).values())
    out, started = "", False
    for part in parts:
        out += text([letter] + part)[1:] if started else text(part)
        started = started or any(i in known for i in part)
    return out.encode("utf-8")


def compare_pieces(name, data, library, strings, rng, driver, count):
    """Text in pieces, some of which a user wrote: special tokens are found in the others only, and
    all else is as in one text."""
    from tokenizers import Tokenizer
    library.encode_special_tokens = True                 # all of it a user's
    for text in strings:
        raw = text.encode("utf-8")
        got = driver.encode(raw, b"\1" * len(raw))
        count.check(got == library.encode(text, add_special_tokens=False).ids,
                    "%s: a user's %s" % (name, ascii(text)))
    library.encode_special_tokens = False
    # A tokenizer whose special tokens have names that no text holds, but for the template's.
    specials = {entry["content"]: "\ue000%d\ue001" % i
                for i, entry in enumerate(data["added_tokens"])}
    other = json.loads(json.dumps(data))
    if not all(entry["special"] for entry in other["added_tokens"]) or not specials:
        return
    hides = not any(entry["normalized"] for entry in other["added_tokens"])
    for entry in other["added_tokens"]:
        entry["content"] = specials[entry["content"]]
    other["model"]["vocab"] = {specials.get(t, t): i for t, i in data["model"]["vocab"].items()}
    if "unk_token" in other["model"]:
        other["model"]["unk_token"] = specials.get(data["model"]["unk_token"],
                                                   data["model"]["unk_token"])
    other["post_processor"] = None
    renamed = Tokenizer.from_str(json.dumps(other))
    for k in range(len(strings)):
        text, hidden, marks, users = "", "", b"", []
        for user in rng.choice(([0, 1, 0], [1, 0, 1, 0], [0, 0, 1], [1, 1, 0, 1])):
            piece = rng.choice(strings)[:60]
            if not user:                                 # a template: plain words and specials
                piece = "".join(rng.choice(["user", "\n", " ", "e", "a b"] + list(specials))
                                for _ in range(rng.randrange(1, 5)))
            text, marks = text + piece, marks + bytes([user]) * len(piece.encode("utf-8"))
            users += [piece] if user else []
            if not user:
                for old, new in specials.items():
                    piece = piece.replace(old, new)
            hidden += piece
        if not hides:                                    # found with the space before it only
            if any(special in user for user in users for special in specials):
                continue
            hidden = text
        got = driver.encode(text.encode("utf-8"), marks)
        count.check(got == (renamed if hides else library).encode(hidden, add_special_tokens=False).ids,
                    "%s: pieces %s" % (name, ascii(text)), "marks %s" % marks.hex())


def compare(name, data, args, rng, texts, program, export, count):
    """Encodes and decodes with both; `data` is a parsed tokenizer.json."""
    from tokenizers import Tokenizer
    library = Tokenizer.from_str(json.dumps(data))
    blob = export.tokenizer_blob(data)
    back = export.tokenizer_json(blob)
    round_trip = Tokenizer.from_str(json.dumps(back))
    count.check(export.tokenizer_blob(back) == blob, "%s: blob -> tokenizer.json -> blob" % name)
    source = json.dumps(data, indent=1).encode("utf-8")
    longer = export.tokenizer_blob(data, source=source)
    count.check(export.tokenizer_source(longer) == source and export.tokenizer_source(blob) is None
                and export.tokenizer_json(longer) == back, "%s: the file itself is kept" % name)
    driver = Driver(program, rng.choice([blob, longer]))
    specials = [t["content"] for t in data["added_tokens"]]
    known = sorted(i for i in library.get_vocab().values())
    before = count.failed
    done = 0
    while done < args.count:
        strings = [random_string(rng, specials, texts) for _ in range(min(1000, args.count - done))]
        done += len(strings)
        wanted = [e.ids for e in library.encode_batch(strings, add_special_tokens=False)]
        again = [e.ids for e in round_trip.encode_batch(strings, add_special_tokens=False)] \
            if done <= 5000 else wanted
        for text, ids, other in zip(strings, wanted, again):
            got = driver.encode(text.encode("utf-8"))
            count.check(got == ids, "%s: encode %s" % (name, ascii(text)), "library %s" % ids,
                        "ours    %s" % got)
            if other != ids:
                count.check(False, "%s: tokenizer_json encodes %s differently"
                            % (name, ascii(text)))
        for k in range(len(strings) // 4):
            ids = list(wanted[k])
            if k % 2:            # any ids: characters are cut, single bytes stand among them
                ids = [rng.choice(known[:400] if rng.random() < 0.7 else known)
                       for _ in range(rng.randrange(40))]
            elif ids:
                ids = ids[rng.randrange(len(ids)):][:rng.randrange(1, 20)]
            if rng.random() < 0.1:
                ids.insert(0, max(known) + 1 + rng.randrange(1000))
            text = decoded(library, data, ids)
            got = driver.decode(ids)
            count.check(got == text, "%s: decode %s" % (name, ids), "library %s" % ascii(text),
                        "ours    %s" % ascii(got))
            if round_trip.decode(ids, skip_special_tokens=False) != \
                    library.decode(ids, skip_special_tokens=False):
                count.check(False, "%s: tokenizer_json decodes %s differently" % (name, ids))
        if done <= 5000:
            compare_pieces(name, data, library, strings[:300], rng, driver, count)
    bos = struct.unpack_from("<i", blob, 32)[0] if blob[4] == 2 else -1
    count.check(bos == library_bos(library) == library_bos(round_trip),
                "%s: the token before a text is %d" % (name, bos))
    driver.close()
    print("%-45s %6d strings, %d ids, %d failures"
          % (name, args.count, len(known), count.failed - before))


def library_bos(library):
    with_bos, without = library.encode("e").ids, library.encode("e", add_special_tokens=False).ids
    return -1 if with_bos == without else with_bos[0]


def check_command(command, name, data, rng, texts, export, count):
    """One text through `COMMAND tokenize FILE TEXTFILE`, which prints an id a line, and back."""
    from tokenizers import Tokenizer
    library = Tokenizer.from_str(json.dumps(data))
    text = "".join(random_string(rng, [t["content"] for t in data["added_tokens"]], texts)
                   for _ in range(2000))
    ids = library.encode(text, add_special_tokens=False).ids
    with tempfile.TemporaryDirectory() as folder:
        blob_path, text_path, ids_path = (os.path.join(folder, f)
                                          for f in ("tokenizer.bin", "text.txt", "ids.txt"))
        for path, content in ((blob_path, export.tokenizer_blob(data)),
                              (text_path, text.encode("utf-8")),
                              (ids_path, "".join("%d\n" % i for i in ids).encode())):
            with open(path, "wb") as f:
                f.write(content)
        run = subprocess.run([command, "tokenize", blob_path, text_path], stdout=subprocess.PIPE)
        count.check(run.returncode == 0 and run.stdout.split() == [b"%d" % i for i in ids],
                    "%s: %s tokenize" % (name, command))
        run = subprocess.run([command, "tokenize", blob_path, ids_path, "--decode"],
                             stdout=subprocess.PIPE)
        wanted = library.decode(ids, skip_special_tokens=False).encode("utf-8")
        count.check(run.returncode == 0 and run.stdout.rstrip(b"\n") == wanted.rstrip(b"\n"),
                    "%s: %s tokenize --decode" % (name, command))


def check_errors(program, export, count):
    """Text that is not UTF-8: the offset is named. Lossy decoding of short strings. Refusals."""
    import itertools
    vocab = {export.SYMBOL_OF[b]: b for b in range(256)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    base = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": False,
                      "vocab": vocab, "merges": []}}
    driver = Driver(program, export.tokenizer_blob(base))
    edges = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0,
             0xE1, 0xED, 0xEF, 0xF0, 0xF1,
             0xF4, 0xF5, 0xFF]
    wrong_decode = wrong_check = 0
    for n in (1, 2, 3, 4):
        for data in itertools.product(edges, repeat=n) if n < 4 else \
                itertools.product([0x41, 0x80, 0x8F, 0x90, 0xBF, 0xE0, 0xED, 0xF0, 0xF4], repeat=4):
            data = bytes(data)
            wrong_decode += driver.decode(list(data)) != data.decode("utf-8",
                                                                     "replace").encode("utf-8")
            try:
                data.decode("utf-8")
                good = len(data)
            except UnicodeDecodeError as error:
                good = error.start
            got = driver.encode(data)
            wrong_check += (got != list(data)) if good == n else ("byte %d " % good) not in got
    count.check(wrong_decode == 0, "lossy decoding of short byte strings: %d differ" % wrong_decode)
    count.check(wrong_check == 0, "UTF-8 check of short byte strings: %d differ" % wrong_check)
    driver.close()
    driver = Driver(program, export.bytes_tokenizer_blob())
    data = bytes(range(256)) + b"\xff\x00"
    count.check(driver.encode(data) == list(data), "the bytes tokenizer encodes anything")
    driver.close()

    def refused(part, **change):
        data = json.loads(json.dumps(base))
        for path, value in change.items():
            table = data
            *front, last = path.split("__")
            for key in front:
                table = table[key]
            table[last] = value
        try:
            export.tokenizer_blob(data)
            count.check(False, "accepted: %s" % change)
        except export.ExportError as error:
            count.check(str(error).startswith("tokenizer: " + part), "refusal of %s names %s"
                        % (part, error))

    refused("model.dropout", model__dropout=0.1)
    refused("model.unk_token", model__unk_token="no", model__vocab={"a": 0})
    refused("model.unk_token", model__unk_token=5)
    refused("model.continuing_subword_prefix", model__continuing_subword_prefix="##")
    refused("model.end_of_word_suffix", model__end_of_word_suffix="</w>")
    refused("model.byte_fallback", model__byte_fallback=True, model__vocab={"a": 0})
    refused("model.ignore_merges", model__ignore_merges=1)
    refused('model.type is "WordPiece"', model__type="WordPiece")
    refused('model.type is "Unigram"', model__type="Unigram")
    refused("model.type", model=None)
    refused("decoder", model__byte_fallback=True, pre_tokenizer=None, decoder=None)
    refused("model.new_option", model__new_option=1)
    refused("model.vocab", model__vocab={"a": 0, "b": 0})
    refused("model.vocab", model__vocab={"a": -1})
    refused("model.merges[0]", model__merges=["a zz"])
    refused("model.merges[0]", model__merges=["a b c"])
    refused("version", version="2.0")
    refused("tokenizer.json.extra", extra=1)
    refused("normalizer", normalizer={"type": "NFKC"})
    refused("normalizer", normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}]})
    refused("normalizer", normalizer={"type": "Prepend", "prepend": "\u2581"})
    refused("normalizer replaces", decoder={"type": "ByteLevel", "add_prefix_space": True},
            normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"})
    refused("pre_tokenizer.use_regex", pre_tokenizer__use_regex=1)
    refused("pre_tokenizer", pre_tokenizer={"type": "Whitespace"})
    refused("decoder", pre_tokenizer={"type": "Metaspace", "replacement": "\u2581"},
            decoder=None)
    refused("pre_tokenizer", pre_tokenizer=None)
    refused("pre_tokenizer.pretokenizers[1]",
            pre_tokenizer={"type": "Sequence", "pretokenizers": [byte_level, byte_level]})
    refused("pre_tokenizer.pattern",
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated",
                           "invert": False})
    refused("pre_tokenizer.pattern",
            pre_tokenizer={"type": "Split", "pattern": {"Regex": {"String": "x"}},
                           "behavior": "Isolated", "invert": False})
    refused("pre_tokenizer.behavior",
            pre_tokenizer={"type": "Split", "pattern": {"String": ""}, "behavior": "Removed",
                           "invert": False})
    one, text = {"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    for part, single, tokens in (
            ("special_tokens", [one, text], {}), ("special_tokens", [one, text], {"a": 5}),
            ("special_tokens", [one, text], {"a": {"ids": [1, 2]}}),
            ("single", [text, one], {"a": {"ids": [1]}}), ("single", [one, one, text], {}),
            ("single", [one], {}), ("single", [{}], {}), ("single", None, {}),
            ("single", [{"Sequence": 5}], {}), ("single", [{"Sequence": {"id": "B"}}], {})):
        refused("post_processor." + part,
                post_processor={"type": "TemplateProcessing", "special_tokens": tokens, "pair": [],
                                "single": single})
    refused("post_processor puts id 999",
            post_processor={"type": "TemplateProcessing", "special_tokens": {"a": {"ids": [999]}},
                            "pair": [], "single": [one, text]})
    for name in ("BertProcessing", "RobertaProcessing"):
        refused('post_processor is "%s"' % name, post_processor={"type": name})
    refused("decoder", decoder=None)
    refused("pre_tokenizer", pre_tokenizer=None, decoder={"type": "ByteLevel"})
    refused("decoder", decoder={"type": "Metaspace"})
    refused("decoder", pre_tokenizer=None, decoder={"type": "WordPiece"})
    refused("decoder", pre_tokenizer=None, decoder={"type": "Metaspace", "replacement": "\u2581"})
    refused("decoder", decoder={"type": "BPEDecoder"}, pre_tokenizer=None)
    refused("added_tokens[0].id", added_tokens=[added(300, "<x>")])
    refused("added_tokens[1]", added_tokens=[added(256, "<x>"), added(256, "<y>")])
    refused("added_tokens[0].content", normalizer={"type": "NFC"},
            added_tokens=[added(256, "<e\u0301>", normalized=True)])
    refused("added_tokens[0].content", added_tokens=[added(256, "")])


ODD_VALUES = [None, True, False, 0, 1, -1, 0.5, 1 << 40, "", "a", " ", "\u2581", "\ud800", "Sequence",
              "ByteLevel", "Metaspace", [], {}, [[]], [None], {"type": "Sequence"}, {"type": 5},
              {"String": " "}, {"Regex": ""}, ["a", "b"]]


def damaged(data, rng):
    """A copy of a tokenizer.json with one thing changed, removed, doubled or exchanged."""
    data = json.loads(json.dumps(data))
    places = []

    def walk(node, depth):
        items = list(node.items() if isinstance(node, dict) else enumerate(node))
        if len(items) > 12:                              # the vocabulary, the merges
            items = rng.sample(items, 12)
        for key, child in items:
            places.append((depth, node, key))
            if isinstance(child, (dict, list)):
                walk(child, depth + 1)

    walk(data, 0)
    _, node, key = rng.choice(places)
    roll = rng.randrange(6)
    if roll == 0:
        del node[key]
    elif roll == 1 and isinstance(node, list):
        node.append(node[key])
    elif roll == 2:
        _, other, where = rng.choice(places)
        node[key] = json.loads(json.dumps(other[where]))
    elif roll == 3 and isinstance(node, dict):
        node[rng.choice(["type", "id", "extra", "content"])] = node.pop(key)
    else:
        node[key] = rng.choice(ODD_VALUES)
    return data


def check_damaged(made, times, rng, program, export, count):
    """Each damaged tokenizer.json gets a sentence, or a blob that tokenizer.c opens."""
    refused = opened = 0
    for _ in range(times):
        name, data = rng.choice(made)
        data = damaged(data, rng)
        what = "a damaged %s: " % name
        try:
            blob = export.tokenizer_blob(data)
        except export.ExportError as error:
            refused += 1
            count.check(len(str(error)) > 20 and "\n" not in str(error), what + str(error))
            continue
        except Exception as error:
            count.check(False, what + repr(error), json.dumps(data)[:300])
            continue
        opened += 1
        try:
            export.tokenizer_json(blob)
            Driver(program, blob).close()
            count.check(True, what)
        except (ValueError, RuntimeError, export.ExportError) as error:
            count.check(False, what + str(error))
    print("%d damaged tokenizer.json: %d refused, %d opened" % (times, refused, opened))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.path.join(ROOT, "..", "shared")
    defaults = [os.path.join(shared, "data", "tokenizer", "gpt-neox-20b.json"),
                os.path.join(shared, "checkpoints", "tales-3m-hf", "tokenizer.json")]
    parser.add_argument("files", nargs="*", default=defaults,
                        help="tokenizer.json files (default: those of ../shared)")
    parser.add_argument("--count", type=int, default=100000,
                        help="random strings per tokenizer.json (default 100000)")
    parser.add_argument("--made-count", type=int, default=1000,
                        help="and per made tokenizer (default 1000)")
    parser.add_argument("--damaged", type=int, default=1000,
                        help="damaged tokenizer.json files (default 1000)")
    parser.add_argument("--seed", type=int, default=1, help="default 1")
    parser.add_argument("--only", metavar="REGEX", default="",
                        help="only the made tokenizers in whose name this is found")
    parser.add_argument("--command", metavar="MAMBA",
                        help="also check this program's `tokenize` command, such as ./mamba")
    parser.add_argument("--cflags", default="",
                        help="more flags for the C compiler, such as -fsanitize=address,undefined")
    args = parser.parse_args()
    count = Counter()
    try:
        import tokenizers
    except ImportError:
        print("skipped: the tokenizers library is not installed (pip install tokenizers)")
        print("0 passed, 0 failed, 1 skipped")
        return 0
    print("tokenizers %s, seed %d" % (tokenizers.__version__, args.seed))
    export = load_export()
    rng = random.Random(args.seed)
    texts = []
    for path in glob.glob(os.path.join(ROOT, "*.md")) + glob.glob(os.path.join(ROOT, "*.[ch]")):
        with open(path, encoding="utf-8") as f:
            texts.append(f.read())
    with tempfile.TemporaryDirectory() as folder:
        program = compile_driver(folder, args.cflags.split())
        check_errors(program, export, count)
        for path in () if args.only else args.files:
            if not os.path.exists(path):
                print("skipped: no %s" % path)
                count.skipped += 1
                continue
            with open(path, encoding="utf-8") as f:
                data = json.load(f)
            name = "/".join(os.path.abspath(path).split(os.sep)[-2:])
            compare(name, data, args, rng, texts, program, export, count)
            if args.command:
                check_command(args.command, name, data, rng, texts, export, count)
        args.count = args.made_count
        made = made_tokenizers(rng) + [("plant-dnamamba, %d-mers" % k, kmers(export, k))
                                       for k in (1, 3, 6)]
        if not args.only:
            # A generator of its own: the same damage whatever the texts are.
            check_damaged(made, args.damaged, random.Random(args.seed), program, export, count)
        for name, data in made:
            if not re.search(args.only, name):
                continue
            compare("made: " + name, data, args, rng, texts, program, export, count)
    print("%d passed, %d failed, %d skipped" % (count.passed, count.failed, count.skipped))
    return 1 if count.failed else 0


if __name__ == "__main__":
    sys.exit(main())
