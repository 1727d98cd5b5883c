#!/usr/bin/env python3
"""make_golden.py: tiny fixed models and what transformers computes for them, for test_all.c to be measured against.

  python dev/make_golden.py --out tests [--tales DIRECTORY] [--hf DIRECTORY]     the goldens of this project
  python dev/make_golden.py --random 20 --out DIRECTORY [--seed 1]              many shapes, for a wide test

Needs: pip install torch transformers (torch 2.11 with transformers 5.17 made the committed files; 4.57 agrees to 3e-7).

For each model: a transformers checkpoint (NAME in --hf), NAME.bin made of it by export.py (float32), and NAME.gold:
ids, logits at every position, loss, the stages of the layers, the states after the last token, and, for the small
models, the gradient of the loss for every parameter. Weights come from numpy's PCG64 with the seed below.

Activations and logits are transformers' own, in float32 on the CPU by its plain PyTorch path, read off with hooks.
A second implementation, 40 lines below in float64, checks each of them, and gives the gradients (transformers rounds
to float32 inside, whatever the model's type is); transformers' float32 gradients check those in turn.

Records in NAME.gold (L tokens; names of stages as in mamba.c's glossary):
  ids (L) | logits (L,V) | loss (1): mean of -log p(ids[t+1]) over t = 0 .. L-2
  layerI.xn (L,D) norm's output | .xz (L,2E) in_proj's output [x | z] | .u (L,E) silu(conv(x)) | .dt_BC (L,R+2N) x_proj's
  output [dt_low | B | C], before any mixer norm | .dt (L,E) dt_proj's output, bias included, before softplus |
  .g (L,E) (scan + D_skip u) silu(z), the input of out_proj | .out (L,D) out_proj's output, bias included |
  .res (L,D) the residual after the layer | .conv_window (E,K) the last K inputs x of the conv, oldest first, zeros
  before the start | .h (E,N) the SSM state after the last token
  xn_f (L,D) the final norm's output | grad.NAME the gradient of loss, NAME and shape as in model.bin (conv is (E,K))
tales has layers 0 and 5 only, their stages for the first 12 tokens only (its logits and states are of all 64), no
gradients, and its matrices are rounded to bfloat16 first: it goes with the file that export.py --dtype bf16 makes.
"""
import argparse
import os
import shutil
import struct
import sys
import tempfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
import transformers

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import export

TEXT = ("Once upon a time there was a little girl who lived near the sea. Every morning she walked along the sand and "
        "looked for shells. One day she found a small blue bottle with a letter inside. \"Mother!\" she cried, \"come and "
        "see what the water brought us.\" They sat down together.")

# ---------------------------------------------------------------------------------------------------------------------
# The second implementation: one sequence, float64, in the paper's order. p maps model.bin's tensor names to tensors.

def rms(x, eps):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)


def norm(x, weight, bias, eps):
    """RMSNorm, or with a bias LayerNorm."""
    if bias is None:
        return rms(x, eps) * weight
    x = x - x.mean(-1, keepdim=True)
    return rms(x, eps) * weight + bias


