#!/usr/bin/env python3
"""test_export.py: export.py against checkpoints made here, read back by a reader written here from
the format alone.

  python tests/test_export.py [-k WORD] [-v]

Needs numpy. What needs torch, transformers or tokenizers is skipped where they are not installed.
Exit status 0 when nothing failed; the last line is "N passed, N failed, N skipped".

Contents: 1 making checkpoints | 2 reading model.bin | 3 layout and round trips | 4 number formats |
5 layouts, names, shards, tokenizers | 6 refusals | 7 damaged input | 8 output files and memory |
9 pickles, hub, transformers | 10 the runner
"""
import contextlib
import importlib.util
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import types
import unittest
import zlib

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
EXPORT = os.path.join(HERE, "..", "export.py")
sys.path.insert(0, os.path.dirname(EXPORT))
import export


def have(*modules):
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    return unittest.skipIf(missing, "not installed: " + ", ".join(missing))


# --------------------------------------------------------------------------------------------------
# 1. Making checkpoints: a dict of numpy arrays under transformers' names, a config, a writer of
# safetensors.

class Sizes:
    """What a test wants; the rest are small odd defaults."""

    def __init__(self, **changes):
        self.D, self.E, self.N, self.K, self.R, self.V, self.n_layer = 6, 10, 3, 4, 2, 259, 2
        self.eps, self.mixer_eps, self.falcon = 1e-5, 1e-6, False
        self.tied, self.proj_bias, self.conv_bias = True, False, True
        self.layer_norm = False
        vars(self).update(changes)


VARIANTS = {
    "plain": Sizes(), "no conv bias": Sizes(conv_bias=False), "proj bias": Sizes(proj_bias=True),
    "untied": Sizes(tied=False), "odd": Sizes(D=7,
                                              E=11,
                                              N=5,
                                              K=3,
                                              R=3,
                                              V=261,
                                              n_layer=3,
                                              tied=False,
                                              proj_bias=True,
                                              eps=3e-5), "ones": Sizes(D=1,
                                                                       E=1,
                                                                       N=1,
                                                                       K=1,
                                                                       R=1,
                                                                       V=256,
                                                                       n_layer=1),
    "falcon": Sizes(falcon=True, tied=False,
                    mixer_eps=1e-4), "falcon, all biases": Sizes(falcon=True, proj_bias=True)
}


def layout(s):
    """model.bin's tensors in order: (name, shape in the checkpoint, is W, name there)."""
    out = [("embedding", (s.V, s.D), True, "backbone.embeddings.weight")]
    for i in range(s.n_layer):
        p, q = f"layer{i}.", f"backbone.layers.{i}.mixer."
        out.append((p + "norm", (s.D,), False, f"backbone.layers.{i}.norm.weight"))
        if s.layer_norm:
            out.append((p + "norm_bias", (s.D,), False, f"backbone.layers.{i}.norm.bias"))
        out.append((p + "in_proj", (2 * s.E, s.D), True, q + "in_proj.weight"))
        if s.proj_bias:
            out.append((p + "in_bias", (2 * s.E,), False, q + "in_proj.bias"))
        out.append((p + "conv", (s.E, 1, s.K), False, q + "conv1d.weight"))
        if s.conv_bias:
            out.append((p + "conv_bias", (s.E,), False, q + "conv1d.bias"))
        out.append((p + "x_proj", (s.R + 2 * s.N, s.E), True, q + "x_proj.weight"))
        out.append((p + "dt_proj", (s.E, s.R), True, q + "dt_proj.weight"))
        out.append((p + "dt_bias", (s.E,), False, q + "dt_proj.bias"))
        out.append((p + "A_log", (s.E, s.N), False, q + "A_log"))
        out.append((p + "D_skip", (s.E,), False, q + "D"))
        out.append((p + "out_proj", (s.D, s.E), True, q + "out_proj.weight"))
        if s.proj_bias:
            out.append((p + "out_bias", (s.D,), False, q + "out_proj.bias"))
    out.append(("norm_f", (s.D,), False, "backbone.norm_f.weight"))
    if s.layer_norm:
        out.append(("norm_f_bias", (s.D,), False, "backbone.norm_f.bias"))
    if not s.tied:
        out.append(("head", (s.V, s.D), True, "lm_head.weight"))
    return out


def weights(s, seed=0):
    rng = np.random.Generator(np.random.PCG64(seed))
    return {source: rng.standard_normal(shape).astype("<f4") for _, shape, _, source in layout(s)}


def hf_config(s):
    c = {
        "model_type": "falcon_mamba" if s.falcon else "mamba", "hidden_size": s.D,
        "intermediate_size": s.E, "expand": 2, "state_size": s.N, "conv_kernel": s.K,
        "time_step_rank": s.R, "vocab_size": s.V, "num_hidden_layers": s.n_layer,
        "layer_norm_epsilon": s.eps, "hidden_act": "silu", "use_bias": s.proj_bias,
        "use_conv_bias": s.conv_bias, "tie_word_embeddings": s.tied, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0
    }
    return {**c, "mixer_rms_eps": s.mixer_eps} if s.falcon else c


def bf16(a):
    """float32 to bfloat16 by comparing distances in float64: nothing shared with export.py."""
    bits = np.ascontiguousarray(a, "<f4").view("<u4")
    low = bits & 0xFFFF0000
    high = low + 0x10000
    down, up, x = (v.astype("<u4").view("<f4").astype("f8") for v in (low, high, bits))
    with np.errstate(invalid="ignore"):
        to_up = np.abs(up - x) < np.abs(x - down)
        tie = np.abs(up - x) == np.abs(x - down)
    pick = np.where(to_up | (tie & ((low >> 16) & 1 == 1)), high, low)
    return (pick >> 16).astype("<u2")


def raw(a, dtype):
    return {
        "F32": lambda: a.astype("<f4"), "F16": lambda: a.astype("<f2"), "BF16": lambda: bf16(a)
    }[dtype]().tobytes()


