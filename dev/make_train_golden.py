#!/usr/bin/env python3
"""make_train_golden.py: gradients at several lengths, and what ten steps of training make, of the tiny fixed models, for
test_all.c to be measured against.

  python dev/make_train_golden.py --out tests [--whole]

Needs: pip install torch transformers, like make_golden.py, which makes the models: the weights are those of NAME.bin.
All numbers are of make_golden.py's float64 model with autograd. transformers, in float32, checks what it can compute.

Gradients. The backward scan keeps one state in 32 and walks each stretch of 32 again, so lengths stand on both sides of
its multiples: 1, K-1 (no longer than the convolution's window), 31, 33, 65, 100, for one sequence or two; NAME.gold has
36, and the steps below 32. At each length there are two passes:
  from nothing: the loss is the mean cross-entropy of the B * L predictions, as in training
  from states: every layer starts from a random state h0 and a random convolution window window0, and the scalar is
    sum of d_res * (residual after the last layer) + sum over layers of d_h * (the layer's state after the last token)
  so that a gradient comes in at both ends of the text, and those of h0 and window0 come out. There is no norm_f and no
  head in it.

Training. Step s trains on B = 3 sequences of 33 ids drawn uniformly from [0, 256), each from a zero state. The loss is the
mean cross-entropy of the 3 * 32 predictions; its gradient is clipped to norm 1 over all weights together, then AdamW
steps: rate 3e-3, betas 0.9 and 0.95, eps 1e-8, decay 0.1 on matrices (embedding, head, in_proj, conv, x_proj, dt_proj,
out_proj) and none on the rest. Optimizer and clipping are torch's own (torch.optim.AdamW, clip_grad_norm_).

transformers' float32 says how far apart two right answers lie, which is what a tolerance has to allow for. That is more
for the weights than for the losses: Adam divides by the gradient's own size, so a weight whose gradient is mostly rounding
error moves as far as any other. falcon's norms are touchy: in float64 too, initial weights changed by a share of 1e-7
change the norms of its 5th and 9th step by 1e-5 and 4e-5, and no loss by more than 1e-6.

Records in NAME-train.gold, all float32, names and shapes of tensors as in model.bin (conv is (E,K)):
  ids (10,3,33) | losses (10) before each step | norms (10) of the gradient before clipping |
  final.NAME the parameter after the last step
  text (2,101) the ids of the passes; one of B sequences of L takes text[:B,:L], and text[:B,1:L+1] as targets
  h0, d_h (2,n_layer,N,E) | window0 (2,n_layer,K-1,E) | d_res (2,100,D): of the passes from states, which take [:B], [:B,:L]
  passes (6,3): L, B of the pass from nothing, B of that from states
  LL.loss (1) | LL.NAME gradient in the pass of length L from nothing | LL.states.NAME the same from states |
  LL.states.h0 (B,n_layer,N,E), LL.states.window0 (B,n_layer,K-1,E) gradients of what it started from
Gradients of more than 251 elements are a sample: elements i * n / 251, rounded down, for i = 0 .. 250; of the embedding, of its
rows text[:B,:L] one after the other. --whole keeps every element, 4.7 MB in all; test_all takes either.
"""
import argparse
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
import transformers

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import make_golden

STEPS, B, IDS = 10, 3, 33
DECAYS = ("embedding", "head", "in_proj", "conv", "x_proj", "dt_proj", "out_proj")
SAMPLE = 251


# ---------------------------------------------------------------------------------------------------------------------
# Gradients at several lengths

