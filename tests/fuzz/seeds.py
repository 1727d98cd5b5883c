#!/usr/bin/env python3
"""Seeds for the fuzzing targets, from the models of the tests.

    python3 tests/fuzz/seeds.py ./mamba FOLDER

writes FOLDER/model, state, checkpoint, tokenizer and options. The first byte of a seed is the
target's choices."""

import os
import struct
import subprocess
import sys
import tempfile

MODELS = ["tests/odd.bin", "tests/plain.bin", "tests/falcon.bin", "models/copying.bin",
          "models/tales.bin"]
TEXTS = [b"Once upon a time", "Die Mütze, 世界 🐍\n\n\t x".encode(),
         b"\xff\xfe\x00 a<|endoftext|>"]


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    mamba, folder = sys.argv[1:]
    work = tempfile.mkdtemp()
    names = {}

    def seed(target, data):
        os.makedirs(os.path.join(folder, target), exist_ok=True)
        names[target] = names.get(target, 0) + 1
        with open(os.path.join(folder, target, "seed%d" % names[target]), "wb") as f:
            f.write(data)

    files = [open(name, "rb").read() for name in MODELS]
    for kind in "q8", "q4":
        out = os.path.join(work, kind)
        subprocess.run([mamba, "quantize", "tests/plain.bin", out, kind], check=True,
                       capture_output=True)
        files.append(open(out, "rb").read())
    for file in files:
        blob_bytes, tensors_at = struct.unpack_from("<Q", file, 96)[0], \
            struct.unpack_from("<Q", file, 104)[0]
        blob = file[256:256 + blob_bytes]
        head = file[:256] + blob
        for choices in (7, 7 + 8, 7 + 48, 7 + 32, 3):
            if len(head) < 20000:
                seed("model", bytes([choices]) + head)
        if len(file) < 20000:
            seed("model", b"\x01" + file)
        if len(blob) < 65536:
            for text in TEXTS:
                seed("tokenizer", struct.pack("<H", len(blob)) + blob + text)
    state = os.path.join(work, "state")
    subprocess.run([mamba, "tests/odd.bin", "Once", "-n", "5", "-s", "1", "--save-state", state],
                   check=True, capture_output=True)
    state = open(state, "rb").read()
    for choices in (1, 3, 7):
        seed("state", bytes([choices]) + (state if choices == 1 else state[:560]))
    header = bytearray(1024)
    header[:16] = b"mamba.t\n" + struct.pack("<II", 2, 1024)
    header[128:131] = b"run"
    for settings in (b"", b"--data a.txt\0--steps\0" + b"5\0"):
        struct.pack_into("<I", header, 76, len(settings))
        seed("checkpoint", b"\x0f" + bytes(header) + settings)
    for line in ("m.bin Once -n 5 -t 0.5", "-p 0.9 --stop a --stop b -- -x", "--help", "-T 9 -o x",
                 "train --lr 0.1", "--temp 1 -n=3 --raw m.bin", "-n 99999999999999999999 -p nan"):
        for choices in (1, 2, 4):
            seed("options", bytes([choices]) + line.replace(" ", "\0").encode())
    print(", ".join("%d of %s" % (n, name) for name, n in sorted(names.items())))


if __name__ == "__main__":
    main()