def forward64(m, p, ids, start=None):
    """logits (L,V), and the stages by their names in the golden file. start: for each layer the last K - 1 inputs of the
    convolution (K-1,E) and the state h (E,N) that the text before has left; without it there was none."""
    s, (E, N, K, R) = {}, (m.E, m.N, m.K, m.R)
    res = p["embedding"][ids]
    for i in range(m.n_layer):
        w = lambda name: p.get(f"layer{i}.{name}")
        xn = norm(res, w("norm"), w("norm_bias"), m.norm_eps)
        xz = F.linear(xn, w("in_proj"), w("in_bias"))
        x, z = xz.split(E, -1)
        window, h = start[i] if start else (x.new_zeros(K - 1, E), x.new_zeros(E, N))
        padded = torch.cat([x.new_zeros(1, E), window, x])                            # row t + K is x[t]
        u = sum(padded[k + 1:k + 1 + len(ids)] * w("conv")[:, k] for k in range(K))
        u = F.silu(u if w("conv_bias") is None else u + w("conv_bias"))
        dt_BC = F.linear(u, w("x_proj"))
        dt_low, B, C = dt_BC.split([R, N, N], -1)
        if m.mixer_norm:
            dt_low, B, C = (rms(v, m.mixer_eps) for v in (dt_low, B, C))
        dt = F.linear(dt_low, w("dt_proj"), w("dt_bias"))
        delta, A_neg, y = F.softplus(dt), -torch.exp(w("A_log")), []
        for t in range(len(ids)):                                                     # h = decay h + delta B u
            h = torch.exp(delta[t][:, None] * A_neg) * h + (delta[t] * u[t])[:, None] * B[t]
            y.append(h @ C[t])
        g = (torch.stack(y) + w("D_skip") * u) * F.silu(z)
        out = F.linear(g, w("out_proj"), w("out_bias"))
        res = res + out
        stages = dict(xn=xn, xz=xz, u=u, dt_BC=dt_BC, dt=dt, g=g, out=out, res=res, conv_window=padded[-K:].T, h=h)
        s.update({f"layer{i}.{name}": v for name, v in stages.items()})
    s["xn_f"] = norm(res, p["norm_f"], p.get("norm_f_bias"), m.norm_eps)
    s["logits"] = F.linear(s["xn_f"], p["embedding"] if m.tied else p["head"])
    s["loss"] = F.cross_entropy(s["logits"][:-1], ids[1:]).reshape(1) if len(ids) > 1 else res.new_zeros(1)
    return s


# ---------------------------------------------------------------------------------------------------------------------
# transformers, watched. Version 4 calls dt_proj as a module, so a hook sees dt; version 5 multiplies by dt_proj.weight
# itself, but dt is what it hands to softplus, (1,E,L), once a layer.

def parameters(m, net):
    """transformers' parameters under model.bin's names."""
    by_source = dict(net.named_parameters())
    found = {t.name: by_source[export.with_backbone(t.source)] for t in export.tensor_list(m)}
    for name, source in norm_biases(m).items():
        found[name] = by_source[source]
    return found


def norm_biases(m):
    """{name in model.bin: name in the network} of a LayerNorm model."""
    if not getattr(m, "layer_norm", False):
        return {}
    return {**{f"layer{i}.norm_bias": f"backbone.layers.{i}.norm.bias" for i in range(m.n_layer)},
            "norm_f_bias": "backbone.norm_f.bias"}


def watch(net, ids):
    """The same dict as forward64 gives, from transformers."""
    s, softplus_inputs, softplus = {}, [], F.softplus

    def keep(name):
        def hook(module, inputs, output=None):
            s[name] = (inputs[0] if output is None else output)[0]
        return hook

    hooks = [net.backbone.norm_f.register_forward_hook(keep("xn_f"))]
    for i, layer in enumerate(net.backbone.layers):
        mixer = layer.mixer
        hooks += [part.register_forward_pre_hook(keep(f"layer{i}.{name}")) for part, name in
                  ((mixer.x_proj, "u"), (mixer.out_proj, "g"))]
        hooks += [part.register_forward_hook(keep(f"layer{i}.{name}")) for part, name in
                  ((layer.norm, "xn"), (mixer.in_proj, "xz"), (mixer.x_proj, "dt_BC"), (mixer.dt_proj, "dt"),
                   (mixer.out_proj, "out"), (layer, "res"))]

    def spy(x, *rest, **named):
        softplus_inputs.append(x)
        return softplus(x, *rest, **named)

    F.softplus = spy
    try:
        result = net(input_ids=ids[None], use_cache=True)
    finally:
        F.softplus = softplus
        for hook in hooks:
            hook.remove()
    assert len(softplus_inputs) == len(net.backbone.layers), "transformers took another path than the plain one"
    for i, dt in enumerate(softplus_inputs):
        s.setdefault(f"layer{i}.dt", dt[0].T)
        s[f"layer{i}.conv_window"], s[f"layer{i}.h"] = (state[0] for state in cached(result.cache_params, i))
    s["logits"] = result.logits[0]
    s["loss"] = F.cross_entropy(s["logits"][:-1], ids[1:]).reshape(1) if len(ids) > 1 else torch.zeros(1)
    return s


