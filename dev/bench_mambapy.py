#!/usr/bin/env python3
"""bench_mambapy.py: a training step beside mamba.py's (Alexandre Torres' Mamba in PyTorch, with a parallel scan) on this CPU.

  python dev/bench_mambapy.py [--mamba ./mamba] [--threads 2] [--rounds 3] [--length 512] [--shape 768,24,50280]

Needs: pip install torch numpy; pip install --no-deps mambapy. 10 GB of memory, 6 GB of disk.

A step is forward, backward, clipping and AdamW of one sequence in float32, both from the same weights: mamba.py draws
them, the head is the embedding, and export.py makes a model.bin of them. mamba.c is measured as a user has it
(`mamba train --from`, times from its log), mamba.py with PyTorch's fused AdamW. They take turns, each in a process of its
own, whose first step does not count; their losses on one text before training must agree. Tokens/s are of the median
step, with the slowest and fastest in brackets; memory is the largest that a process held, which for mamba.c includes the
file it started from.
"""
import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

HERE = os.path.dirname(os.path.abspath(__file__))
STEPS = {"mamba.c": 6, "mamba.py": 3}                            # a process; the first is not counted


def net_of(shape):
    """mamba.py's blocks between an embedding and a norm, whose output meets the embedding again (its own mambapy.lm, which
    adds these, imports packages of CUDA)."""
    import torch
    from mambapy.mamba import Mamba, MambaConfig, RMSNorm
    torch.manual_seed(0)
    D, n_layer, V = shape
    config = MambaConfig(d_model=D, n_layers=n_layer)
    net = torch.nn.ModuleDict({"embeddings": torch.nn.Embedding(V, D), "mamba": Mamba(config),
                               "norm_f": RMSNorm(D, config.rms_norm_eps)})
    torch.nn.init.normal_(net["embeddings"].weight, std=config.base_std)
    return net


def loss_of(net, ids):
    import torch.nn.functional as F
    embedding = net["embeddings"]
    return F.cross_entropy(F.linear(net["norm_f"](net["mamba"](embedding(ids[None, :-1]))), embedding.weight)[0], ids[1:])


# What needs torch runs in child processes, since Linux counts what the parent has held among a child's memory.

def child_export(a, folder):
    """mamba.py's weights as a checkpoint of transformers, and of that a model.bin."""
    import torch
    D, n_layer, V = a.shape
    weights = {"backbone." + name.removeprefix("mamba."): v for name, v in net_of(a.shape).state_dict().items()}
    torch.save(weights, os.path.join(folder, "pytorch_model.bin"))
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump({"model_type": "mamba", "hidden_size": D, "num_hidden_layers": n_layer, "vocab_size": V, "state_size": 16,
                   "expand": 2, "intermediate_size": 2 * D, "conv_kernel": 4, "time_step_rank": -(-D // 16), "use_bias": False,
                   "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "torch_dtype": "float32"}, f)
    subprocess.run([sys.executable, os.path.join(HERE, "..", "export.py"), folder, os.path.join(folder, "model.bin"),
                    "--tokenizer", "bytes"], check=True)


def child_train(a, folder):
    """Prints the seconds and the loss of each step."""
    import torch
    torch.set_num_threads(a.threads)
    net = net_of(a.shape)
    with open(os.path.join(folder, "start"), "rb") as f:
        ids = torch.tensor(list(f.read()))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for _ in range(STEPS["mamba.py"]):
        begun = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_of(net, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        print(time.perf_counter() - begun, loss.item(), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The parent

def run(command, a):
    """Its output, and the largest memory that it held, in GB."""
    with tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True,
                                 env={**os.environ, "OMP_NUM_THREADS": str(a.threads)})
        out = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            err.seek(0)
            sys.exit(f"bench_mambapy.py: {' '.join(command)}\n{err.read()}")
    return out, usage.ru_maxrss / (1e9 if platform.system() == "Darwin" else 1e9 / 1024)


def child(part, a, folder):
    return run([sys.executable, os.path.abspath(__file__), "--child", part, folder, "--threads", str(a.threads),
                "--shape", ",".join(map(str, a.shape))], a)


def measure(who, a, folder):
    """Seconds of the steps that count, their first loss, gigabytes."""
    file = lambda name: os.path.join(folder, name)
    if who == "mamba.py":
        out, memory = child("train", a, folder)
        steps = [[float(v) for v in line.split()] for line in out.splitlines()]
        return [seconds for seconds, _ in steps][1:], steps[0][1], memory
    _, memory = run([a.mamba, "train", "-o", file("out.bin"), "--from", file("model.bin"), "--data", file("text"), "--batch", "1",
                     "--length", str(a.length), "--steps", str(STEPS[who]), "--held-out", "0", "--lr", "1e-4", "--warmup", "0",
                     "-T", str(a.threads)], a)
    with open(file("out.bin.csv")) as f:
        ends = [float(row["seconds"]) for row in csv.DictReader(f)]
    out, _ = run([a.mamba, "eval", file("model.bin"), file("start"), "--each"], a)
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.strip()][-a.length:]
    return [after - before for before, after in zip(ends, ends[1:])], statistics.fmean(losses), memory


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--mamba", default=os.path.join(HERE, "..", "mamba"), help="the program (default: the repository's)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--length", type=int, default=512, help="tokens a step (default 512)")
    parser.add_argument("--shape", type=lambda s: [int(v) for v in s.split(",")], default=[768, 24, 50280],
                        metavar="D,LAYERS,V", help="default 768,24,50280, that of mamba-130m")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        return {"export": child_export, "train": child_train}[a.child[0]](a, a.child[1])
    print(f"mambapy {version('mambapy')}, torch {version('torch')}, {subprocess.check_output([a.mamba, '--version'], text=True).strip()}; "
          f"shape {a.shape}, 1 x {a.length} tokens, float32, {a.threads} threads", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        text = os.urandom(4 * a.length)
        for name, part in (("text", text), ("start", text[:a.length + 1])):
            with open(os.path.join(folder, name), "wb") as f:
                f.write(part)
        child("export", a, folder)
        seconds, memory, loss = {who: [] for who in STEPS}, {who: 0.0 for who in STEPS}, {}
        for turn in range(a.rounds):
            for who in STEPS:
                times, loss[who], held = measure(who, a, folder)
                seconds[who] += times
                memory[who] = max(memory[who], held)
                print(f"round {turn + 1}, {who}: " + " ".join(f"{s:.2f}" for s in times) + f" s; loss before training {loss[who]:.5f}", flush=True)
            if not abs(loss["mamba.c"] - loss["mamba.py"]) < 1e-3:
                sys.exit("bench_mambapy.py: the two do not compute the same")
    print("\n| | s a step | tokens/s | peak memory |\n|---|---|---|---|")
    rate = lambda s: f"{a.length / max(s, 1e-3):.1f}"            # the log has milliseconds
    for who, times in seconds.items():
        print(f"| {who} | {statistics.median(times):.2f} | {rate(statistics.median(times))} ({rate(max(times))}-{rate(min(times))}) "
              f"| {memory[who]:.2f} GB |")
    ratio = lambda f: f(seconds["mamba.py"]) / max(f(seconds["mamba.c"]), 1e-3)
    print(f"| ratio | {ratio(statistics.median):.1f} | fastest steps {ratio(min):.1f} | {memory['mamba.py'] / memory['mamba.c']:.1f} |")



if __name__ == "__main__":
    main()
