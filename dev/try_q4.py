#!/usr/bin/env python3
"""try_q4.py: ways to make q4 lose less, tried in NumPy on a small Mamba without biases on its projections.

  python dev/try_q4.py models/tales.bin KNOWN.txt UNKNOWN.txt CALIBRATION.txt

Each way rounds the matrices and writes their values as float32; ./mamba eval scores both texts. A line: the way, bits a
weight over all matrices, mean negative log-likelihood of the text that the model knows, and of the other. Error feedback
is GPTQ's (Frantar et al. 2022): inputs are rounded one after the other, and what each loses is made up by the inputs that
follow, weighed by the second moments of the activations on the calibration text. doc/RESULTS.md has what came out.
"""
import os
import struct
import subprocess
import sys
import tempfile

import numpy as np

MAMBA = "./mamba"
if len(sys.argv) != 5:
    sys.exit(__doc__)
MODEL, KNOWN, UNKNOWN, CALIBRATION = sys.argv[1:]
folder = tempfile.TemporaryDirectory()
path = os.path.join(folder.name, "f32.bin")
subprocess.run([MAMBA, "train", "-o", path, "--from", MODEL, "--data", KNOWN, "--steps", "1", "--lr", "0", "--min-lr", "0",
                "--batch", "1", "--length", "8"], check=True, stderr=subprocess.DEVNULL)
ids_text = subprocess.run([MAMBA, "tokenize", MODEL, CALIBRATION], check=True, capture_output=True, text=True).stdout
IDS = np.array(ids_text.split(), dtype=int)[:6000]

# ---------------------------------------------------------------------------------------------------------------------
# The model: where each tensor lies in the file, and its numbers.

RAW = bytearray(open(path, "rb").read())
D, LAYERS, V, E, N, K, R = struct.unpack_from("<7I", RAW, 28)
PLACES, at = {}, struct.unpack_from("<Q", RAW, 104)[0]
shapes = [("embedding", (V, D))]
for i in range(LAYERS):
    shapes += [(f"{i}.{name}", shape) for name, shape in
               (("norm", (D,)), ("in_proj", (2 * E, D)), ("conv", (E, K)), ("conv_bias", (E,)), ("x_proj", (R + 2 * N, E)),
                ("dt_proj", (E, R)), ("dt_bias", (E,)), ("A_log", (E, N)), ("D_skip", (E,)), ("out_proj", (D, E)))]
for name, shape in shapes + [("norm_f", (D,))]:
    at = (at + 63) // 64 * 64
    PLACES[name] = at, shape
    at += 4 * int(np.prod(shape))
assert at == len(RAW), "the script knows tied models with a convolution bias and without projection biases only"
W = {name: np.frombuffer(RAW, "<f4", int(np.prod(shape)), start).reshape(shape).copy()
     for name, (start, shape) in PLACES.items()}
MATRICES = ["embedding"] + [f"{i}.{n}" for i in range(LAYERS) for n in ("in_proj", "x_proj", "dt_proj", "out_proj")]

# ---------------------------------------------------------------------------------------------------------------------
# Rounding


def bf16(x):
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def codes(w, scale, bits):
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    return np.clip(np.rint(w / np.where(scale == 0, 1, scale)), low, high) * scale


def scales(w, weight, bits):
    """One scale a row, as files/quantizer.h finds it; weight: of the inputs' squared errors."""
    peak = np.take_along_axis(w, np.abs(w).argmax(1)[:, None], 1)[:, 0]
    divisors = [127] if bits == 8 else [sign * quarters / 4 for quarters in range(24, 35) for sign in (-1, 1)]
    best, scale = np.full(len(w), np.inf), np.zeros(len(w), np.float32)
    for divisor in divisors:
        tried = bf16(peak / np.float32(divisor))
        error = ((w - codes(w, tried[:, None], bits))**2 * weight).sum(1)
        scale[error < best] = tried[error < best]
        best = np.minimum(best, error)
    return scale