def safetensors(tensors, dtype="F32"):
    """The bytes of a file; dtype is one for all, or a dict with exceptions."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, a in tensors.items():
        kind = dtype if isinstance(dtype, str) else dtype.get(name, "F32")
        piece = raw(a, kind)
        header[name] = {
            "dtype": kind, "shape": list(a.shape),
            "data_offsets": [len(data), len(data) + len(piece)]
        }
        data += piece
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def read_safetensors(path):
    blob = open(path, "rb").read()
    n = struct.unpack_from("<Q", blob)[0]
    header, data = json.loads(blob[8:8 + n]), blob[8 + n:]
    header.pop("__metadata__", None)
    return {
        k: (v["dtype"], tuple(v["shape"]), data[v["data_offsets"][0]:v["data_offsets"][1]])
        for k, v in header.items()
    }


def write(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(data if isinstance(data, bytes) else json.dumps(data).encode())


def spoilt(text, **changes):
    """A config with keys replaced, or removed where the value is ...."""
    out = {**text, **changes}
    return {k: v for k, v in out.items() if v is not ...}


# --------------------------------------------------------------------------------------------------
# 2. Reading model.bin, by the offsets of the format's description.

def read_model(path, s):
    """(header fields, tokenizer blob, {name: bytes}); every rule of the layout is asserted."""
    f = open(path, "rb").read()
    u32 = lambda at: struct.unpack_from("<I", f, at)[0]
    i32 = lambda at: struct.unpack_from("<i", f, at)[0]
    u64 = lambda at: struct.unpack_from("<Q", f, at)[0]
    assert f[:8] == b"mamba.c\n" and u32(8) == 1 and u32(12) == 256
    h = {
        "arch": u32(16), "dtype": u32(20), "flags": u32(24),
        "sizes": [u32(28 + 4 * i) for i in range(7)], "norm_eps": f[56:60], "mixer_eps": f[60:64],
        "bos": i32(64), "pad": i32(68), "eos": [i32(72 + 4 * i) for i in range(4)]
    }
    assert u64(88) == 256 and u64(104) % 64 == 0 and u64(104) + u64(112) == len(f)
    blob = f[256:256 + u64(96)]
    assert not any(f[256 + len(blob):u64(104)]) and u64(104) - 256 - len(blob) < 64
    assert not any(f[128:252])
    assert u32(120) == zlib.crc32(blob) and u32(124) == zlib.crc32(
        f[u64(104):]) and u32(252) == zlib.crc32(f[:252])
    tensors, at, item = {}, u64(104), {0: 4, 1: 2, 2: 2, 3: 1088, 4: 576}[h["dtype"]]
    for name, shape, is_w, _ in layout(s):
        start = (at + 63) // 64 * 64
        assert not any(f[at:start]), f"the gap before {name} is not zero"
        pieces = [(n + 31) // 32
                  for n in shape] if is_w and item > 4 else shape  # tiles, or numbers
        at = start + int(np.prod(pieces)) * (item if is_w else 4)
        assert at <= len(f)
        tensors[name] = f[start:at]
    assert at == len(f), "bytes after the last tensor"
    return h, blob, tensors


# --------------------------------------------------------------------------------------------------

class Case(unittest.TestCase):
    def setUp(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.dir = holder.name
        self.src, self.bin = os.path.join(self.dir, "src"), os.path.join(self.dir, "model.bin")

    def small_chunks(self):
        self.addCleanup(setattr, export, "CHUNK", export.CHUNK)
        export.CHUNK = 16

    def checkpoint(self, s, config=None, tensors=None, dtype="F32"):
        write(os.path.join(self.src, "config.json"), hf_config(s) if config is None else config)
        write(os.path.join(self.src, "model.safetensors"),
              safetensors(weights(s) if tensors is None else tensors, dtype))

    def run_main(self, *arguments):
        """(exit status, stderr) of the command; an exception that is no clean exit fails it."""
        argv, err = sys.argv, io.StringIO()
        sys.argv = ["export.py", *arguments]
        try:
            with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
                export.main()
            return 0, err.getvalue()
        except SystemExit as e:
            return (1, err.getvalue() + e.code) if isinstance(e.code, str) else (e.code or 0,
                                                                                 err.getvalue())
        finally:
            sys.argv = argv

    def good(self, *arguments):
        status, text = self.run_main(*(arguments or (self.src, self.bin, "--tokenizer", "bytes")))
        self.assertEqual((status, text.count("Traceback")), (0, 0), text)
        return text

    def bad(self, *words, arguments=None):
        """The command fails with one line that holds every word, and leaves nothing new behind."""
        before = self.files()
        status, text = self.run_main(*(arguments or (self.src, self.bin, "--tokenizer", "bytes")))
        self.assertEqual(status, 1, text or "it succeeded")
        self.assertTrue(text.startswith("export.py: ") and "\n" not in text.strip(), text)
        for word in words:
            self.assertIn(word, text)
        self.assertEqual(before, self.files())

    def files(self):
        return sorted(
            os.path.join(folder, name) for folder, folders, files in os.walk(self.dir)
            for name in folders + files)


# --------------------------------------------------------------------------------------------------
# 3. Layout and round trips

class Layout(Case):
    def test_every_byte(self):
        for name, s in VARIANTS.items():
            for dtype, code in (("f32", 0), ("f16", 1), ("bf16", 2)):
                with self.subTest(name, dtype=dtype):
                    w = weights(s)
                    self.checkpoint(s)
                    self.good(self.src, self.bin, "--tokenizer", "bytes", "--dtype", dtype)
                    h, blob, tensors = read_model(self.bin, s)
                    self.assertEqual((h["arch"], h["dtype"]), (int(s.falcon), code))
                    self.assertEqual(h["flags"],
                                     s.tied + 2 * s.proj_bias + 4 * s.conv_bias + 8 * s.falcon)
                    self.assertEqual(h["sizes"], [s.D, s.n_layer, s.V, s.E, s.N, s.K, s.R])
                    self.assertEqual(h["norm_eps"], struct.pack("<f", s.eps))
                    self.assertEqual(h["mixer_eps"],
                                     struct.pack("<f", s.mixer_eps if s.falcon else 0))
                    self.assertEqual((h["bos"], h["pad"], h["eos"]), (1, 0, [2, -1, -1, -1]))
                    self.assertEqual((len(blob), blob[:4], blob[8:12]), (32, b"mtok", bytes(4)))
                    for t, _, is_w, source in layout(s):
                        kind = dtype.upper() if is_w else "F32"
                        self.assertEqual(tensors[t], raw(w[source], kind), t)

    def test_there_and_back_is_bit_exact(self):
        for name, s in VARIANTS.items():
            for dtype in ("F32", "F16", "BF16"):
                with self.subTest(name, dtype=dtype):
                    w = weights(s)
                    kinds = {source: dtype for _, _, is_w, source in layout(s) if is_w}
                    self.checkpoint(s, dtype=kinds)
                    self.good()
                    back, again = os.path.join(self.dir, "back-" + name +
                                               dtype), os.path.join(self.dir, "again.bin")
                    said = self.good("--to-hf", self.bin, back)
                    self.assertIn(f"export.py {back} model.bin --tokenizer bytes", said)
                    got = read_safetensors(os.path.join(back, "model.safetensors"))
                    kind = {source: kinds.get(source, "F32") for source in w}
                    want = {
                        source: (kind[source], a.shape, raw(a, kind[source]))
                        for source, a in w.items()
                    }
                    self.assertEqual(got, want)
                    config = json.load(open(os.path.join(back, "config.json")))
                    wanted = spoilt(hf_config(s), expand=config["expand"])
                    self.assertEqual({k: config[k] for k in wanted}, wanted)
                    self.assertNotIn("tokenizer.json", os.listdir(back))
                    self.good(back, again, "--tokenizer", "bytes")
                    self.assertEqual(open(self.bin, "rb").read(), open(again, "rb").read())

    def test_help_without_numpy(self):
        for arguments, status, words in ((["--help"], 0, "SRC DST"),
                                         (["a", "b"], 1, "numpy is missing (pip install numpy)")):
            code = ("import runpy, sys; sys.modules['numpy'] = None; "
                    f"sys.argv = ['export.py', *{arguments}]; "
                    f"runpy.run_path({export.__file__!r}, run_name='__main__')")
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            self.assertEqual((done.returncode, words in done.stdout + done.stderr), (status, True),
                             done.stderr)

    def test_committed_models_follow_the_layout(self):
        odd = Sizes(D=35, E=51, N=5, K=3, R=3, V=259, n_layer=3, tied=False, proj_bias=True)
        falcon = Sizes(D=24, E=48, N=8, K=4, R=2, V=263, tied=False, falcon=True)
        plain = Sizes(D=32, E=64, N=16, K=4, R=2, V=256, conv_bias=False)
        layer_norm = Sizes(D=29, E=58, N=6, K=4, R=3, V=260, tied=False, layer_norm=True)
        for name, s in (("odd", odd), ("falcon", falcon), ("plain", plain),
                        ("layernorm", layer_norm)):
            path = os.path.join(HERE, name + ".bin")
            if not os.path.exists(path):
                self.skipTest(f"{name}.bin is not there (dev/make_golden.py makes it)")
            with self.subTest(name):
                read_model(path, s)

    def test_two_runs_give_the_same_bytes(self):
        self.checkpoint(VARIANTS["odd"])
        self.good()
        first = open(self.bin, "rb").read()
        self.good()
        self.assertEqual(first, open(self.bin, "rb").read())


# --------------------------------------------------------------------------------------------------
# 4. Number formats

class Numbers(unittest.TestCase):
    def test_bf16_rounds_to_nearest_even(self):
        rng = np.random.Generator(np.random.PCG64(1))
        bits = rng.integers(0, 1 << 32, 1 << 20, dtype="u4")
        ties = (rng.integers(0, 1 << 16, 1 << 16, dtype="u4") << 16) | 0x8000
        edges = np.array([0, 1, 0x80000000, 0x007FFFFF, 0x7F7F7FFF], "u4")
        x = np.concatenate([bits, ties, ties - 1, ties + 1, edges]).view("f4")
        x = x[np.abs(x) <= export.LARGEST["BF16"]]
        np.testing.assert_array_equal(export.f32_to_bf16(x), bf16(x))

    def test_bf16_survives_both_ways(self):
        every = np.arange(1 << 16, dtype="<u2")
        x = export.bf16_to_f32(every)
        back = export.f32_to_bf16(x)
        nan = np.isnan(x)
        np.testing.assert_array_equal(back[~nan], every[~nan])
        self.assertEqual(nan.sum(), 2 * 127)
        self.assertTrue(np.isnan(export.bf16_to_f32(back[nan])).all())
        np.testing.assert_array_equal(back[nan] >> 15, every[nan] >> 15)

    def test_bf16_keeps_nan_and_infinity(self):
        x = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000],
                     "u4").view("f4")
        y = export.bf16_to_f32(export.f32_to_bf16(x))
        self.assertTrue(np.isnan(y[:4]).all() and (y[4:] == [np.inf, -np.inf]).all())

    def test_f16_rounds_to_nearest_even(self):
        rng = np.random.Generator(np.random.PCG64(2))
        edges = [65504, -65504, 2.0**-25, 3 * 2.0**-25, 2.0**-24, 1 + 2.0**-11, 1 + 3 * 2.0**-11]
        x = np.concatenate([rng.standard_normal(20000), rng.standard_normal(20000) * 1e-5,
                            rng.uniform(-65504, 65504, 20000), edges]).astype("f4")
        self.assertEqual(export.encode(x, "F16"),
                         b"".join(struct.pack("<e", v) for v in x.tolist()))

    def test_decode(self):
        self.assertEqual(
            export.decode(struct.pack("<3e", 1.5, -0.0, 6e-8), "F16").tolist(),
            [1.5, 0.0, 2.0**-24])
        self.assertEqual(export.decode(b"\x80\x3f\x00\xc0", "BF16").tolist(), [1.0, -2.0])
        self.assertEqual(
            export.decode(struct.pack("<2f", 0.1, 3e38), "F32").tobytes(),
            struct.pack("<2f", 0.1, 3e38))


class Values(Case):
    def spoil(self, source, at, value):
        w = weights(VARIANTS["plain"])
        w[source].reshape(-1)[at] = value
        self.checkpoint(VARIANTS["plain"], tensors=w)

    def test_not_finite(self):
        for source in ("backbone.layers.1.mixer.A_log", "backbone.layers.0.mixer.in_proj.weight"):
            for value in (np.nan, np.inf, -np.inf):
                self.spoil(source, 7, value)
                self.bad(source, "element 7", str(np.float32(value)))

    def test_too_large(self):
        name = "backbone.layers.1.mixer.x_proj.weight"
        for dtype, value, fits in (("f16", 65504.0, True), ("f16", 65505.0, False),
                                   ("f16", -1e30, False), ("bf16", 3.38e38, True),
                                   ("bf16", 3.4e38, False), ("f32", 3.4e38, True)):
            with self.subTest(dtype=dtype, value=value):
                self.spoil(name, 5, value)
                arguments = (self.src, self.bin, "--tokenizer", "bytes", "--dtype", dtype)
                self.good(*arguments) if fits else self.bad(
                    name, "element 5", dtype, "--dtype", arguments=arguments)
        self.spoil("backbone.norm_f.weight", 0, 1e30)  # stays float32, so this is no matter
        self.good(self.src, self.bin, "--tokenizer", "bytes", "--dtype", "f16")

    def test_copied_and_converted_numbers_are_checked_alike(self):
        s, name = VARIANTS["plain"], "backbone.layers.1.mixer.x_proj.weight"
        for dtype in ("F32", "F16", "BF16"):
            for bits, good in ((0x7F7F, dtype != "F16"), (0x7F80, False), (0xFF80, False),
                               (0x7BFF, True), (0x7C00, dtype != "F16"), (0x7FC1, False)):
                with self.subTest(dtype=dtype, bits=bits):
                    self.checkpoint(s, dtype={name: dtype})
                    path = os.path.join(self.src, "model.safetensors")
                    data = bytearray(open(path, "rb").read())
                    header = json.loads(data[8:8 + struct.unpack_from("<Q", data)[0]])
                    at = struct.unpack_from("<Q", data)[0] + 8 + header[name]["data_offsets"][0]
                    width = 4 if dtype == "F32" else 2
                    struct.pack_into("<H", data, at + 5 * width + width - 2, bits)
                    write(path, bytes(data))
                    for target in ("f32", dtype.lower()):
                        command = (self.src, self.bin, "--tokenizer", "bytes", "--dtype", target)
                        if good:
                            self.good(*command)
                        else:
                            self.bad(name, "element 5", arguments=command)

    def test_position_past_the_first_chunk(self):
        self.small_chunks()
        self.spoil("backbone.embeddings.weight", 100, np.nan)
        self.bad("backbone.embeddings.weight", "element 100")
        self.checkpoint(VARIANTS["odd"])
        self.good()
        _, _, tensors = read_model(self.bin, VARIANTS["odd"])
        self.assertEqual(tensors["head"], weights(VARIANTS["odd"])["lm_head.weight"].tobytes())

    def test_default_dtype_loses_nothing(self):
        s = VARIANTS["plain"]
        matrices = [source for _, _, is_w, source in layout(s) if is_w]
        for kinds, code in (("F32", 0), ("F16", 1), ("BF16", 2), ({m: "BF16"
                                                                   for m in matrices},
                                                                  2), ({matrices[0]: "BF16"}, 0),
                            ({m: "F16" if m == matrices[1] else "BF16"
                              for m in matrices}, 0)):
            self.checkpoint(s, dtype=kinds)
            self.good()
            self.assertEqual(read_model(self.bin, s)[0]["dtype"], code)


def tile_values(data, shape, bits):
    """(rows, inputs) of (code, scale), read number by number from the format's description."""
    rows, inputs = shape
    codes, scales = np.zeros(shape), np.zeros(shape)
    for r in range(rows):
        for k in range(inputs):
            tile = (r // 32 * ((inputs + 31) // 32) + k // 32) * (64 + 128 * bits)
            word, = struct.unpack_from("<I", data,
                                       tile + 64 + (k % 32 * bits // 32 * 32 + r % 32) * 4)
            j, half = k % (32 // bits), 1 << (bits - 1)
            code = word >> (bits * j) & (2 * half - 1)
            codes[r, k] = code - half if j < 32 // bits - 1 else code - 2 * half * (code >= half)
            scales[r, k], = struct.unpack("<f",
                                          bytes(2) + data[tile + r % 32 * 2:tile + r % 32 * 2 + 2])
    return codes, scales


class Quantized(Case):
    SIZES = {**VARIANTS, "larger": Sizes(D=40, E=70, R=33, V=300)}

    def test_every_code(self):
        for name, s in self.SIZES.items():
            for dtype, number, bits in (("q8", 3, 8), ("q4", 4, 4)):
                with self.subTest(name, dtype=dtype):
                    w, back = weights(s), os.path.join(self.dir, "back-" + name + dtype)
                    self.checkpoint(s)
                    self.good(self.src, self.bin, "--tokenizer", "bytes", "--dtype", dtype)
                    self.good("--to-hf", self.bin, back)
                    out = read_safetensors(os.path.join(back, "model.safetensors"))
                    h, _, tensors = read_model(self.bin, s)
                    self.assertEqual(h["dtype"], number)
                    self.assertEqual(
                        json.load(open(os.path.join(back, "config.json")))["dtype"], "float32")
                    for t, shape, is_w, source in layout(s):
                        if not is_w:
                            self.assertEqual(tensors[t], raw(w[source], "F32"), t)
                            continue
                        codes, scales = tile_values(tensors[t], shape, bits)
                        self.assertEqual(out[source],
                                         ("F32", shape, (codes * scales).astype("<f4").tobytes()))
                        lowest, highest = (-127, 127) if bits == 8 else (-8, 7)
                        nearest = np.clip(np.rint(w[source] / np.where(scales == 0, 1, scales)),
                                          lowest, highest)
                        self.assertLessEqual(np.abs(codes - nearest).max(), 0)
                        error = np.sqrt(
                            ((codes * scales - w[source])**2).sum() / (w[source]**2).sum())
                        self.assertLess(error, 0.01 if bits == 8 else 0.11, t)

    def test_the_bytes_are_those_of_mamba_quantize(self):
        mamba, floats, other = os.path.join(HERE, "..",
                                            "mamba"), os.path.join(self.dir, "f.bin"), os.path.join(
                                                self.dir, "o.bin")
        if not os.path.exists(mamba):
            self.skipTest("./mamba is not built")
        for name, s in self.SIZES.items():
            for size in (1, 1e-39, 1e30):  # scales that are subnormal, large ones
                w = {
                    source: (a * np.float32(size)).astype("<f4")
                    for source, a in weights(s).items()
                }
                w["backbone.layers.0.mixer.in_proj.weight"][:, :3] = 0
                for dtype in ("q8", "q4"):
                    with self.subTest(name, size=size, dtype=dtype):
                        self.checkpoint(s, tensors=w)
                        self.good(self.src, floats, "--tokenizer", "bytes")
                        self.good(self.src, self.bin, "--tokenizer", "bytes", "--dtype", dtype)
                        subprocess.run([mamba, "quantize", floats, other, dtype],
                                       check=True,
                                       capture_output=True)
                        self.assertEqual(open(self.bin, "rb").read(), open(other, "rb").read())

    def test_pieces_do_not_matter(self):
        for dtype in ("q8", "q4"):
            self.checkpoint(self.SIZES["larger"])
            self.good(self.src, self.bin, "--tokenizer", "bytes", "--dtype", dtype)
            whole = open(self.bin, "rb").read()
            self.good("--to-hf", self.bin, os.path.join(self.dir, "whole" + dtype))
            self.small_chunks()
            self.good(self.src, self.bin, "--tokenizer", "bytes", "--dtype", dtype)
            self.assertEqual(whole, open(self.bin, "rb").read())
            self.good("--to-hf", self.bin, os.path.join(self.dir, "pieces" + dtype))
            self.assertEqual(
                *(read_safetensors(os.path.join(self.dir, way + dtype, "model.safetensors"))
                  for way in ("whole", "pieces")))

    def test_refusals(self):
        w = weights(VARIANTS["plain"])
        w["backbone.layers.1.mixer.x_proj.weight"][1, 2] = np.nan
        self.checkpoint(VARIANTS["plain"], tensors=w)
        self.bad("x_proj",
                 "element 12",
                 arguments=(self.src, self.bin, "--tokenizer", "bytes", "--dtype", "q4"))
        self.checkpoint(VARIANTS["odd"])
        self.good(self.src, self.bin, "--tokenizer", "bytes", "--dtype", "q8")
        whole, broken = open(self.bin, "rb").read(), os.path.join(self.dir, "broken.bin")
        rng = random.Random(4)
        for at in [rng.randrange(len(whole)) for _ in range(60)] + [len(whole) - 1]:
            for data in (whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1:], whole[:at]):
                write(broken, data)
                status, text = self.run_main("--to-hf", broken, os.path.join(self.dir, "out"))
                self.assertEqual((status, len(text.splitlines())), (1, 1), text)


# --------------------------------------------------------------------------------------------------
# 5. Layouts, names, shards, tokenizers

def reference_names(w):
    return {k.replace("embeddings.", "embedding."): v for k, v in w.items()}


def reference_config(s, **changes):
    return spoilt(
        {
            "d_model": s.D, "n_layer": s.n_layer, "vocab_size": s.V - 1,
            "pad_vocab_size_multiple": s.V, "rms_norm": True, "residual_in_fp32": True,
            "fused_add_norm": True, "tie_embeddings": s.tied, "ssm_cfg": {
                "d_state": s.N, "d_conv": s.K, "expand": s.E / s.D, "dt_rank": s.R,
                "bias": s.proj_bias, "conv_bias": s.conv_bias, "dt_min": 0.001, "dt_max": 0.1,
                "dt_init": "random", "dt_scale": 1.0, "dt_init_floor": 1e-4, "layer": "Mamba1"
            }
        }, **changes)


class Layouts(Case):
    def same_tensors(self, s, seed=0):
        w, (_, _, tensors) = weights(s, seed), read_model(self.bin, s)
        for name, _, _, source in layout(s):
            self.assertEqual(tensors[name], w[source].tobytes(), name)

    def test_reference_layout(self):
        for s in (Sizes(E=12), Sizes(E=15, tied=False, proj_bias=True,
                                     V=264), Sizes(E=9, conv_bias=False)):
            self.checkpoint(s, reference_config(s), reference_names(weights(s)))
            self.good()
            self.same_tensors(s)
            h = read_model(self.bin, s)[0]
            self.assertEqual((h["arch"], h["bos"], h["pad"], h["eos"]), (0, -1, -1, [-1] * 4))

    def test_reference_defaults(self):
        s = Sizes(D=24, E=48, N=16, K=4, R=2, V=264)  # ceil(24 / 16), 261 rounded up to 8
        self.checkpoint(s, {"d_model": 24, "n_layer": 2, "vocab_size": 261},
                        reference_names(weights(s)))
        self.good()
        self.same_tensors(s)
        m = export.model_from_config(export.Config({"d_model": 2560}, "x"),
                                     export.Fields({}, "x"), 0)
        self.assertEqual((m.D, m.n_layer, m.V, m.E, m.N, m.K, m.R, m.norm_eps, m.tied, m.proj_bias,
                          m.conv_bias, m.eos),
                         (2560, 64, 50280, 5120, 16, 4, 160, 1e-5, True, False, True, [0]))

    def test_transformers_defaults(self):
        for kind in ("mamba", "falcon_mamba"):
            m = export.model_from_config(export.Config({"model_type": kind}, "x"),
                                         export.Fields({}, "x"))
            self.assertEqual((m.D, m.n_layer, m.V, m.E, m.N, m.K, m.R, m.norm_eps),
                             (768, 32, 50280, 1536, 16, 4, 48, 1e-5))
            self.assertEqual((m.tied, m.proj_bias, m.conv_bias, m.bos, m.pad, m.eos),
                             (True, False, True, 0, 0, [0]))
            self.assertEqual((m.mixer_norm, m.mixer_eps),
                             (True, 1e-6) if kind == "falcon_mamba" else (False, 0.0))

    def test_inner_size(self):
        s = Sizes(D=6, E=9)
        for changes in ({"expand": 1.5,
                         "intermediate_size": ...}, {"expand": 1.6, "intermediate_size": ...},
                        {"expand": 16,
                         "intermediate_size": 9}, {"expand": 1.5, "intermediate_size": None}):
            self.checkpoint(s, spoilt(hf_config(s), **changes))
            self.good()
            self.same_tensors(s)

    def test_both_vocabularies_of_keys(self):
        """The hub's mamba-*-hf configs keep the reference's keys beside transformers' own."""
        s = VARIANTS["odd"]
        self.checkpoint(s, {
            **reference_config(s, d_model=99, n_layer=99, ssm_cfg={}), **hf_config(s), "d_inner": 99
        })
        self.good()
        self.same_tensors(s)

    def test_auto_rank(self):
        for D, R in ((16, 1), (17, 2), (1, 1)):
            s = Sizes(D=D, R=R)
            for value in ("auto", ...):
                self.checkpoint(s, spoilt(hf_config(s), time_step_rank=value))
                self.good()
                self.same_tensors(s)

    def test_names(self):
        s = VARIANTS["untied"]
        for rename in (lambda k: k.replace("embeddings.", "embedding."),
                       lambda k: k.replace("backbone.", "")):
            self.checkpoint(s, tensors={rename(k): v for k, v in weights(s).items()})
            self.good()
            self.same_tensors(s)
        w = weights(s)
        w["backbone.embedding.weight"] = w["backbone.embeddings.weight"]
        self.checkpoint(s, tensors=w)
        self.bad("backbone.embedding.weight", "backbone.embeddings.weight")

    def test_tied_head(self):
        s, w = VARIANTS["plain"], weights(VARIANTS["plain"])
        embedding = w["backbone.embeddings.weight"]
        self.checkpoint(s, tensors={**w, "lm_head.weight": embedding})
        self.good()
        self.same_tensors(s)
        only_head = {**w, "lm_head.weight": embedding}
        del only_head["backbone.embeddings.weight"]
        self.checkpoint(s, tensors=only_head)
        self.good()
        self.same_tensors(s)
        other = embedding.copy()
        other[-1, -1] += 1
        self.checkpoint(s, tensors={**w, "lm_head.weight": other})
        self.bad("lm_head.weight", "backbone.embeddings.weight", "tie")
        self.checkpoint(s, tensors={**w, "lm_head.weight": embedding[:-1]})
        self.bad("lm_head.weight")

    def test_shards(self):
        s, w = VARIANTS["odd"], weights(VARIANTS["odd"])
        names = sorted(w)
        parts = {
            f"model-{i + 1:05}-of-00003.safetensors": {n: w[n]
                                                       for n in names[i::3]}
            for i in range(3)
        }
        ssm_cfg = {
            "d_state": s.N, "d_conv": s.K, "expand": s.E / s.D + 1e-9, "dt_rank": s.R, "bias": True
        }
        for kind in (hf_config(s), reference_config(s, ssm_cfg=ssm_cfg, norm_epsilon=s.eps)):
            write(os.path.join(self.src, "config.json"), kind)
            for file, part in parts.items():
                write(os.path.join(self.src, file), safetensors(part))
            index = {
                "metadata": {}, "weight_map": {n: f
                                               for f, part in parts.items()
                                               for n in part}
            }
            write(os.path.join(self.src, "model.safetensors.index.json"), index)
            self.good()
            self.same_tensors(s)
        first, second = list(parts)[:2]
        write(os.path.join(self.src, "model.safetensors.index.json"),
              {"weight_map": {**index["weight_map"], "extra": first}})
        self.bad("extra", first)
        for value in ("../" + first, "", 3, "/etc/passwd"):
            write(os.path.join(self.src, "model.safetensors.index.json"),
                  {"weight_map": {names[0]: value}})
            self.bad("weight_map")
        write(os.path.join(self.src, "model.safetensors.index.json"), index)
        write(os.path.join(self.src, second), safetensors({**parts[second], names[0]: w[names[0]]}))
        self.bad(names[0], "another shard")
        os.unlink(os.path.join(self.src, second))
        self.bad(second, "No such file")
        for text in (b"{", b"[]", b"{}", b"null"):
            write(os.path.join(self.src, "model.safetensors.index.json"), text)
            self.bad("index.json")

    def test_special_ids(self):
        s = VARIANTS["plain"]
        cases = [([2, 3], 3, [3, -1, -1, -1]), ([2, 3], None, [2, 3, -1, -1]),
                 (None, [9], [9, -1, -1, -1]),
                 (5, [6, 7, 8, 5], [6, 7, 8, 5]), (None, None, [-1] * 4),
                 (..., None, [0, -1, -1, -1])]
        for config, generation, eos in cases:
            self.checkpoint(s, spoilt(hf_config(s), eos_token_id=config, bos_token_id=None))
            write(os.path.join(self.src, "generation_config.json"), {"eos_token_id": generation})
            self.good()
            h = read_model(self.bin, s)[0]
            self.assertEqual((h["eos"], h["bos"]), (eos, -1))
        write(os.path.join(self.src, "generation_config.json"), {"eos_token_id": [3, 4, 5, 6, 7]})
        self.bad("eos_token_id", "4")
        os.unlink(os.path.join(self.src, "generation_config.json"))
        for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
            for value in (s.V, -5, "0", 1.5, True, {}):
                self.checkpoint(s, spoilt(hf_config(s), **{key: value}))
                self.bad(key, "config.json")


def tokenizer_json(merges=(), added=("<|endoftext|>",), nfc=True):
    """A byte-level BPE with the 256 byte symbols, as the tokenizers library saves it."""
    symbols = [export.SYMBOL_OF[b] for b in range(256)] + [a + b for a, b in merges]
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True
    }
    flags = {
        "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True
    }
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "normalizer": {"type": "NFC"} if nfc else None,
        "added_tokens": [{"id": len(vocab) + i, "content": text, **flags}
                         for i, text in enumerate(added)], "pre_tokenizer": byte_level,
        "post_processor": byte_level, "decoder": byte_level, "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": vocab, "merges": [list(pair) for pair in merges]
        }
    }


