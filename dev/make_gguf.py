"""Random weights of a Mamba shape as a GGUF file, to time llama.cpp on: python dev/make_gguf.py 130m bf16 OUT.gguf
The matrices that mamba.c stores in a type are in that type here too (f32 f16 bf16, q8 = Q8_0, q4 = Q4_0); one whose rows are no multiple
of 32 long stays F16 in the latter two. There is no vocabulary, only its size."""
import struct
import sys

import numpy as np

SHAPES = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}
TYPES = {"f32": 0, "f16": 1, "q4": 2, "q8": 8, "bf16": 30}  # ggml's numbers
ALIGN = 32
rng = np.random.default_rng(42)


def data_of(rows, cols, dtype, scale=0.02):
    """The bytes of a random (rows, cols) matrix."""
    n = rows * cols
    if dtype in ("q8", "q4"):  # blocks of 32: an f16 scale, then int8 or nibbles around 8
        blocks = np.empty((n // 32, 34 if dtype == "q8" else 18), np.uint8)
        blocks[:, :2] = np.frombuffer(np.float16(scale / (73 if dtype == "q8" else 4.6)).tobytes(), np.uint8)
        blocks[:, 2:] = rng.integers(0, 256, blocks[:, 2:].shape, np.uint8)
        return blocks.tobytes()
    x = rng.standard_normal(n, np.float32) * np.float32(scale)
    if dtype == "bf16":
        return (x.view(np.uint32) >> 16).astype("<u2").tobytes()
    return x.astype("<f2" if dtype == "f16" else "<f4").tobytes()


def tensors(D, n_layer, V, N=16, K=4):
    """(name, rows, cols or 0 for a vector, kind) in order; kind: matrix, vector, or the value of every element."""
    E, R = 2 * D, -(-D // 16)
    yield "token_embd.weight", V, D, "matrix"
    yield "output_norm.weight", D, 0, 1.0
    for i in range(n_layer):
        b = f"blk.{i}."
        yield b + "attn_norm.weight", D, 0, 1.0
        yield b + "ssm_in.weight", 2 * E, D, "matrix"
        yield b + "ssm_conv1d.weight", E, K, "vector"
        yield b + "ssm_conv1d.bias", E, 0, "vector"
        yield b + "ssm_x.weight", R + 2 * N, E, "matrix"
        yield b + "ssm_dt.weight", E, R, "matrix"
        yield b + "ssm_dt.bias", E, 0, -4.6  # softplus: a step of 0.01
        yield b + "ssm_a", E, N, -1.0
        yield b + "ssm_d", E, 0, 1.0
        yield b + "ssm_out.weight", D, E, "matrix"


def main(shape, dtype, path, V=50280):
    D, n_layer = SHAPES[shape]
    text = lambda s: struct.pack("<Q", len(s)) + s.encode()
    number = lambda key, value: text("mamba." + key) + struct.pack("<II", 4, value)
    meta = [text("general.architecture") + struct.pack("<I", 8) + text("mamba"),
            text("tokenizer.ggml.model") + struct.pack("<I", 8) + text("none"),
            text("mamba.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5)]
    for key, value in (("vocab_size", V), ("context_length", 1 << 20), ("embedding_length", D), ("feed_forward_length", 0),
                       ("attention.head_count", 0), ("block_count", n_layer), ("ssm.conv_kernel", 4), ("ssm.inner_size", 2 * D),
                       ("ssm.state_size", 16), ("ssm.time_step_rank", -(-D // 16))):
        meta.append(number(key, value))
    infos, offset, made = b"", 0, []
    for name, rows, cols, kind in tensors(D, n_layer, V):
        stored = dtype if kind == "matrix" else "f32"
        if stored in ("q8", "q4") and cols % 32:
            stored = "f16"
        n = rows * max(cols, 1)
        size = {"f32": 4 * n, "f16": 2 * n, "bf16": 2 * n, "q8": n // 32 * 34, "q4": n // 32 * 18}[stored]
        dims = (cols, rows) if cols else (rows,)
        infos += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, TYPES[stored], offset)
        made.append((rows, cols, kind, stored, size))
        offset += -(-size // ALIGN) * ALIGN
    head = b"GGUF" + struct.pack("<IQQ", 3, len(made), len(meta)) + b"".join(meta) + infos
    with open(path, "wb") as f:
        f.write(head + bytes(-len(head) % ALIGN))
        for rows, cols, kind, stored, size in made:
            if isinstance(kind, float):
                data = np.full(rows * max(cols, 1), kind, "<f4").tobytes()
            else:
                data = data_of(rows, max(cols, 1), stored)
            assert len(data) == size
            f.write(data + bytes(-size % ALIGN))


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in SHAPES or sys.argv[2] not in TYPES:
        sys.exit(__doc__)
    main(*sys.argv[1:])
