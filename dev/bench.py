"""One table of speeds on random weights, each beside what the machine could do in the same
minutes: make bench.

  python dev/bench.py [--shapes 130m,370m] [--types f32,bf16,q8,q4] [--rounds 3]
                      [--mamba ./mamba] [--portable BINARY]

Every figure is the median over the rounds. With LLAMA_BENCH=path/to/llama-bench each run of ours
is followed by one of llama-bench, on a GGUF of the same shape and type (dev/make_gguf.py, which
needs numpy). The ratio to it stands behind each figure."""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
COLUMNS = ["", "decode, 1 thread", "2 threads", "of the read bandwidth", "prefill 512, 1 thread",
           "2 threads", "of the float32 peak", "8 sequences, 2 threads", "times one",
           "of its floor"]


def print_row(cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def ours(mamba, shape, dtype, threads):
    """Figures of one `mamba bench`; None where this build does not know the type."""
    command = [mamba, "bench", "--cpu", "--shape", shape, "--dtype", dtype, "-T", str(threads),
               "-r", "3"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode and "--dtype" in run.stderr:
        return None
    if run.returncode:
        sys.exit(f"{mamba} bench: {run.stderr}")

    def find(pattern):
        match = re.search(pattern, run.stdout)
        if not match:
            sys.exit(f"{mamba} bench: no line like '{pattern}' in\n{run.stdout}")
        return [float(x) for x in match.groups()]

    number = r"([\d.]+)"
    figures = {}
    figures["bandwidth"], figures["peak"] = find(
        rf"machine\s+{number} GB/s read, {number} GFLOP/s")
    for name, line in (("prefill", "prefill 512"), ("decode", "decode  "), ("batch", "decode x8")):
        speed, share = find(rf"{line}\s+{number} tokens/s\s+{number}%")
        figures[name] = speed
        figures[name + " share"] = share
    return figures


def theirs(llama, gguf, threads):
    command = [llama, "-m", gguf, "-p", "512", "-n", "16", "-t", str(threads), "-r", "3",
               "-ngl", "0", "-o", "json"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{llama}: {run.stderr[-2000:]}")
    tests = json.loads(run.stdout)
    return {"decode" if test["n_gen"] else "prefill": test["avg_ts"] for test in tests}


def measure(label, mamba, shape, dtype, rounds, llama, folder):
    """One row of the table."""
    runs = {1: [], 2: []}  # by number of threads
    peer_runs = {1: [], 2: []}
    if ours(mamba, "8,1,9", dtype, 1) is None:
        print_row([label, f"this build does not know {dtype}"] + [""] * (len(COLUMNS) - 2))
        return
    gguf = llama and os.path.join(folder, f"{shape}-{dtype}.gguf")
    if llama and not os.path.exists(gguf):
        maker = os.path.join(HERE, "make_gguf.py")
        subprocess.run([sys.executable, maker, shape, dtype, gguf], check=True)
    for _ in range(rounds):
        for threads in (1, 2):
            runs[threads].append(ours(mamba, shape, dtype, threads))
            if llama:
                peer_runs[threads].append(theirs(llama, gguf, threads))

    def median(threads, key):
        return statistics.median(run[key] for run in runs[threads])

    def speed(threads, key):
        text = f"{median(threads, key):.0f}"
        if llama:
            pairs = zip(runs[threads], peer_runs[threads])
            text += f" ({statistics.median(run[key] / peer[key] for run, peer in pairs):.2f})"
        return text

    times = statistics.median(run["batch"] / run["decode"] for run in runs[2])
    print_row([label, speed(1, "decode"), speed(2, "decode"),
               f"{median(2, 'decode share'):.0f}% of {median(2, 'bandwidth'):.0f} GB/s",
               speed(1, "prefill"), speed(2, "prefill"),
               f"{median(2, 'prefill share'):.0f}% of {median(2, 'peak'):.0f} GFLOP/s",
               f"{median(2, 'batch'):.0f}", f"{times:.1f}", f"{median(2, 'batch share'):.0f}%"])


def main():
    arguments = argparse.ArgumentParser(description=__doc__,
                                        formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shapes", default="130m,370m")
    arguments.add_argument("--types", default="f32,bf16,q8,q4")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--mamba", default="./mamba")
    arguments.add_argument("--portable", help="a build with ARCH=, for its own rows")
    o = arguments.parse_args()
    llama = os.environ.get("LLAMA_BENCH")
    if llama and not os.access(llama, os.X_OK):
        sys.exit(f"LLAMA_BENCH={llama}: no such program")
    print("tokens/s, medians" + (" (times llama.cpp's)" if llama else "") + "\n")
    print_row(COLUMNS)
    print("|---" * len(COLUMNS) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for shape in o.shapes.split(","):
            for dtype in o.types.split(","):
                label = f"{shape} {dtype}"
                measure(label, o.mamba, shape, dtype, o.rounds, llama, folder)
                if o.portable and shape == "130m":
                    measure(f"{label}, portable build", o.portable, shape, dtype, o.rounds, None,
                            folder)


if __name__ == "__main__":
    main()
