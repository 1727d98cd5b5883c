#!/usr/bin/env python3
"""train_gpt.py: the Transformer beside which a trained Mamba is measured. GPT-2 in PyTorch: learned positions, LayerNorm
before each half of a block, GELU, tied embedding, no dropout.

  pip install torch numpy tokenizers
  python dev/train_gpt.py --data train.txt --held-out-data heldout.txt --tokenizer tokenizer.json \\
      --d-model 288 --layers 6 --heads 6 --length 1024 --batch 32 --steps 2500 --lr 1e-3,2e-3,4e-3 --match 7390720

It takes the options of `./mamba train` and what goes with them: AdamW with the same settings, the same warm-up and
cosine, and, as it draws from the same generator, the same windows of the same tokens in the same order (seed for seed).
--match N checks that the number of parameters is within 2% of N. Each learning rate is a run of its own, from the same
initial weights; each is a line of --out, none is left out. --seconds S lowers the steps of all runs alike, so that they
fit; the speed is measured first.

Held-out bits per byte: every token but the first, over the bytes of these, as `./mamba eval` counts. A Transformer sees no
further than its context, so a window slides over the text by half of it: each token is predicted from at least length / 2 tokens,
from all there are near the start.
"""
import argparse
import csv
import math
import os
import sys
import time

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from tokenizers import Tokenizer
    from torch import nn
except ImportError as error:
    sys.exit(f"train_gpt.py: {error} (pip install torch numpy tokenizers)")

END_OF_TEXT = "<|endoftext|>"