def sampled(name, v, ids, whole):
    """The part of a gradient that the file keeps. The number of elements is prime, so they wander over the columns."""
    if whole:
        return v
    v = v[ids.flatten()] if name == "embedding" else v
    n = v.numel()
    return v if n <= SAMPLE else v.flatten()[torch.arange(SAMPLE) * n // SAMPLE]


def clear(p):
    for v in p.values():
        v.grad = None


def from_nothing(m, p, net, rough, ids, targets):
    """The loss and {parameter: gradient}; how far off transformers is in float32."""
    clear(p), clear(rough)
    loss = sum(F.cross_entropy(make_golden.forward64(m, p, sequence)["logits"], target) for sequence, target in zip(ids, targets))
    (loss / len(ids)).backward()
    F.cross_entropy(net(input_ids=ids, use_cache=False).logits.reshape(-1, m.V), targets.flatten()).backward()
    exact = {k: v.grad for k, v in p.items()}
    error, _ = make_golden.worst({k: v.grad.reshape(exact[k].shape) for k, v in rough.items()}, exact)
    assert error < 1e-3, "transformers' gradients and the float64 ones disagree"
    return (loss / len(ids)).detach().reshape(1), exact, error


def from_states(m, p, ids, given):
    """{parameter, h0 or window0: gradient} of the scalar above, without norm_f and head."""
    clear(p)
    n, L = ids.shape
    h0, window0 = (given[name][:n].clone().requires_grad_(True) for name in ("h0", "window0"))
    scalar = 0
    for b in range(n):
        s = make_golden.forward64(m, p, ids[b], [(window0[b, i], h0[b, i].T) for i in range(m.n_layer)])
        scalar = scalar + (given["d_res"][b, :L] * s[f"layer{m.n_layer - 1}.res"]).sum()
        scalar = scalar + sum((given["d_h"][b, i] * s[f"layer{i}.h"].T).sum() for i in range(m.n_layer))
    scalar.backward()
    return {**{k: v.grad for k, v in p.items() if v.grad is not None}, "h0": h0.grad, "window0": window0.grad}


def gradients(m, seed, p, net, rough, whole):
    """The records of the passes."""
    passes = ((1, 1, 2), (m.K - 1, 2, 1), (31, 1, 2), (33, 2, 1), (65, 1, 2), (100, 2, 2))
    rng = np.random.Generator(np.random.PCG64(seed + 3000))
    normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype("f4")).double()
    records = {"text": torch.from_numpy(rng.integers(0, 256, (2, 101))), "passes": torch.tensor(passes),
               "h0": normal(2, m.n_layer, m.N, m.E), "d_h": normal(2, m.n_layer, m.N, m.E),
               "window0": normal(2, m.n_layer, m.K - 1, m.E), "d_res": normal(2, 100, m.D)}
    for L, n, n_states in passes:
        ids, targets = records["text"][:n, :L], records["text"][:n, 1:L + 1]
        records[f"L{L}.loss"], grads, error = from_nothing(m, p, net, rough, ids, targets)
        records.update({f"L{L}.{k}": sampled(k, v, ids, whole) for k, v in grads.items()})
        ids = records["text"][:n_states, :L]
        grads = from_states(m, p, ids, records)
        records.update({f"L{L}.states.{k}": v if k in ("h0", "window0") else sampled(k, v, ids, whole) for k, v in grads.items()})
        print(f"  gradients at length {L}: transformers' float32 differs by at most {error:.1e} of the largest value")
    clear(p), clear(rough)
    return records


# ---------------------------------------------------------------------------------------------------------------------
# Training

def train(p, batches, loss_of):
    """Trains the parameters of p (model.bin's names) in place; losses and gradient norms, one a step."""
    decays = lambda name: name.split(".")[-1] in DECAYS
    groups = [{"params": [v for name, v in p.items() if decays(name)], "weight_decay": 0.1},
              {"params": [v for name, v in p.items() if not decays(name)], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for ids in batches:
        optimizer.zero_grad()
        loss = loss_of(ids)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(p.values(), 1.0).item())
        losses.append(loss.item())
        optimizer.step()
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64)


def golden(name, seed, m, out, whole):
    print(f"{name}: gradients, and {STEPS} steps of {B} sequences of {IDS} ids")
    net, _ = make_golden.make_net(m, seed)
    rough = make_golden.parameters(m, net)
    exact = {k: v.detach().double().reshape(-1, m.K) if k.endswith(".conv") else v.detach().double() for k, v in rough.items()}
    for v in exact.values():
        v.requires_grad_(True)
    records = gradients(m, seed, exact, net, rough, whole)
    rng = np.random.Generator(np.random.PCG64(seed + 2000))
    batches = torch.from_numpy(rng.integers(0, 256, (STEPS, B, IDS)))

    def loss64(ids):
        return sum(make_golden.forward64(m, exact, sequence)["loss"][0] for sequence in ids) / B

    def loss32(ids):
        logits = net(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].reshape(-1, m.V), ids[:, 1:].reshape(-1))

    losses, norms = train(exact, batches, loss64)
    losses32, norms32 = train(rough, batches, loss32)
    print("  losses " + " ".join(f"{v:.5f}" for v in losses) + "\n  norms  " + " ".join(f"{v:.5f}" for v in norms))

    curve = {"losses": losses, "norms": norms}
    final = {f"final.{k}": v.detach() for k, v in exact.items()}
    for want, got, limit in ((curve, {"losses": losses32, "norms": norms32}, 1e-4),
                             (final, {f"final.{k}": v.reshape(exact[k].shape) for k, v in rough.items()}, 2e-4)):
        error, record = make_golden.worst(got, want)
        print(f"  float32 differs from float64 by at most {error:.1e} of the largest value ({record})")
        assert error < limit, "transformers and the float64 model disagree"
    make_golden.write_gold(os.path.join(out, name + "-train.gold"), {"ids": batches, **curve, **final, **records})


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--out", required=True, help="where NAME-train.gold goes")
    parser.add_argument("--whole", action="store_true", help="every element of every gradient")
    a = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__}")
    os.makedirs(a.out, exist_ok=True)
    for name, (seed, m) in make_golden.FIXED.items():
        golden(name, seed, m, a.out, a.whole)


if __name__ == "__main__":
    main()