TABLES = {"NF4": [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105, 0, 0.0795803, 0.1609302, 0.2461123,
                  0.3379152, 0.4407098, 0.562617, 0.7229568, 1],
          "IQ4_NL": [n / 127 for n in (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)]}


def eight_bits(x):
    """A scale of 5 bits of exponent and 3 of mantissa."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 16) / 16, exponent).astype(np.float32)


def searched(w, group=32, divisors=(), refits=0, table=None, store=bf16):
    """Of all divisors of the largest weight the best one, each followed by refits by least squares."""
    out = np.empty_like(w)
    table = None if table is None else np.array(table)

    def values(part, scale):
        if table is None:
            return codes(part, scale, 4)
        scale = np.where(scale == 0, 1e-30, scale)
        return table[np.searchsorted((table[1:] + table[:-1]) / 2, part / scale)] * scale

    for k in range(0, w.shape[1], group):
        part = w[:, k:k + group]
        peak = np.take_along_axis(part, np.abs(part).argmax(1)[:, None], 1)
        best = np.full(len(part), np.inf)
        for divisor in divisors:
            scale = store(peak / np.float32(divisor))
            for refit in range(refits + 1):
                tried = values(part, scale)
                error = ((part - tried).astype("f8")**2).sum(1)
                better = error < best
                out[better, k:k + group], best = tried[better], np.minimum(best, error)
                code = tried / np.where(scale == 0, 1, scale)
                squares = (code**2).sum(1, keepdims=True)
                scale = store(((part * code).sum(1, keepdims=True) / np.where(squares == 0, 1, squares)).astype(np.float32))
    return out


def rounded(w, bits, group=32, weight=None):
    out = np.empty_like(w)
    for k in range(0, w.shape[1], group):
        part = w[:, k:k + group]
        out[:, k:k + group] = codes(part, scales(part, 1 if weight is None else weight[k:k + group], bits)[:, None], bits)
    return out


def fed_back(w, H, group=32, damping=0.01):
    w, n, out = w.astype(np.float64), w.shape[1], np.empty(w.shape)
    H = H + np.eye(n) * damping * np.mean(np.diag(H))
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    for k in range(n):
        if k % group == 0:
            scale = scales(w[:, k:k + group].astype(np.float32), np.diag(H)[k:k + group], 4)
        out[:, k] = codes(w[:, k], scale, 4)
        w[:, k + 1:] -= np.outer((w[:, k] - out[:, k]) / U[k, k], U[k, k + 1:])
    return out.astype(np.float32)


def second_moments():
    """{matrix: mean over the calibration text of x^T x of its inputs x}"""
    H, L, res = {}, len(IDS), W["embedding"][IDS]
    silu = lambda x: x / (1 + np.exp(-x))
    norm = lambda x, weight: x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * weight
    for i in range(LAYERS):
        w = {name[len(f"{i}."):]: v for name, v in W.items() if name.startswith(f"{i}.")}
        xn = norm(res, w["norm"])
        x, z = np.split(xn @ w["in_proj"].T, 2, 1)
        padded = np.vstack([np.zeros((K - 1, E), np.float32), x])
        u = silu(sum(padded[k:k + L] * w["conv"][:, k] for k in range(K)) + w["conv_bias"])
        dt_low, B, C = np.split(u @ w["x_proj"].T, [R, R + N], 1)
        delta, A_neg = np.logaddexp(0, dt_low @ w["dt_proj"].T + w["dt_bias"]), -np.exp(w["A_log"])
        h, y = np.zeros((E, N), np.float32), np.empty((L, E), np.float32)
        for t in range(L):
            h = np.exp(delta[t][:, None] * A_neg) * h + (delta[t] * u[t])[:, None] * B[t]
            y[t] = h @ C[t]
        g = (y + w["D_skip"] * u) * silu(z)
        for name, inputs in (("in_proj", xn), ("x_proj", u), ("dt_proj", dt_low), ("out_proj", g)):
            H[f"{i}.{name}"] = inputs.T.astype(np.float64) @ inputs / L
        res = res + g @ w["out_proj"].T
    xn = norm(res, W["norm_f"])
    H["embedding"] = xn.T.astype(np.float64) @ xn / L
    return H


# ---------------------------------------------------------------------------------------------------------------------
# The tries

def score(label, way):
    """way(matrix) gives its rounded numbers and their bits a weight."""
    made = {name: way(name) for name in MATRICES}
    file, losses = bytearray(RAW), []
    for name, (values, _) in made.items():
        start = PLACES[name][0]
        file[start:start + 4 * values.size] = values.astype("<f4").tobytes()
    with open(path, "wb") as f:
        f.write(file)
    for text in (KNOWN, UNKNOWN):
        out = subprocess.run([MAMBA, "eval", path, text], check=True, capture_output=True, text=True).stdout
        losses.append(float(out.split("mean_nll")[1].split()[0]))
    bits = sum(W[name].size * b for name, (_, b) in made.items()) / sum(W[name].size for name in MATRICES)
    print(f"{label:44s} {bits:5.2f}  {losses[0]:.4f}  {losses[1]:.4f}", flush=True)


kind = lambda name: name.split(".")[-1]
q8 = lambda name: (rounded(W[name], 8), 8.5)
q4 = lambda name: (rounded(W[name], 4), 4.5)
H = second_moments()
feedback = lambda name: (fed_back(W[name], H[name]), 4.5)
small = ("x_proj", "dt_proj")


def mixed(name, by_input):
    """An eighth of the inputs, or of the rows, in q8: those whose rounding costs most."""
    values, exact = q4(name)[0], rounded(W[name], 8)
    off = W[name] - values
    cost = (off**2).sum(0) * np.diag(H[name]) if by_input else ((off @ H[name]) * off).sum(1)
    chosen = np.argsort(-cost)[:len(cost) // 8]
    if by_input:
        values[:, chosen] = exact[:, chosen]
    else:
        values[chosen] = exact[chosen]
    return values, 5.0


score("float32", lambda name: (W[name], 32))
score("q8", q8)
score("q4", q4)
for part in ("embedding", "in_proj", "x_proj", "dt_proj", "out_proj"):
    score(f"q4, {part} in q8", lambda name: q8(name) if kind(name) == part else q4(name))
score("q4, x_proj and dt_proj in q8", lambda name: q8(name) if kind(name) in small else q4(name))
for part in ("in_proj", "out_proj"):
    for i in range(LAYERS):
        score(f"q4, {part} of layer {i} in q8", lambda name: q8(name) if name == f"{i}.{part}" else q4(name))
both = lambda numbers: [sign * n for n in numbers for sign in (1, -1)]
quarters, fine = both(np.arange(6, 8.6, 0.25)), both(np.arange(5, 10, 1 / 16))
tries = {"divisors in steps of 1/16": {"divisors": fine}, "scales refitted twice": {"divisors": quarters, "refits": 2},
         "a scale of 8 bits for 16 weights": {"divisors": quarters, "group": 16, "store": eight_bits},
         **{f"codes of {name}": {"divisors": both(np.arange(0.7, 1.3, 0.04)), "table": table} for name, table in TABLES.items()}}
for label, how in tries.items():
    score(f"q4, {label}", lambda name: (searched(W[name], **how).astype(np.float32), 4.5))
score("q4, an eighth of the inputs in q8", lambda name: mixed(name, True))
score("q4, an eighth of the rows in q8", lambda name: mixed(name, False))
score("q4, two scales a group", lambda name: (rounded(W[name], 4, 16), 5.0))
score("q4, scales fitted to activations", lambda name: (rounded(W[name], 4, 32, np.diag(H[name])), 4.5))
score("error feedback", feedback)
score("error feedback, damping 0.1", lambda name: (fed_back(W[name], H[name], 32, 0.1), 4.5))
score("error feedback, not for the embedding", lambda name: q4(name) if name == "embedding" else feedback(name))
score("error feedback, x_proj and dt_proj in q8", lambda name: q8(name) if kind(name) in small else feedback(name))
score("error feedback, two scales a group", lambda name: (fed_back(W[name], H[name], 16), 5.0))