# ids 256 .. 259; <|endoftext|> is 260
MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"))


class Tokenizers(Case):
    def test_blob_goes_in_and_comes_back(self):
        s = Sizes(V=264)
        self.checkpoint(s, {**hf_config(s), "eos_token_id": 260})
        write(os.path.join(self.src, "tokenizer.json"), tokenizer_json(MERGES))
        self.good(self.src, self.bin)
        _, blob, _ = read_model(self.bin, s)
        self.assertEqual((blob[:4], struct.unpack_from("<3I", blob, 20)), (b"mtok", (261, 4, 1)))
        alone = os.path.join(self.dir, "tokenizer.bin")
        self.good(os.path.join(self.src, "tokenizer.json"), alone)
        self.assertEqual(open(alone, "rb").read(), blob)
        for choice in (os.path.join(self.src, "tokenizer.json"), self.src):
            self.good(self.src, self.bin, "--tokenizer", choice)
            self.assertEqual(read_model(self.bin, s)[1], blob)
        back, again = os.path.join(self.dir, "back"), os.path.join(self.dir, "again.bin")
        self.good("--to-hf", self.bin, back)
        self.good(back, again)
        self.assertEqual(open(self.bin, "rb").read(), open(again, "rb").read())
        self.assertEqual(
            json.load(open(os.path.join(back, "tokenizer_config.json")))["eos_token"],
            "<|endoftext|>")

    def test_tokenizer_json_comes_back_byte_for_byte(self):
        s = Sizes(V=264)
        self.checkpoint(s, {**hf_config(s), "eos_token_id": 260})
        table = tokenizer_json(MERGES)
        table.update(truncation={"max_length": 9}, padding={"pad_id": 0})
        table["added_tokens"].append(dict(table["added_tokens"][0], id=999))
        text = json.dumps(table, indent=3, ensure_ascii=True) + " \n\n"
        with open(os.path.join(self.src, "tokenizer.json"), "w") as f:
            f.write(text)
        status, said = self.run_main(self.src, self.bin)
        self.assertEqual(status, 0)
        for word in ("truncation", "padding", "keeps id 260"):
            self.assertIn(word, said)
        back = os.path.join(self.dir, "back")
        self.good("--to-hf", self.bin, back)
        self.assertEqual(open(os.path.join(back, "tokenizer.json")).read(), text)

    def test_no_tokenizer(self):
        s = Sizes(V=64)
        self.checkpoint(s)
        self.good(self.src, self.bin, "--tokenizer", "none")
        self.assertEqual(read_model(self.bin, s)[1], b"")
        back, again = os.path.join(self.dir, "back"), os.path.join(self.dir, "again.bin")
        self.good("--to-hf", self.bin, back)
        self.assertFalse(os.path.exists(os.path.join(back, "tokenizer.json")))
        self.good(back, again, "--tokenizer", "none")
        self.assertEqual(open(self.bin, "rb").read(), open(again, "rb").read())
        mamba = os.path.join(HERE, "..", "mamba")
        if not os.path.exists(mamba):
            self.skipTest("./mamba is not built")
        run = lambda *a: subprocess.run([mamba, *a], capture_output=True, text=True)
        self.assertIn("none, ids only", run("info", self.bin, "--verify").stdout)
        self.assertEqual(len(run("logits", self.bin, "--tokens", "5,6", "--all").stdout.split("\n")), 3)
        self.assertIn("no tokenizer", run("logits", self.bin, "a").stderr)
        self.assertIn("no tokenizer", run("tokenize", self.bin).stderr)

    def test_vocab_txt(self):
        s = Sizes(V=11)
        self.checkpoint(s)
        path = os.path.join(self.src, "vocab.txt")
        with open(path, "w") as f:
            f.write("\n".join("<unk> <pad> <mask> <cls> A T C G N <eos> <bos>".split()))
        config = {"tokenizer_class": "EsmTokenizer", "cls_token": "<cls>", "eos_token": "<eos>"}
        write(os.path.join(self.src, "tokenizer_config.json"), config)
        status, said = self.run_main(self.src, self.bin)
        self.assertEqual(status, 0)
        self.assertIn("<eos> is not put after a prompt", said)
        blob = read_model(self.bin, s)[1]
        self.assertEqual(struct.unpack_from("<3I", blob, 4), (2, 3, 4096))
        self.assertEqual(struct.unpack_from("<2i", blob, 32), (3, 0))
        self.good(path, os.path.join(self.dir, "alone.bin"))
        for change, word in (({"tokenizer_class": "BertTokenizer"}, "WordPiece"),
                             ({"tokenizer_class": "SomeTokenizer"}, "SomeTokenizer")):
            write(os.path.join(self.src, "tokenizer_config.json"), {**config, **change})
            self.bad(word, arguments=(self.src, self.bin))
        os.remove(os.path.join(self.src, "tokenizer_config.json"))
        self.assertIn("longest token first", self.run_main(self.src, self.bin)[1])

    def test_end_of_text_of_the_reference_layout(self):
        s = Sizes(E=12, V=264)
        self.checkpoint(s, reference_config(s), reference_names(weights(s)))
        for table, eos in ((tokenizer_json(MERGES),
                            260), (tokenizer_json(MERGES, added=("<s>", "<|endoftext|>")), 261),
                           (tokenizer_json(MERGES,
                                           added=("</s>", )), -1), (tokenizer_json(MERGES,
                                                                                   added=()), -1)):
            write(os.path.join(self.dir, "other", "tokenizer.json"), table)
            self.good(self.src, self.bin, "--tokenizer",
                      os.path.join(self.dir, "other", "tokenizer.json"))
            self.assertEqual(read_model(self.bin, s)[0]["eos"][0], eos)

    def test_wrong_ones(self):
        s = Sizes(V=260)
        self.checkpoint(s)
        write(os.path.join(self.src, "tokenizer.json"), tokenizer_json(MERGES))
        self.bad("260", "another model",
                 arguments=(self.src, self.bin))  # ids up to 260, rows 0 .. 259
        self.good()  # --tokenizer bytes overrides it
        for change in ({"model": {"type": "WordPiece"}}, {"decoder": None
                                                          }, {"model": None}, {"added_tokens": [3]},
                       {"added_tokens": {}}, {"normalizer": {"type": "Lowercase"}}, {"unheard": 1}):
            write(os.path.join(self.src, "tokenizer.json"), {**tokenizer_json(), **change})
            self.bad("tokenizer", arguments=(self.src, self.bin))
            self.bad("tokenizer",
                     arguments=(os.path.join(self.src,
                                             "tokenizer.json"), os.path.join(self.dir, "t.bin")))
        for text in (b"", b"{", b"[]", b"\xff", b'{"model":1,"model":2}'):
            write(os.path.join(self.src, "tokenizer.json"), text)
            self.bad("tokenizer.json", arguments=(self.src, self.bin))

    @have("transformers", "tokenizers")
    def test_transformers_reads_the_one_that_comes_back(self):
        import transformers
        s = Sizes(V=264)
        self.checkpoint(s, {**hf_config(s), "eos_token_id": 260})
        write(os.path.join(self.src, "tokenizer.json"), tokenizer_json(MERGES))
        self.good(self.src, self.bin)
        back = os.path.join(self.dir, "back")
        self.good("--to-hf", self.bin, back)
        got = transformers.AutoTokenizer.from_pretrained(back)
        want = transformers.PreTrainedTokenizerFast(
            tokenizer_file=os.path.join(self.src, "tokenizer.json"))
        for text in ("", "in the thick of it", " the  the\n",
                     "é e\u0301 \u212b 漢字 \U0001f600 <|endoftext|>the", "the<|endoftext|>"):
            self.assertEqual(got(text).input_ids, want(text).input_ids, text)
            self.assertEqual(got.decode(got(text).input_ids), want.decode(want(text).input_ids),
                             text)
        self.assertEqual((got.eos_token_id, got.eos_token), (260, "<|endoftext|>"))


