#!/usr/bin/env python3
"""check_gguf_tokenizers.py: tokenizers of GGUF files, against llama.cpp and the tokenizers library, on 3,000 random strings each.

  pip install tokenizers llama-cpp-python; make; python dev/check_gguf_tokenizers.py

Llama-3's and Qwen2's ways to split go through --to-gguf and back; a SentencePiece BPE is written as llama.cpp's converter does, with
scores in the place of merges. The ids of llama.cpp, of the library and of the model.bin made from the GGUF file must be the same.
"""
import json
import os
import random
import struct
import subprocess
import sys
import tempfile

import llama_cpp
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)
import export

TEXT = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()
LETTERS = list("abcdefghijklmnopqrstuvwxyz    \n\n\t'.,!?0123456789ABC-_éüß日本語\r😀") + [
    "'s", "'LL", "'Re", "the ", " and ", "1234", "\n\n ", "ſ", "\u00a0", "٣", *(w + " " for w in TEXT.split()[:200])]
rng, folder = random.Random(1), tempfile.TemporaryDirectory()
STRINGS = ["".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 40))) for _ in range(3000)]
place = lambda name: os.path.join(folder.name, name)
mamba = lambda *args, text="": subprocess.run([os.path.join(ROOT, "mamba"), *args], check=True, capture_output=True, input=text.encode()).stdout


def model_with(blob):
    with open(place("t.bin"), "wb") as f:
        f.write(blob)
    with open(place("data"), "w") as f:
        f.write("some words to learn " * 50)
    mamba("train", "-o", place("m.bin"), "--tokenizer", place("t.bin"), "--data", place("data"), "--steps", "1", "--batch", "1",
          "--length", "8", "--d-model", "32", "--layers", "1", "--force")


def compare(name, library):
    export.gguf_to_bin(place("m.gguf"), place("back.bin"), None, None, None)
    llama = llama_cpp.Llama(place("m.gguf"), vocab_only=True, verbose=False)
    wrong = [0, 0]
    for i, text in enumerate(STRINGS):
        want = library.encode(text, add_special_tokens=False).ids
        wrong[0] += llama.tokenize(text.encode(), add_bos=False, special=False) != want
        if i < 500:
            wrong[1] += [int(word) for word in mamba("tokenize", place("back.bin"), "-", text=text).split()] != want
    print(f"{name}: llama.cpp differs from the library in {wrong[0]} of {len(STRINGS)} strings, mamba in {wrong[1]} of 500")
    return not any(wrong)


def split_by(code, ignore_merges):
    regex = next(regex for regex, other in export.REGEXES.items() if other == code)
    t = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                      show_progress=False))
    t.add_special_tokens(["<|end|>"])
    model_with(export.tokenizer_blob(json.loads(t.to_str())))
    export.to_gguf(place("m.bin"), place("m.gguf"))
    return t


def sentencepiece():
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *map("<0x%02X>".__mod__, range(256))]
    t.train_from_iterator(TEXT.split(), trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False))
    tokens = [token for token, _ in sorted(t.get_vocab().items(), key=lambda entry: entry[1])]
    # Ids follow the merges, as SentencePiece's do, so that the scores may be minus the ids.
    meta = {"model": "llama", "pre": "default", "tokens": tokens, "scores": [-float(i) for i in range(len(tokens))],
            "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259), "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    words = b"".join(struct.pack("<I", len(w)) + w for w in (b"w%d" % i for i in range(len(tokens))))
    model_with(b"mtok" + struct.pack("<15I", 2, 3, 0x1000, 9, len(tokens), 0, 0, 0xFFFFFFFF, 0, *[0] * 6) + words)
    written, value = export.gguf_metadata, export.gguf_value
    shape = lambda m: {"embedding_length": m.D, "block_count": m.n_layer, "ssm.inner_size": m.E, "ssm.state_size": m.N,
                       "ssm.conv_kernel": m.K, "ssm.time_step_rank": m.R, "vocab_size": m.V, "context_length": 1 << 20,
                       "feed_forward_length": 0, "attention.head_count": 0, export.GGUF_EPS: m.norm_eps}
    floats = lambda v: struct.pack(f"<IIQ{len(v)}f", export.GGUF_ARRAY, 6, len(v), *v)
    export.gguf_value = lambda v: floats(v) if isinstance(v, list) and isinstance(v[0], float) else value(v)
    export.gguf_metadata = lambda m, *_: ({"general.architecture": "mamba", **{"mamba." + k: v for k, v in shape(m).items()},
                                           **{"tokenizer.ggml." + k: v for k, v in meta.items()}}, [])
    export.to_gguf(place("m.bin"), place("m.gguf"))
    export.gguf_metadata, export.gguf_value = written, value
    return Tokenizer.from_str(json.dumps(export.gguf_tokenizer(export.open_gguf(place("m.gguf"))[0], "m.gguf")))


good = [compare("llama-bpe", split_by(export.GPT4, True)), compare("qwen2", split_by(export.QWEN2, False)),
        compare("SentencePiece", sentencepiece())]
sys.exit(not all(good))