class Block(nn.Module):
    def __init__(self, D, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, res):
        B, L, D = res.shape
        q, k, v = (part.view(B, L, self.heads, D // self.heads).transpose(1, 2) for part in self.qkv(self.norm1(res)).split(D, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        res = res + self.out(y.transpose(1, 2).reshape(B, L, D))
        return res + self.down(F.gelu(self.up(self.norm2(res)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, V, D, layers, heads, length):
        super().__init__()
        self.embedding, self.position = nn.Embedding(V, D), nn.Embedding(length, D)
        self.blocks = nn.ModuleList(Block(D, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(D)
        for name, w in self.named_parameters():
            if w.dim() == 2:        # GPT-2's: what is added to the residual stream starts smaller, the deeper the model
                nn.init.normal_(w, std=0.02 / (math.sqrt(2 * layers) if name.endswith(("out.weight", "down.weight")) else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(w)

    def forward(self, ids, targets, reduction="mean"):
        res = self.embedding(ids) + self.position.weight[:ids.shape[1]]
        for block in self.blocks:
            res = block(res)
        logits = F.linear(self.norm(res), self.embedding.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and windows

def encode(tokenizer, path):
    """The file's ids. It is cut at <|endoftext|>, where the library would cut it too, so that it can work in parallel."""
    try:
        with open(path, encoding="utf-8", newline="") as f:
            parts = f.read().split(END_OF_TEXT)
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"train_gpt.py: {path}: {getattr(error, 'strerror', None) or error}")
    end, ids = tokenizer.token_to_id(END_OF_TEXT), []
    if end is None and len(parts) > 1:
        sys.exit(f"train_gpt.py: {path} has {END_OF_TEXT}, the tokenizer does not")
    for i, text in enumerate(tokenizer.encode_batch_fast(parts, add_special_tokens=False)):
        ids.append(np.array(([end] if i else []) + text.ids, dtype=np.int32))
    return np.concatenate(ids)


def token_bytes(tokenizer):
    """(V) bytes of each id: a byte-level token's characters stand for a byte each, an added one's for themselves."""
    added = {i: len(t.content.encode()) for i, t in tokenizer.get_added_tokens_decoder().items()}
    return np.array([added.get(i, len(tokenizer.id_to_token(i) or "")) for i in range(tokenizer.get_vocab_size())])


def splitmix(state, n):
    """n numbers (uint64) of mamba.c's random_u64 from this state."""
    with np.errstate(over="ignore"):
        z = np.uint64(state) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def window_starts(a, n_ids):
    """(steps, batch) first tokens of the windows, as draw_batch of mamba.c draws them."""
    return (splitmix(splitmix(a.seed, 1)[0], a.steps * a.batch) % np.uint64(n_ids - a.length)).astype(np.int64).reshape(a.steps, a.batch)


# ---------------------------------------------------------------------------------------------------------------------
# Training and measuring

def autocast(a):
    return torch.autocast(a.device, torch.bfloat16, enabled=a.device == "cuda" or a.bf16)


@torch.no_grad()
def held_out_bits(a, model, ids, lengths):
    """Bits per byte with a window of `length` tokens that slides by half of it; see the top."""
    L, half, nats, n = a.length, a.length // 2, 0.0, len(ids) - 1
    starts = list(range(0, max(1, n - L + half), half)) # each scores its last half, the first one all
    for k in range(0, len(starts), a.batch):
        x = torch.zeros(len(starts[k:k + a.batch]), L, dtype=torch.long)
        targets = torch.full_like(x, -100)
        for row, s in enumerate(starts[k:k + a.batch]):
            piece = torch.from_numpy(ids[s:s + L + 1].astype(np.int64))
            first = half if s else 0
            x[row, :len(piece) - 1] = piece[:-1]
            targets[row, first:len(piece) - 1] = piece[1:][first:]
        with autocast(a):
            nats += model(x.to(a.device), targets.to(a.device), reduction="sum").item()
    return nats / math.log(2) / float(lengths[ids[1:]].sum()), nats / n


def learning_rate(a, peak, step):                       # of step 1, 2, ..., as in mamba.c
    if step <= a.warmup:
        return peak * step / a.warmup
    along = (step - a.warmup) / max(1, a.steps - a.warmup)
    return a.min_lr + (peak - a.min_lr) * 0.5 * (1 + math.cos(math.pi * min(along, 1)))


def set_up(a, V):
    """(the model, what is called in training, AdamW), from the seed."""
    torch.manual_seed(a.seed)
    model = GPT(V, a.d_model, a.layers, a.heads, a.length).to(a.device)
    decayed, others = ([w for w in model.parameters() if (w.dim() == 2) == matrix] for matrix in (True, False))
    adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": a.decay}, {"params": others, "weight_decay": 0.0}],
                              lr=0.0, betas=(0.9, a.beta2), eps=1e-8, fused=a.device == "cuda")
    return model, torch.compile(model) if a.compile else model, adamw


def train_step(a, model, call, adamw, data, starts, rate):
    window = data[torch.from_numpy(starts).to(a.device)[:, None] + a.offsets]
    with autocast(a):
        loss = call(window[:, :-1], window[:, 1:])
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), a.clip if a.clip else math.inf)
    for group in adamw.param_groups:
        group["lr"] = rate
    adamw.step()
    adamw.zero_grad(set_to_none=True)
    return loss.detach(), norm


def wait(a):
    if a.device == "cuda":
        torch.cuda.synchronize()


def seconds_a_step(a, data, V, n=20):
    """After the compiler has done its part. Nothing of this run is kept."""
    model, call, adamw = set_up(a, V)
    starts = window_starts(a, len(data))
    for i in range(n + 5):
        if i == 5:
            wait(a)
            begun = time.perf_counter()
        train_step(a, model, call, adamw, data, starts[i % len(starts)], 0.0)
    wait(a)
    return (time.perf_counter() - begun) / n


def train(a, peak, data, held, lengths, V):
    model, call, adamw = set_up(a, V)
    starts = window_starts(a, len(data))
    log = open(f"{a.log}-{peak:g}.csv", "w") if a.log else None
    if log:
        log.write("step,tokens,seconds,loss,bits_per_byte\n")
    wait(a)
    begun, paused, recent = time.perf_counter(), 0.0, []
    for step in range(1, a.steps + 1):
        loss, norm = train_step(a, model, call, adamw, data, starts[step - 1], learning_rate(a, peak, step))
        recent.append(loss)
        last = step == a.steps
        if step % a.eval_every and not last:
            continue
        wait(a)
        now = time.perf_counter()
        mean, speed = torch.stack(recent).mean().item(), step * a.batch * a.length / (now - begun - paused)
        bits, nats = held_out_bits(a, model, held, lengths)
        print(f"lr {peak:g}  step {step}/{a.steps}  loss {mean:.4f} (mean of {len(recent)})  norm {norm.item():.2f}  "
              f"held-out {bits:.6f} bits/byte, {nats:.4f} nats/token  {speed:.0f} tokens/s", flush=True)
        if not math.isfinite(mean):
            print(f"lr {peak:g} diverged", flush=True)
            bits = math.nan
            break
        if log:
            log.write(f"{step},{step * a.batch * a.length},{now - begun - paused:.3f},{mean:.6f},{bits:.6f}\n")
        recent = []
        paused += time.perf_counter() - now
    if log:
        log.close()
    return {"parameters": sum(w.numel() for w in model.parameters()), "learning_rate": peak, "tokens": step * a.batch * a.length,
            "seconds": round(now - begun - paused, 1), "tokens_per_second": round(speed), "loss": round(mean, 4), "bits_per_byte": round(bits, 6)}


def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", action="append", required=True, metavar="FILE", help="text to learn; several are joined")
    p.add_argument("--held-out-data", required=True, metavar="FILE")
    p.add_argument("--tokenizer", required=True, metavar="tokenizer.json")
    for name, value in dict(d_model=288, layers=6, heads=6, length=1024, batch=32, steps=2500, warmup=100, eval_every=500, seed=1).items():
        p.add_argument("--" + name.replace("_", "-"), type=int, default=value, metavar="N", help=f"default {value}")
    p.add_argument("--lr", default="1e-3", metavar="X,...", help="peak learning rates, a run each (default 1e-3)")
    for name, value in dict(min_lr=1e-5, decay=0.1, clip=1.0, beta2=0.95).items():
        p.add_argument("--" + name.replace("_", "-"), type=float, default=value, metavar="X", help=f"default {value:g}")
    p.add_argument("--seconds", type=float, metavar="S", help="training time of all runs together: steps are lowered to fit")
    p.add_argument("--match", type=int, metavar="N", help="stop unless the parameters are within 2%% of N")
    p.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile (which CPU runs never use)")
    p.add_argument("--bf16", action="store_true", help="bfloat16 products on the CPU too; a GPU always takes them")
    p.add_argument("--cpu", dest="device", action="store_const", const="cpu", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", metavar="CSV", help="a line for each run is appended here")
    p.add_argument("--log", metavar="NAME", help="NAME-LR.csv gets the curve of each run")
    a = p.parse_args()
    try:
        a.rates = [float(x) for x in a.lr.split(",")]
    except ValueError:
        p.error(f"--lr {a.lr}: numbers with commas between")
    for name in ("d_model", "layers", "heads", "batch", "steps", "eval_every"):
        if getattr(a, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    if a.d_model % a.heads:
        p.error(f"--d-model {a.d_model} is not a multiple of --heads {a.heads}")
    if a.length < 2 or a.length % 2:
        p.error(f"--length {a.length}: an even number, as the window slides by half of it")
    a.compile = a.compile and a.device == "cuda"
    a.offsets = torch.arange(a.length + 1, device=a.device)
    return p, a


def main():
    p, a = options()
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        tokenizer = Tokenizer.from_file(a.tokenizer)
    except Exception as error:                                   # the library raises a bare Exception
        sys.exit(f"train_gpt.py: {a.tokenizer}: {error}")
    V, lengths = tokenizer.get_vocab_size(), token_bytes(tokenizer)
    ids, held = np.concatenate([encode(tokenizer, path) for path in a.data]), encode(tokenizer, a.held_out_data)
    if len(ids) < a.length + 2 or len(held) < 2:
        sys.exit(f"train_gpt.py: {len(ids)} and {len(held)} tokens are too few for --length {a.length}")
    data = torch.from_numpy(ids.astype(np.int64)).to(a.device)
    n = sum(w.numel() for w in GPT(V, a.d_model, a.layers, a.heads, a.length).parameters())
    print(f"{n} parameters, {len(ids)} tokens to train on, {len(held)} held out ({lengths[held].sum()} bytes), {a.device}", flush=True)
    if a.match and abs(n - a.match) > 0.02 * a.match:
        p.error(f"{n} parameters are {100 * (n / a.match - 1):+.1f}% of --match {a.match}: change --d-model or --layers")
    if a.seconds:
        fit = int(a.seconds / len(a.rates) / seconds_a_step(a, data, V))
        print(f"{fit} steps a run fit into {a.seconds:g} s" + (f": fewer than --steps {a.steps}" if fit < a.steps else ""), flush=True)
        a.steps = max(1, min(a.steps, fit))
    for peak in a.rates:
        result = train(a, peak, data, held, lengths, V)
        print("  ".join(f"{k} {v}" for k, v in result.items()), flush=True)
        if a.out:
            new = not os.path.exists(a.out)
            with open(a.out, "a", newline="") as f:
                table = csv.DictWriter(f, result)
                if new:
                    table.writeheader()
                table.writerow(result)


if __name__ == "__main__":
    main()