# --------------------------------------------------------------------------------------------------
# 6. Refusals

class Refusals(Case):
    def test_each_tensor(self):
        for name in ("odd", "falcon"):
            s = VARIANTS[name]
            for _, shape, _, source in layout(s):
                with self.subTest(source):
                    w = weights(s)
                    del w[source]
                    self.checkpoint(s, tensors=w)
                    self.bad(source, "missing")
                    w[source] = np.zeros(shape[:-1] + (shape[-1] + 1,), "f4")
                    self.checkpoint(s, tensors=w)
                    self.bad(source, export.shape_text(shape), export.shape_text(w[source].shape))
                    w[source] = np.zeros((1,) + shape, "f4")
                    self.checkpoint(s, tensors=w)
                    self.bad(source, export.shape_text(shape))

    def test_unknown_tensors(self):
        for source in ("backbone.layers.0.mixer.dt_proj.scale", "backbone.layers.2.norm.weight",
                       "backbone.layers.0.norm.bias", "backbone.layers.0.mixer.in_proj.bias",
                       "bonus.weight", "backbone.layers.0.mlp.fc1.weight"):
            self.checkpoint(VARIANTS["plain"],
                            tensors={**weights(VARIANTS["plain"]), source: np.zeros(3, "f4")})
            self.bad(source, "unknown")

    def test_other_families(self):
        s = VARIANTS["plain"]
        for kind in ("mamba2", "jamba", "bamba", "zamba", "zamba2", "falcon_h1", "nemotron_h",
                     "granitemoehybrid"):
            self.checkpoint(s, spoilt(hf_config(s), model_type=kind))
            self.bad(kind, "not supported", "config.json")
        for kind in ("llama", "vim", None, 3, ["mamba"], {}):
            self.checkpoint(s, spoilt(hf_config(s), model_type=kind))
            self.bad("model_type", "not supported")
        self.checkpoint(s, spoilt(hf_config(s), model_type=...))
        self.bad("neither model_type")
        for key, value, word in (("hidden_act", "gelu", "gelu"), ("n_experts", 4, "n_experts"),
                                 ("attn_layer_idx", [1], "attention"), ("d_intermediate", 64,
                                                                        "MLP"),
                                 ("quantization_config", {"bits": 4},
                                  "quantized"), ("bidirectional", True, "bidirectional")):
            self.checkpoint(s, spoilt(hf_config(s), **{key: value}))
            self.bad(word, "not supported")
        for key, value in (("hidden_act", "swish"), ("rms_norm", True), ("attn_layer_idx", []),
                           ("d_intermediate", 0)):
            self.checkpoint(s, spoilt(hf_config(s), **{key: value}))
            self.good()

    def test_other_families_in_the_reference_layout(self):
        s = Sizes(E=12)
        for changes, word in (({"ssm_cfg": {"layer": "Mamba2"}},
                               "Mamba2"), ({"ssm_cfg": {"layer": "Mamba3"}}, "Mamba3"),
                              ({"ssm_cfg": {"headdim": 64}}, "headdim"), ({"attn_layer_idx": [0]},
                                                                          "attention"),
                              ({"d_intermediate": 48}, "MLP"), ({"rms_norm": None}, "rms_norm"),
                              ({"ssm_cfg": []}, "ssm_cfg"), ({"ssm_cfg": {"d_state": 0}},
                                                             "d_state"), ({"ssm_cfg": {"bias": 1}},
                                                                          "bias")):
            self.checkpoint(s, reference_config(s, **changes), reference_names(weights(s)))
            self.bad(word, "config.json")

    def test_bad_fields(self):
        s = VARIANTS["plain"]
        for key in ("hidden_size", "vocab_size", "num_hidden_layers", "state_size", "conv_kernel",
                    "intermediate_size", "time_step_rank"):
            for value in (0, -1, 1.5, "4", True, [], 1 << 31, 1 << 80):
                self.checkpoint(s, spoilt(hf_config(s), **{key: value}))
                self.bad(key, "config.json")
        for key in ("use_bias", "use_conv_bias", "tie_word_embeddings"):
            for value in (0, 1, "true", None):
                self.checkpoint(s, spoilt(hf_config(s), **{key: value}))
                self.bad(key, "true or false")
        for value in (-1e-5, 1.0, "1e-5", float("nan"), float("inf"), None):
            self.checkpoint(s, spoilt(hf_config(s), layer_norm_epsilon=value))
            self.bad("layer_norm_epsilon")
        for value in (0, -2, "2", float("nan"), float("inf"), 1e-9, 1e300):
            self.checkpoint(s, spoilt(hf_config(s), expand=value, intermediate_size=...))
            self.bad("expand")
        self.checkpoint(s, spoilt(hf_config(s), num_hidden_layers=(1 << 31) - 1))
        self.bad("num_hidden_layers is 2147483647, expected a whole number from 1 to 65536")

    def test_tokenizers(self):
        s = VARIANTS["plain"]
        self.checkpoint(s)
        self.bad("--tokenizer", "tokenizer.json", "bytes", arguments=(self.src, self.bin))
        self.bad("nowhere.json", arguments=(self.src, self.bin, "--tokenizer", "nowhere.json"))
        self.checkpoint(Sizes(V=255))
        self.bad("255", "another model")