def cached(cache, i):
    """conv (1,E,K) and SSM (1,E,N) state of layer i, of transformers 5 or 4."""
    if hasattr(cache, "layers"):
        return cache.layers[i].conv_states[0], cache.layers[i].recurrent_states[0]
    return cache.conv_states[i], cache.ssm_states[i]


def worst(got, want):
    """Largest difference as a share of the largest magnitude; names the record too."""
    shares = []
    for name in want:
        a, b = got[name].detach().double(), want[name].detach().double()
        assert a.shape == b.shape, f"{name}: {tuple(a.shape)} and {tuple(b.shape)}"
        shares.append(((a - b).abs().max().item() / max(b.abs().max().item(), 1e-30), name))
    return max(shares)


def compute(m, net, ids, gradients):
    """The records of the golden file, checked."""
    ids = torch.tensor(ids)
    s = watch(net, ids)
    p = {name: v.detach().double().reshape(-1, m.K) if name.endswith(".conv") else v.detach().double()
         for name, v in parameters(m, net).items()}
    for v in p.values():
        v.requires_grad_(gradients)
    check = forward64(m, p, ids)
    error, name = worst(s, {k: v for k, v in check.items() if k != "loss" or len(ids) > 1})
    print(f"  forward: float32 differs from float64 by at most {error:.1e} of the largest value ({name})")
    assert error < 2e-4, "transformers and the float64 check disagree"
    records = {"ids": ids, **s}
    if gradients:
        check["loss"].backward()
        s["loss"].backward()
        exact = {f"grad.{name}": v.grad for name, v in p.items()}
        rough = {f"grad.{name}": v.grad.reshape(p[name].shape) for name, v in parameters(m, net).items()}
        error, name = worst(rough, exact)
        print(f"  backward: float32 differs from float64 by at most {error:.1e} of the largest value ({name})")
        assert error < 1e-3, "transformers' gradients and the float64 ones disagree"
        records.update(exact)
    return {name: v.detach() for name, v in records.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Making models. Magnitudes as in trained ones: delta spread over two decades, states that live for long and for short,
# logits some units apart. Nothing is left at a value (0, 1) that would hide its absence.

def draw(rng, name, shape, m):
    normal = lambda std, mean=0.0: mean + std * rng.standard_normal(shape)
    part = name.split(".")[-1]
    if part == "A_log":
        return np.log(np.arange(1, m.N + 1)) + normal(0.3)
    if part == "dt_bias":
        delta = np.exp(rng.uniform(np.log(0.003), np.log(0.5), shape))
        return delta + np.log(-np.expm1(-delta))                                     # the inverse of softplus
    return {"embedding": lambda: normal(0.4), "head": lambda: normal(1.5 / m.D ** 0.5), "norm": lambda: normal(0.2, 1.0),
            "norm_f": lambda: normal(0.2, 1.0), "norm_bias": lambda: normal(0.3), "norm_f_bias": lambda: normal(0.3),
            "in_proj": lambda: normal(m.D ** -0.5), "in_bias": lambda: normal(0.2),
            "conv": lambda: normal(m.K ** -0.5), "conv_bias": lambda: normal(0.2), "x_proj": lambda: normal(1.5 * m.E ** -0.5),
            "dt_proj": lambda: normal(m.R ** -0.5), "D_skip": lambda: normal(0.5, 1.0),
            "out_proj": lambda: normal(0.8 * m.E ** -0.5), "out_bias": lambda: normal(0.2)}[part]()


def make_net(m, seed):
    """A transformers model of the sizes in m with drawn weights."""
    config, _ = export.config_json(m, "f32")
    for key in ("architectures", "model_type", "torch_dtype", "dtype"):
        config.pop(key)
    kind = ("Mamba", "FalconMamba")[m.arch == "falcon_mamba"]
    net = getattr(transformers, kind + "ForCausalLM")(getattr(transformers, kind + "Config")(**config)).float().eval()
    rng = np.random.Generator(np.random.PCG64(seed))
    if norm_biases(m):                                         # the reference's models of rms_norm: false
        for layer in net.backbone.layers:
            layer.norm = torch.nn.LayerNorm(m.D, eps=m.norm_eps)
        net.backbone.norm_f = torch.nn.LayerNorm(m.D, eps=m.norm_eps)
    with torch.no_grad():
        for name, v in parameters(m, net).items():
            v.copy_(torch.from_numpy(draw(rng, name, tuple(v.shape), m)))
        if norm_biases(m):
            net.backbone.embeddings.weight += 0.5              # a mean that the norms have to take away
    return net, rng


def sizes(falcon=False, **changes):
    m = export.Model(arch="falcon_mamba" if falcon else "mamba", D=32, n_layer=2, V=256, E=64, N=16, K=4, R=2, norm_eps=1e-5,
                     mixer_eps=1e-6 if falcon else 0.0, tied=True, proj_bias=False, conv_bias=True, mixer_norm=falcon,
                     bos=0, pad=0, eos=[0])
    return m._replace(**changes)


class LayerNormSizes(export.Model):
    layer_norm = True


FIXED = {"odd": (1, sizes(D=35, E=51, N=5, K=3, R=3, V=259, n_layer=3, tied=False, proj_bias=True, norm_eps=3e-5, bos=-1,
                          pad=-1, eos=[3, 255])),
         "falcon": (2, sizes(True, D=24, E=48, N=8, K=4, R=2, V=263, tied=False, mixer_eps=1e-4, bos=1, eos=[11], pad=11)),
         "plain": (3, sizes(conv_bias=False)),
         "layernorm": (4, LayerNormSizes(*sizes(D=29, E=58, N=6, K=4, R=3, V=260, tied=False, bos=-1, pad=-1, eos=[7])))}


def random_sizes(rng):
    falcon, r = bool(rng.integers(2)), lambda low, high: int(rng.integers(low, high + 1))
    return sizes(falcon, D=r(1, 64), E=r(1, 96), N=r(1, 33), K=r(1, 6), R=r(1, 12), V=r(256, 330), n_layer=r(1, 4),
                 tied=bool(r(0, 1)), proj_bias=bool(r(0, 1)), conv_bias=bool(r(0, 1)), norm_eps=[1e-5, 1e-6, 3e-3][r(0, 2)])


# ---------------------------------------------------------------------------------------------------------------------
# Files

def write_gold(path, records):
    with export.atomic_file(path) as f:
        f.write(b"gold" + struct.pack("<I", 1))
        for name, v in records.items():
            f.write(struct.pack("<I", len(name)) + name.encode() + struct.pack(f"<I{v.ndim}I", v.ndim, *v.shape))
            f.write(v.numpy().astype("<f4").tobytes())
    print(f"  wrote {path}, {os.path.getsize(path) / 1e3:.0f} kB, {len(records)} records")


def write_layer_norm_model(path, m, net):
    """model.bin in float32 with a tokenizer of bytes, by the table in doc/FORMAT.md: transformers has no such model."""
    p = {name: v.detach().numpy().astype("<f4").tobytes() for name, v in parameters(m, net).items()}
    order = [t.name for t in export.tensor_list(m)]
    for name in [n for n in order if n.endswith("norm") or n == "norm_f"]:
        order.insert(order.index(name) + 1, name + "_bias")
    blob = b"mtok" + struct.pack("<7I", 1, 0, 0, 0, 256, 0, 0)
    start, tensors = (256 + len(blob) + 63) // 64 * 64, b""
    for name in order:
        tensors += bytes(-len(tensors) % 64) + p[name]
    flags = m.tied | m.proj_bias << 1 | m.conv_bias << 2 | m.mixer_norm << 3 | 16
    eos = (m.eos + [-1] * 4)[:4]
    head = b"mamba.c\n" + struct.pack("<12I2f6i4Q2I", 1, 256, 0, 0, flags, m.D, m.n_layer, m.V, m.E, m.N, m.K, m.R, m.norm_eps,
                                      m.mixer_eps, m.bos, m.pad, *eos, 256, len(blob), start, len(tensors), zlib.crc32(blob),
                                      zlib.crc32(tensors))
    head += bytes(252 - len(head))
    with export.atomic_file(path) as f:
        f.write(head + struct.pack("<I", zlib.crc32(head)) + blob + bytes(start - 256 - len(blob)) + tensors)


def golden(name, seed, m, out, hf, length, gradients):
    print(f"{name}: {export.summary(m, 'f32')}, seed {seed}")
    net, rng = make_net(m, seed)
    records = compute(m, net, rng.integers(0, m.V, length), gradients)
    write_gold(os.path.join(out, name + ".gold"), records)
    if norm_biases(m):
        write_layer_norm_model(os.path.join(out, name + ".bin"), m, net)
        return
    folder = os.path.join(hf, name)
    shutil.rmtree(folder, ignore_errors=True)
    net.save_pretrained(folder)
    export.run([folder, os.path.join(out, name + ".bin"), "--tokenizer", "bytes"])


def golden_tales(source, out):
    print(f"tales: from {os.path.basename(os.path.normpath(source))}, matrices rounded to bfloat16")
    net = transformers.MambaForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    config = export.Config(net.config.to_dict(), source)
    m = export.model_from_config(config, export.Fields({}, source))
    with torch.no_grad():
        for t in export.tensor_list(m):
            if t.is_w:
                v = parameters(m, net)[t.name]
                v.copy_(v.to(torch.bfloat16).float())
    from tokenizers import Tokenizer
    ids = Tokenizer.from_file(os.path.join(source, "tokenizer.json")).encode(TEXT).ids[:64]
    records = compute(m, net, ids, gradients=False)
    kept = {}
    for name, v in records.items():
        if not name.startswith("layer"):
            kept[name] = v
        elif name.startswith(("layer0.", "layer5.")):
            kept[name] = v if name.endswith((".h", ".conv_window")) else v[:12]
    kept["xn_f"] = kept["xn_f"][:12]
    write_gold(os.path.join(out, "tales.gold"), kept)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--out", required=True, help="where NAME.bin and NAME.gold go")
    parser.add_argument("--hf", help="where to keep the transformers checkpoints (default: nowhere; --random: OUT/hf)")
    parser.add_argument("--tales", help="the tales checkpoint, for tales.gold (default: skip it)")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N models of random shape instead of the fixed ones")
    parser.add_argument("--seed", type=int, default=1, help="of the first random model (default 1)")
    a = parser.parse_args()
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__}")
    os.makedirs(a.out, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        hf = a.hf or (os.path.join(a.out, "hf") if a.random else scratch)
        for seed in range(a.seed, a.seed + a.random):
            rng = np.random.Generator(np.random.PCG64(seed + 1000))
            golden(f"random{seed}", seed, random_sizes(rng), a.out, hf, int(rng.integers(1, 60)), gradients=False)
        if not a.random:
            for name, (seed, m) in FIXED.items():
                golden(name, seed, m, a.out, hf, 37, gradients=True)
            if a.tales:
                golden_tales(a.tales, a.out)


if __name__ == "__main__":
    main()
