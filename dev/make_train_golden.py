#!/usr/bin/env python3
"""make_train_golden.py: what ten steps of training make of the tiny fixed models, for test_all.c to be measured against.

  python dev/make_train_golden.py --out tests

Needs: pip install torch transformers, like make_golden.py, which makes the models: the weights are those of NAME.bin.

Step s trains on B = 3 sequences of 33 ids drawn uniformly from [0, 256), each from a zero state. The loss is the mean
cross-entropy of the 3 * 32 predictions; its gradient is clipped to norm 1 over all weights together, then AdamW steps:
rate 3e-3, betas 0.9 and 0.95, eps 1e-8, decay 0.1 on matrices (embedding, head, in_proj, conv, x_proj, dt_proj,
out_proj) and none on the rest. Optimizer and clipping are torch's own (torch.optim.AdamW, clip_grad_norm_).

The numbers are of make_golden.py's float64 model with autograd. transformers, in float32 with the same optimizer, checks
them: it says how far apart two right answers lie, which is what a tolerance has to allow for. That is more for the
weights than for the losses: Adam divides by the gradient's own size, so a weight whose gradient is mostly rounding
error moves as far as any other. falcon's norms are touchy: in float64 too, initial weights
changed by a share of 1e-7 change the norms of its 5th and 9th step by 1e-5 and 4e-5, and no loss by more than 1e-6.

Records in NAME-train.gold, all float32:
  ids (10,3,33) | losses (10) before each step | norms (10) of the gradient before clipping |
  final.NAME the parameter after the last step, NAME and shape as in model.bin (conv is (E,K))
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


def golden(name, seed, m, out):
    print(f"{name}: {STEPS} steps of {B} sequences of {IDS} ids")
    net, _ = make_golden.make_net(m, seed)
    rough = make_golden.parameters(m, net)
    exact = {k: v.detach().double().reshape(-1, m.K) if k.endswith(".conv") else v.detach().double() for k, v in rough.items()}
    for v in exact.values():
        v.requires_grad_(True)
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
    make_golden.write_gold(os.path.join(out, name + "-train.gold"), {"ids": batches, **curve, **final})


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--out", required=True, help="where NAME-train.gold goes")
    a = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__}")
    os.makedirs(a.out, exist_ok=True)
    for name, (seed, m) in make_golden.FIXED.items():
        golden(name, seed, m, a.out)


if __name__ == "__main__":
    main()
