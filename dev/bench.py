"""One table of speeds on random weights, each beside what the machine could do in the same minutes: make bench.
  python dev/bench.py [--shapes 130m,370m] [--types f32,bf16,q8,q4] [--rounds 3] [--mamba ./mamba] [--portable BINARY]
Every figure is the median over the rounds. With LLAMA_BENCH=path/to/llama-bench it runs that in turn with each of ours, on a GGUF
of the same shape and type (dev/make_gguf.py, which needs numpy), and the ratio stands behind each figure."""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))


def ours(mamba, shape, dtype, threads):
    """Figures of one `mamba bench`; None where this build does not know the type."""
    run = subprocess.run([mamba, "bench", "--cpu", "--shape", shape, "--dtype", dtype, "-T", str(threads), "-r", "3"],
                         capture_output=True, text=True)
    if run.returncode and "--dtype" in run.stderr:
        return None
    if run.returncode:
        sys.exit(f"{mamba} bench: {run.stderr}")
    find = lambda pattern: [float(x) for x in re.search(pattern, run.stdout).groups()]
    number = r"([\d.]+)"
    machine = find(rf"machine\s+{number} GB/s read, {number} GFLOP/s")
    prefill = find(rf"prefill 512\s+{number} tokens/s\s+{number}%")
    decode = find(rf"decode  \s+{number} tokens/s\s+{number}%")
    batch = find(rf"decode x8\s+{number} tokens/s\s+{number}%")
    return {"bandwidth": machine[0], "peak": machine[1], "prefill": prefill[0], "prefill share": prefill[1], "decode": decode[0],
            "decode share": decode[1], "batch": batch[0], "batch share": batch[1]}


def theirs(llama, gguf, threads):
    run = subprocess.run([llama, "-m", gguf, "-p", "512", "-n", "16", "-t", str(threads), "-r", "3", "-ngl", "0", "-o", "json"],
                         capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{llama}: {run.stderr[-2000:]}")
    return {"decode" if test["n_gen"] else "prefill": test["avg_ts"] for test in json.loads(run.stdout)}


def row(label, mamba, shape, dtype, rounds, llama, folder):
    rows = {1: [], 2: []}
    peer = {1: [], 2: []}
    if ours(mamba, "8,1,9", dtype, 1) is None:
        print(f"| {label} | this build does not know {dtype} | | | | | | | | |", flush=True)
        return
    gguf = llama and os.path.join(folder, f"{shape}-{dtype}.gguf")
    if llama and not os.path.exists(gguf):
        subprocess.run([sys.executable, os.path.join(HERE, "make_gguf.py"), shape, dtype, gguf], check=True)
    for _ in range(rounds):
        for threads in (1, 2):
            rows[threads].append(ours(mamba, shape, dtype, threads))
            if llama:
                peer[threads].append(theirs(llama, gguf, threads))
    mid = lambda threads, key: statistics.median(r[key] for r in rows[threads])

    def cell(threads, key):
        ratio = statistics.median(r[key] / p[key] for r, p in zip(rows[threads], peer[threads])) if llama else 0
        return f"{mid(threads, key):.0f}" + (f" ({ratio:.2f})" if llama else "")

    times = statistics.median(r["batch"] / r["decode"] for r in rows[2])
    print(f"| {label} | {cell(1, 'decode')} | {cell(2, 'decode')} | {mid(2, 'decode share'):.0f}% of {mid(2, 'bandwidth'):.0f} GB/s | "
          f"{cell(1, 'prefill')} | {cell(2, 'prefill')} | {mid(2, 'prefill share'):.0f}% of {mid(2, 'peak'):.0f} GFLOP/s | "
          f"{mid(2, 'batch'):.0f} | {times:.1f} | {mid(2, 'batch share'):.0f}% |", flush=True)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shapes", default="130m,370m")
    arguments.add_argument("--types", default="f32,bf16,q8,q4")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--mamba", default="./mamba")
    arguments.add_argument("--portable", help="a build with ARCH=, for rows of its own")
    o = arguments.parse_args()
    llama = os.environ.get("LLAMA_BENCH")
    if llama and not os.access(llama, os.X_OK):
        sys.exit(f"LLAMA_BENCH={llama}: no such program")
    print("tokens/s, medians" + (" (times llama.cpp's)" if llama else "") + "\n")
    print("| | decode, 1 thread | 2 threads | of the read bandwidth | prefill 512, 1 thread | 2 threads | of the float32 peak | "
          "8 sequences, 2 threads | times one | of its floor |\n" + "|---" * 10 + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for shape in o.shapes.split(","):
            for dtype in o.types.split(","):
                row(f"{shape} {dtype}", o.mamba, shape, dtype, o.rounds, llama, folder)
                if o.portable and shape == "130m":
                    row(f"{shape} {dtype}, portable build", o.portable, shape, dtype, o.rounds, None, folder)


if __name__ == "__main__":
    main()
