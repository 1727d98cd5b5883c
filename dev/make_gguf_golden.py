#!/usr/bin/env python3
"""make_gguf_golden.py: what llama.cpp computes from the files of export.py --to-gguf, for
tests/test_checkpoints.py.

  python dev/make_gguf_golden.py tests/gguf.npz

Needs: make, pip install llama-cpp-python (0.3.36 made the committed file; it compiles llama.cpp.
On a virtual machine CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=OFF" avoids instructions that the
machine does not have).

CASE/crc is the CRC-32 of the GGUF file, CASE/ids the tokens, CASE/logits what llama.cpp made of
them. TEXT/i and IDS/i are texts and their ids by llama.cpp with the tokenizer of tales.bin.
K is a model that llama.cpp has quantised; its weights and logits are compared here only, since the
files are large.
"""
import os
import subprocess
import sys
import tempfile
import zlib

import numpy as np
from llama_cpp import Llama, llama_model_quantize, llama_model_quantize_default_params

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, os.path.join(ROOT, "tests"))
import test_export
from test_export import Sizes, hf_config, safetensors, weights, write

TEXTS = ["Once upon a time there was a little girl.", "It's 1999, isn't it?  Yes!\n\n  No...",
         "naïve café 漢字 🙂 x=y+z;", " leading and trailing ", "tabs\tand\r\nlines"]


def run(*arguments):
    subprocess.run(arguments, check=True, capture_output=True)


def export(*arguments):
    run(sys.executable, os.path.join(ROOT, "export.py"), *arguments)


def llama_logits(path, ids):
    net = Llama(path, n_ctx=256, n_batch=256, logits_all=True, n_threads=1, verbose=False)
    net.eval([int(i) for i in ids])
    return np.array(net.scores[:len(ids)], "<f4")


def mamba_logits(path, ids, folder):
    out = os.path.join(folder, "logits")
    run(os.path.join(ROOT, "mamba"), "logits", path, "--tokens", ",".join(map(str, ids)), "--all",
        "-o", out)
    return np.fromfile(out, "<f4").reshape(len(ids), -1)


def difference(name, got, want):
    print(f"{name}: logits differ by {np.abs(got - want).max():.1e} of {np.abs(want).max():.1f}")


def main(target):
    arrays, rng = {}, np.random.Generator(np.random.PCG64(5))
    with tempfile.TemporaryDirectory() as folder:
        gguf, back = os.path.join(folder, "m.gguf"), os.path.join(folder, "back.bin")
        quantised = {}
        for kind in ("q8", "q4"):
            quantised[f"plain {kind}"] = os.path.join(folder, kind + ".bin")
            run(os.path.join(ROOT, "mamba"), "quantize", os.path.join(ROOT, "tests/plain.bin"),
                quantised[f"plain {kind}"], kind)
        for name, path in {"plain": "tests/plain.bin", "falcon": "tests/falcon.bin",
                           "tales": "models/tales.bin", **quantised}.items():
            path = os.path.join(ROOT, path)
            export("--to-gguf", path, gguf)
            export(gguf, back)
            ids = rng.integers(0, 256, 12)
            arrays[f"{name}/crc"] = np.array(zlib.crc32(open(gguf, "rb").read()), "<u4")
            arrays[f"{name}/ids"], arrays[f"{name}/logits"] = ids, llama_logits(gguf, ids)
            for label, file in (("", path), (", there and back", back)):
                difference(name + label, mamba_logits(file, ids, folder), arrays[f"{name}/logits"])
        export("--to-gguf", os.path.join(ROOT, "models/tales.bin"), gguf)
        net = Llama(gguf, vocab_only=True, verbose=False)
        for i, text in enumerate(TEXTS):
            arrays[f"TEXT/{i}"] = np.frombuffer(text.encode(), "u1")
            arrays[f"IDS/{i}"] = np.array(net.tokenize(text.encode(), add_bos=False), "<i4")
        k_quants(folder, gguf, back, rng)
    np.savez_compressed(target, **arrays)


def k_quants(folder, gguf, back, rng):
    s, source = Sizes(D=256, E=512, N=16, K=4, R=16, V=512), os.path.join(folder, "src")
    scaled = {name: a * (0.05 if a.ndim == 2 and "A_log" not in name else 1)
              for name, a in weights(s).items()}
    write(os.path.join(source, "config.json"), hf_config(s))
    write(os.path.join(source, "model.safetensors"), safetensors(scaled))
    export(source, back, "--tokenizer", "bytes")
    export("--to-gguf", back, gguf)
    for name, number in (("Q8_0", 7), ("Q4_0", 2), ("Q4_K_M", 15), ("Q6_K", 18), ("Q2_K", 10)):
        params, out = llama_model_quantize_default_params(), os.path.join(folder, name + ".gguf")
        params.ftype, params.nthread = number, 1
        if llama_model_quantize(gguf.encode(), out.encode(), params) != 0:
            sys.exit(f"llama.cpp could not quantise to {name}")
        export(out, back)
        floats, again = os.path.join(folder, "floats.gguf"), os.path.join(folder, "again.bin")
        params.ftype, params.allow_requantize = 0, True  # llama.cpp turns it back into float32
        if llama_model_quantize(out.encode(), floats.encode(), params) != 0:
            sys.exit(f"llama.cpp could not read its own {name}")
        export(floats, again)
        same = open(back, "rb").read() == open(again, "rb").read()
        print(f"K: {name}: the weights are {'' if same else 'NOT '}those that llama.cpp sees")
        ids = rng.integers(0, 256, 24)
        difference("K: " + name, mamba_logits(back, ids, folder), llama_logits(out, ids))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