# --------------------------------------------------------------------------------------------------
# 7. Damaged input

def header_file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


class Damaged(Case):
    def spoil(self, data, *words):
        write(os.path.join(self.src, "config.json"), hf_config(VARIANTS["plain"]))
        write(os.path.join(self.src, "model.safetensors"), data)
        return self.bad("model.safetensors", *words)

    def test_hostile_headers(self):
        t = lambda **k: {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **k}}
        for data in (b"", b"\0" * 7, bytes(8), struct.pack("<Q", 1 << 63),
                     struct.pack("<Q", (1 << 64) - 1) + b"{}", b"\x89PNG\r\n\x1a\n" * 4,
                     header_file(b"{"), header_file(b"[]"), header_file(b"\xff\xfe"),
                     header_file(b"null"), header_file(b"[" * 100000), header_file(b'{"a":' * 5000),
                     header_file(t(), b"8 bytes!",
                                 length=1000), header_file(b'{"t":1' + b"0" * 5000 + b"}")):
            self.spoil(data)
        changes = [{"shape": shape} for shape in (None, [2.0], [True, 2], [-2], [1 << 62])]
        changes += [{"data_offsets": offsets}
                    for offsets in ([8], [8, 0], [-8, 0], "ab", [0, 8.0], {"a": 1, "b": 2})]
        for entry in [None, 3, [], {}, "x"] + [t(**change)["t"] for change in changes]:
            self.spoil(header_file({"t": entry}, bytes(8)), "malformed")
        self.spoil(header_file(t(), bytes(7)), "past the end")
        self.spoil(header_file(t(data_offsets=[0, 1 << 60]), bytes(8)), "past the end")
        self.spoil(header_file(t(shape=[3]), bytes(8)), "does not fill")
        self.spoil(header_file(t(shape=[1 << 40, 1 << 40]), bytes(8)), "does not fill")
        for dtype in ("F64", "I8", "f32", None, 3, []):
            self.spoil(header_file(t(dtype=dtype), bytes(8)), "can be read")
        self.spoil(header_file(t(), bytes(9)), "belong to no tensor")
        self.spoil(
            header_file({**t(), "u": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
                        bytes(8)), "overlaps")
        self.spoil(
            header_file({**t(), "u": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}},
                        bytes(16)), "gap")
        once = json.dumps(t()).encode()
        self.spoil(header_file(once[:-1] + b"," + once[1:], bytes(8)), "twice")

    def test_truncated_everywhere(self):
        whole = safetensors(weights(VARIANTS["plain"]))
        for n in list(range(0, 64)) + list(range(64, len(whole), 97)) + [len(whole) - 1]:
            self.spoil(whole[:n])
        self.spoil(whole + b"x", "belong to no tensor")

    def test_random_damage_gives_one_line(self):
        rng = random.Random(5)
        whole = safetensors(weights(Sizes(D=2, E=2, N=1, R=1, n_layer=1, V=256)))
        write(os.path.join(self.src, "config.json"),
              hf_config(Sizes(D=2, E=2, N=1, R=1, n_layer=1, V=256)))
        size = 8 + struct.unpack_from("<Q", whole)[0]
        for _ in range(400):
            spoilt_bytes = bytearray(whole)
            for _ in range(rng.randint(1, 3)):
                spoilt_bytes[rng.randrange(size)] = rng.randrange(256)
            write(os.path.join(self.src, "model.safetensors"), bytes(spoilt_bytes))
            status, text = self.run_main(self.src, self.bin, "--tokenizer", "bytes")
            self.assertIn(status, (0, 1))
            self.assertEqual(len(text.strip().splitlines()), 1, text)

    def test_files_that_are_not_there(self):
        self.bad("does not exist", arguments=(os.path.join(self.dir, "none"), self.bin))
        os.makedirs(self.src)
        self.bad("config.json", "No such file")
        write(os.path.join(self.src, "config.json"), hf_config(VARIANTS["plain"]))
        self.bad("model.safetensors", "pytorch_model.bin")
        write(os.path.join(self.src, "weights.bin"), b"x")
        self.bad("is a file", arguments=(os.path.join(self.src, "weights.bin"), self.bin))

    def test_bad_config_json(self):
        self.checkpoint(VARIANTS["plain"])
        for text in (b"", b"{", b"[]", b"\xff", b"[" * 100000, b'"mamba"'):
            write(os.path.join(self.src, "config.json"), text)
            self.bad("config.json")

    def test_damaged_model_bin(self):
        self.checkpoint(VARIANTS["odd"])
        self.good()
        whole, out, broken = open(self.bin, "rb").read(), os.path.join(self.dir,
                                                                       "out"), os.path.join(
                                                                           self.dir, "broken.bin")
        rng = random.Random(3)
        places = list(range(0, 300)) + [rng.randrange(len(whole))
                                        for _ in range(100)] + [len(whole) - 1]
        for at in places:
            write(broken, whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1:])
            self.damaged(broken, out)
        for n in (0, 5, 8, 255, 256, 270, 288, 400, len(whole) - 1):
            write(broken, whole[:n])
            self.damaged(broken, out)
        write(broken, whole + b"\0")
        self.damaged(broken, out)

    def damaged(self, path, out):
        status, text = self.run_main("--to-hf", path, out)
        self.assertEqual((status, len(text.splitlines())), (1, 1), text)
        self.assertTrue(text.startswith("export.py: ") and path in text, text)
        self.assertFalse(os.path.exists(out), text)

    def test_hostile_header_with_right_checksum(self):
        self.checkpoint(VARIANTS["odd"])
        self.good()
        whole, broken = open(self.bin, "rb").read(), os.path.join(self.dir, "broken.bin")
        for at in range(8, 128, 4):
            for value in (0, 1, 7, 0x7FFFFFFF, 0xFFFFFFFF):
                head = bytearray(whole[:252])
                struct.pack_into("<I", head, at, value)
                if bytes(head) == whole[:252]:
                    continue
                write(broken, bytes(head) + struct.pack("<I", zlib.crc32(head)) + whole[256:])
                status, text = self.run_main("--to-hf", broken, os.path.join(self.dir, "out"),
                                             "--force")
                self.assertIn(status, (0, 1))
                lines = text.strip().splitlines()
                notes = [line for line in lines if status == 0 and "export.py: note: " in line]
                self.assertEqual(len(lines) - len(notes), 1, text)


# --------------------------------------------------------------------------------------------------
# 8. Output files and memory

class Output(Case):
    def test_a_failure_leaves_the_old_file(self):
        s, w = VARIANTS["plain"], weights(VARIANTS["plain"])
        write(self.bin, b"precious")
        w["backbone.norm_f.weight"][3] = np.nan  # found when all but the last is written
        self.checkpoint(s, tensors=w)
        self.bad("backbone.norm_f.weight")
        self.assertEqual(open(self.bin, "rb").read(), b"precious")
        self.checkpoint(s)
        self.good()
        read_model(self.bin, s)

    def test_unwritable_targets(self):
        self.checkpoint(VARIANTS["plain"])
        self.bad("directory", arguments=(self.src, self.dir, "--tokenizer", "bytes"))
        target = os.path.join(self.dir, "no", "such", "model.bin")
        self.bad(target, "No such file", arguments=(self.src, target, "--tokenizer", "bytes"))
        target = os.path.join(self.src, "config.json", "model.bin")
        self.bad(target, "cannot write", arguments=(self.src, target, "--tokenizer", "bytes"))

    def test_an_input_is_no_output(self):
        s = VARIANTS["plain"]
        tokenizer, precious = os.path.join(self.dir, "t.json"), {}
        def files():
            return {n: open(os.path.join(self.src, n), "rb").read() for n in os.listdir(self.src)}
        for weights_file in ("model.safetensors", "odd.weights"):    # the second: a shard
            self.checkpoint(s)
            if weights_file != "model.safetensors":
                os.rename(os.path.join(self.src, "model.safetensors"),
                          os.path.join(self.src, weights_file))
                index = {"weight_map": dict.fromkeys(weights(s), weights_file)}
                write(os.path.join(self.src, "model.safetensors.index.json"), index)
            precious = files()
            link = os.path.join(self.dir, "link")
            for name in precious:
                os.symlink(os.path.join(self.src, name), link)
                path = os.path.join(self.src, name)
                for target in (path, os.path.join(self.src, "..", "src", name), link):
                    self.bad("that is an input", "choose another name",
                             arguments=(self.src, target, "--tokenizer", "bytes"))
                os.unlink(link)
            self.assertEqual(precious, files())
            beside = os.path.join(self.src, "model.bin")
            self.good(self.src, beside, "--tokenizer", "bytes")
            self.good(self.src, beside, "--tokenizer", "bytes")      # an old output is no input
            os.unlink(beside)
        write(tokenizer, b"{}")
        self.bad(tokenizer, "that is an input", arguments=(tokenizer, tokenizer))
        self.bad(tokenizer, "that is an input",
                 arguments=(self.src, tokenizer, "--tokenizer", tokenizer))
        self.assertEqual(open(tokenizer, "rb").read(), b"{}")
        self.bad("not empty", arguments=(self.src, "", "--tokenizer", "bytes"))
        out = os.path.join(self.dir, "out")
        os.mkdir(out)
        for name in ("model.safetensors", "config.json"):
            self.good(self.src, os.path.join(self.dir, "m.bin"), "--tokenizer", "bytes")
            source = os.path.join(out, name)
            os.rename(os.path.join(self.dir, "m.bin"), source)
            whole = open(source, "rb").read()
            self.bad(source, "that is an input", arguments=("--to-hf", source, out, "--force"))
            self.assertEqual((os.listdir(out), open(source, "rb").read()), ([name], whole))
            os.unlink(source)

    def test_link_and_mode_stay(self):
        self.checkpoint(VARIANTS["plain"])
        self.good()
        whole = open(self.bin, "rb").read()
        real, link = os.path.join(self.dir, "real"), os.path.join(self.dir, "link")
        write(real, b"old")
        os.chmod(real, 0o604)
        os.symlink("real", link)
        self.good(self.src, link, "--tokenizer", "bytes")
        self.assertTrue(os.path.islink(link))
        self.assertEqual((open(real, "rb").read(), os.stat(real).st_mode & 0o777), (whole, 0o604))
        name = os.path.join(self.dir, "n" * 250)
        self.good(self.src, name, "--tokenizer", "bytes")
        self.assertEqual(open(name, "rb").read(), whole)

    def test_killed(self):
        self.checkpoint(Sizes(V=20000))
        code = ("import os, runpy, signal, sys, zlib\n"
                f"sys.path.insert(0, os.path.dirname({EXPORT!r}))\n"
                "crc, calls = zlib.crc32, []\n"    # killed while it writes
                "def crc32(*a):\n"
                "    calls.append(0)\n"
                "    if len(calls) == 5: os.kill(os.getpid(), signal.SIGTERM)\n"
                "    return crc(*a)\n"
                "zlib.crc32 = crc32\n"
                f"runpy.run_path({EXPORT!r}, run_name='__main__')")
        command = [sys.executable, "-c", code, self.src, self.bin, "--tokenizer", "bytes"]
        result = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual((result.returncode, os.listdir(self.dir)), (143, ["src"]), result.stderr)

    # Ctrl-C reaches export.py also where the tests run in the background, which ignores it.
    INTERRUPTIBLE = dict(capture_output=True, text=True, preexec_fn=lambda: signal.signal(
        signal.SIGINT, signal.SIG_DFL))

    def test_interrupted_while_it_starts(self):
        write(os.path.join(self.dir, "numpy.py"),
              b"import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
        result = subprocess.run([sys.executable, EXPORT, "a", "b"], **self.INTERRUPTIBLE,
                                env={**os.environ, "PYTHONPATH": self.dir})
        self.assertEqual((result.returncode, result.stderr), (-2, ""))

    def test_interrupted_while_it_runs(self):
        self.checkpoint(Sizes(V=20000))
        code = ("import os, runpy, signal, sys, zlib\n"
                "crc, calls = zlib.crc32, []\n"
                "def crc32(*a):\n"
                "    calls.append(0)\n"
                "    if len(calls) == 5: os.kill(os.getpid(), signal.SIGINT)\n"
                "    return crc(*a)\n"
                "zlib.crc32 = crc32\n"
                f"runpy.run_path({EXPORT!r}, run_name='__main__')")
        command = [sys.executable, "-c", code, self.src, self.bin, "--tokenizer", "bytes"]
        result = subprocess.run(command, **self.INTERRUPTIBLE)
        self.assertEqual((result.returncode, os.listdir(self.dir), result.stderr),
                         (1, ["src"], "export.py: interrupted\n"))

    def test_disk_full(self):
        self.checkpoint(Sizes(V=20000))
        code = (
            "import resource, sys, runpy;"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000));"
            f"sys.argv[0] = {EXPORT!r}; runpy.run_path({EXPORT!r}, run_name='__main__')")
        command = [sys.executable, "-c", code, self.src, self.bin, "--tokenizer", "bytes"]
        result = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(result.returncode, 1)
        self.assertIn("cannot write " + self.bin, result.stderr)
        self.assertEqual((result.stderr.count("\n"), os.listdir(self.dir)), (1, ["src"]))

    def test_mode_follows_umask(self):
        self.checkpoint(VARIANTS["plain"])
        old = os.umask(0o027)
        try:
            self.good()
        finally:
            os.umask(old)
        self.assertEqual(os.stat(self.bin).st_mode & 0o777, 0o640)

    def test_to_hf_directory(self):
        self.checkpoint(VARIANTS["plain"])
        self.good()
        out = os.path.join(self.dir, "out")
        os.makedirs(out)
        self.good("--to-hf", self.bin, out)                                      # empty: welcome
        before = {n: open(os.path.join(out, n), "rb").read() for n in os.listdir(out)}
        self.assertEqual(sorted(before),
                         ["config.json", "generation_config.json", "model.safetensors"])
        self.bad("not empty", "--force", arguments=("--to-hf", self.bin, out))
        self.good("--to-hf", self.bin, out, "--force")
        self.assertEqual(before,
                         {n: open(os.path.join(out, n), "rb").read()
                          for n in os.listdir(out)})
        self.bad("no directory", arguments=("--to-hf", self.bin, self.bin))
        self.bad("none.bin",
                 "No such file",
                 arguments=("--to-hf", os.path.join(self.dir, "none.bin"), out + "2"))
        self.bad("no model.bin",
                 arguments=("--to-hf", os.path.join(self.src, "config.json"), out + "2"))

    def test_command_line(self):
        self.assertEqual(self.run_main("--help")[0], 0)
        for line in ("", "a", "a b c", "a b --dtype q5", "a b --nonsense", "a b --force",
                     "--to-hf a b --dtype f32"):
            self.assertEqual(self.run_main(*line.split())[0], 2)
        result = subprocess.run([sys.executable, EXPORT, "none", "out.bin"],
                                capture_output=True,
                                text=True,
                                cwd=self.dir)
        self.assertEqual((result.returncode, result.stdout, result.stderr),
                         (1, "", "export.py: none does not exist\n"))

    def test_peak_memory(self):
        s = Sizes(D=1024, E=2048, N=16, K=4, R=64, V=15000,
                  n_layer=22)  # embedding 61 MB, in all 640, a sparse file
        header, at = {}, 0
        for _, shape, _, source in layout(s):
            n = 4 * int(np.prod(shape))
            header[source], at = {"dtype": "F32", "shape": shape, "data_offsets": [at,
                                                                                   at + n]}, at + n
        self.assertGreater(at, 600e6)
        write(os.path.join(self.src, "config.json"), hf_config(s))
        write(os.path.join(self.src, "model.safetensors"), header_file(header))
        with open(os.path.join(self.src, "model.safetensors"), "r+b") as f:
            f.truncate(os.path.getsize(f.name) + at)
        back = os.path.join(self.dir, "back")
        for arguments in ([self.src, self.bin, "--tokenizer", "bytes", "--dtype",
                           "bf16"], ["--to-hf", self.bin, back]):
            peak, idle = self.peak(arguments), self.peak(["--help"])
            print(
                f"  {'back' if '--to-hf' in arguments else 'export'} of {at / 1e6:.0f} MB: "
                f"peak memory {peak / 1e6:.0f} MB, "
                f"{idle / 1e6:.0f} MB of it Python and numpy")
            self.assertLess(peak - idle, 61e6)
        read_model(self.bin, s)

    def peak(self, arguments):
        code = ("import resource, subprocess, sys;"
                "subprocess.run([sys.executable] + sys.argv[1:], check=True, capture_output=True);"
                "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
        result = subprocess.run([sys.executable, "-c", code, EXPORT] + arguments,
                                capture_output=True,
                                text=True,
                                check=True)
        return int(result.stdout) * (1 if sys.platform == "darwin" else 1024)


# --------------------------------------------------------------------------------------------------
# 9. Pickles, the hub, transformers

@contextlib.contextmanager
def module(name, value):
    """Puts a stand-in into sys.modules; None makes the import fail."""
    old = sys.modules.get(name, ...)
    sys.modules[name] = value
    try:
        yield
    finally:
        sys.modules.pop(name) if old is ... else sys.modules.__setitem__(name, old)


class Pickles(Case):
    def pickle(self, s, tensors, file="pytorch_model.bin", **options):
        import torch
        os.makedirs(self.src, exist_ok=True)
        torch.save(tensors, os.path.join(self.src, file), **options)

    def torch_weights(self, s, dtype="float32"):
        import torch
        return {
            k: torch.from_numpy(v.copy()).to(getattr(torch, dtype))
            for k, v in reference_names(weights(s)).items()
        }

    def test_torch_missing_or_old(self):
        s = Sizes(E=12)
        write(os.path.join(self.src, "config.json"), reference_config(s))
        write(os.path.join(self.src, "pytorch_model.bin"), b"never opened")
        with module("torch", None):
            self.bad("torch", "pip install", "pytorch_model.bin")
        for version in ("2.5.1+cu124", "1.13.1", "0.4", "strange"):
            with module("torch", types.SimpleNamespace(__version__=version)):
                self.bad("2.6", version)

    @have("torch")
    def test_reference_release(self):
        self.small_chunks()
        for s, dtype, code in ((Sizes(E=12), "float32", 0), (Sizes(E=15, tied=False), "float32", 0),
                               (Sizes(E=12), "bfloat16", 2), (Sizes(E=12), "float16", 1)):
            for options in ({}, {"_use_new_zipfile_serialization": False}):
                t = self.torch_weights(s, dtype)
                if s.tied:
                    t["lm_head.weight"] = t[
                        "backbone.embedding.weight"]  # shared storage, as mamba-ssm saves it
                self.pickle(s, t, **options)
                write(os.path.join(self.src, "config.json"), reference_config(s))
                self.good()
                h, _, tensors = read_model(self.bin, s)
                self.assertEqual(h["dtype"], code)
                for name, _, is_w, source in layout(s):
                    a = t[source.replace("embeddings.", "embedding.")].float().numpy()
                    self.assertEqual(tensors[name],
                                     raw(a, ("F32", "F16", "BF16")[code] if is_w else "F32"), name)

    @have("torch")
    def test_shards(self):
        s, files = Sizes(E=12), ("pytorch_model-00001-of-00002.bin",
                                 "pytorch_model-00002-of-00002.bin")
        t = self.torch_weights(s)
        parts = [dict(list(t.items())[i::2]) for i in range(2)]
        for file, part in zip(files, parts):
            self.pickle(s, part, file)
        weight_map = {name: file for file, part in zip(files, parts) for name in part}
        write(os.path.join(self.src, "pytorch_model.bin.index.json"), {"weight_map": weight_map})
        write(os.path.join(self.src, "config.json"), reference_config(s))
        self.good()
        self.assertEqual(
            read_model(self.bin, s)[2]["norm_f"],
            weights(s)["backbone.norm_f.weight"].tobytes())

    @have("torch")
    def test_hostile_pickles(self):
        import torch
        s, flag = Sizes(E=12), os.path.join(self.dir, "ran")

        class Evil:
            def __reduce__(self):
                return open, (flag, "w")

        write(os.path.join(self.src, "config.json"), reference_config(s))
        zeros = torch.zeros(2)
        for value in (Evil(), {"a": Evil()}, {"a": 3}, [zeros], {"a": zeros.to_sparse()},
                      {"a": zeros.to(torch.int8)}, {"a": zeros.to("meta")}):
            self.pickle(s, value)
            self.bad("pytorch_model.bin")
        whole = open(os.path.join(self.src, "pytorch_model.bin"), "rb").read()
        for data in (b"", b"garbage", whole[:len(whole) // 2]):
            write(os.path.join(self.src, "pytorch_model.bin"), data)
            self.bad("pytorch_model.bin")
        self.assertFalse(os.path.exists(flag))


class Hub(Case):
    def test_missing_client(self):
        with module("huggingface_hub", None):
            self.bad("org/name", "huggingface_hub", "by hand", arguments=("org/name", self.bin))

    def test_download(self):
        self.checkpoint(VARIANTS["plain"])
        asked = []

        def snapshot_download(name, allow_patterns):
            asked.append((name, allow_patterns))
            return self.src

        with module("huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download)):
            self.good("org/name", self.bin, "--tokenizer", "bytes")
            self.assertEqual([name for name, _ in asked], ["org/name"])
            os.unlink(os.path.join(self.src, "model.safetensors"))
            self.bad("no model.safetensors",
                     arguments=("org/name", self.bin, "--tokenizer", "bytes"))
            self.assertIn("pytorch_model.bin.index.json", asked[-1][1])

    def test_failure(self):
        def snapshot_download(name, allow_patterns):
            raise RuntimeError("404 not found\nsecond line")

        with module("huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download)):
            self.bad("404 not found", arguments=("org/name", self.bin))
        self.bad("does not exist", arguments=("../name", self.bin))


class Transformers(Case):
    @have("torch", "transformers")
    def test_same_logits(self):
        import torch
        import transformers
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        ids = torch.tensor([[1, 2, 200, 3, 250, 3, 3, 7, 0, 99]])
        for name, s in VARIANTS.items():
            for dtype in ("f32", "bf16"):
                with self.subTest(name, dtype=dtype), torch.no_grad():
                    family = "FalconMamba" if s.falcon else "Mamba"
                    kind = getattr(transformers, family + "ForCausalLM")
                    self.checkpoint(s)
                    self.good(self.src, self.bin, "--tokenizer", "bytes", "--dtype", dtype)
                    back = os.path.join(self.dir, "back-" + name + dtype)
                    self.good("--to-hf", self.bin, back)
                    nets = [
                        kind.from_pretrained(d, dtype=torch.float32, output_loading_info=True)
                        for d in (self.src, back)
                    ]
                    for net, info in nets:
                        self.assertFalse(
                            info["missing_keys"] or info["unexpected_keys"]
                            or info["mismatched_keys"], info)
                    a, b = (net.eval()(ids).logits for net, _ in nets)
                    if dtype == "f32":
                        self.assertTrue(torch.equal(a, b))
                    else:
                        self.assertLess((a - b).abs().max().item(), 0.1 * a.abs().max().item())
                    config = transformers.AutoConfig.from_pretrained(back)
                    self.assertEqual(
                        (config.intermediate_size, config.eos_token_id, type(nets[1][0])),
                        (s.E, 2, kind))


# --------------------------------------------------------------------------------------------------
# 10. The runner

class Result(unittest.TextTestResult):
    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


def main(module=sys.modules[__name__]):
    words = [w for i, w in enumerate(sys.argv) if i and sys.argv[i - 1] == "-k"]
    loader = unittest.TestLoader()
    loader.testNamePatterns = [f"*{w}*" for w in words] or None
    suite = loader.loadTestsFromModule(module)
    runner = unittest.TextTestRunner(stream=sys.stdout,
                                     resultclass=Result,
                                     verbosity=2 if "-v" in sys.argv else 1)
    result = runner.run(suite)
    for test, why in result.skipped:
        print(f"skipped {test.id()}: {why}")
    failed = len({test.id().split(" ")[0] for test, _ in result.failures + result.errors})
    print(f"{result.passed} passed, {failed} failed, {len(result.skipped)} skipped")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
