#!/usr/bin/env python3
"""test_faults.py: every allocation and every file operation of the commands fails once. Each time the command must end
with a sentence and status 1, or do all that it was asked for; it must not crash, lose an old file, leave a temporary, or
end with status 0 after a write that failed. For Linux with glibc. The last line is `N passed, N failed, N skipped`.

  CC=cc python tests/test_faults.py [every]    every: only each so many-th call, for a quick look
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WRAPPED = "malloc calloc realloc mmap open fopen fdopen fread fwrite fflush fclose fsync rename fseek ftell".split()
# Where a command may go on without harm: what it asked for is not needed, or is there in another way.
HARMLESS = {"mmap", "fclose of an input", "fwrite stderr", "fflush stderr"}
WRITES = {"fwrite", "fflush", "fclose", "fsync", "rename", "fdopen"}
every = int(sys.argv[1]) if len(sys.argv) > 1 else 1
TINY = "--steps 2 --d-model 16 --layers 1 --batch 1 --length 16 --save-every 1".split()

# name, arguments, stdin. Files are in the folder of the run: m (model), text, ids, s (state), c and c.train (a run).
FORMS = [
    ("generate", ["m", "Once", "-n", "3", "-t", "0"], ""),
    ("generate from stdin", ["m", "-", "-n", "3", "-t", "0"], "Once upon"),
    ("generate --save-state", ["m", "Once", "-n", "2", "-s", "1", "--save-state", "state"], ""),
    ("generate --load-state", ["m", "", "-n", "2", "-t", "0", "--load-state", "s"], ""),
    ("generate --samples", ["m", "Once", "-n", "2", "-s", "1", "--samples", "3"], ""),
    ("generate --batch", ["m", "--batch", "text", "-n", "2", "-s", "1"], ""),
    ("generate --stop", ["m", "Once", "-n", "4", "-t", "0", "--stop", "zzz"], ""),
    ("--show-selection", ["m", "Once upon a time", "--show-selection"], ""),
    ("a session", ["m", "-n", "2", "-t", "0", "-s", "1"], "Once\n\n/undo\n/save state\n/load s\n/reset\n/quit\n"),
    ("info --verify", ["info", "m", "--verify"], ""),
    ("tokenize", ["tokenize", "m", "text"], ""),
    ("tokenize --decode", ["tokenize", "m", "ids", "--decode"], ""),
    ("eval", ["eval", "m", "text"], ""),
    ("eval --each", ["eval", "m", "text", "--each", "--context", "4"], ""),
    ("eval --task", ["eval", "m", "--task", "induction", "--length", "8", "--samples", "2"], ""),
    ("logits", ["logits", "m", "Once"], ""),
    ("logits --all -o", ["logits", "m", "Once", "--all", "-o", "out"], ""),
    ("quantize q4", ["quantize", "m", "model", "q4"], ""),
    ("train", ["train", "-o", "out", "--force", "--data", "text"] + TINY, ""),
    ("train --resume", ["train", "-o", "c", "--data", "text", "--resume"] + TINY, ""),
    ("train --from", ["train", "-o", "out", "--force", "--from", "m", "--data", "text"] + TINY, ""),
    ("train --task", ["train", "-o", "out", "--force", "--task", "induction"] + TINY, ""),
    ("help --man", ["help", "--man"], ""),
]
passed = failed = 0


def check(good, name, detail=""):
    global passed, failed
    print(("ok   " if good else "FAIL ") + name)
    passed, failed = passed + bool(good), failed + (not good)
    if detail and not good:
        print("     " + str(detail).replace("\n", "\n     "))


def run(program, folder, arguments, stdin, fault=None):
    """(status, stdout, stderr, what failed or the number of calls)"""
    environment = dict(os.environ, FAULT=str(fault or 0), FAULT_LOG=os.path.join(folder, "..", "log"))
    log = environment["FAULT_LOG"]
    if os.path.exists(log):
        os.remove(log)
    done = subprocess.run([program] + arguments, cwd=folder, input=stdin.encode(), env=environment, capture_output=True, timeout=60)
    return done.returncode, done.stdout, done.stderr.decode("utf-8", "replace"), open(log).read() if os.path.exists(log) else ""


def files_of(folder):
    return {name: open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))}


def times_removed(name, data):
    """The log of a training without its times."""
    return re.sub(rb"(?m)^(\d+,\d+),[^,]*,(.*),[^,]*$", rb"\1,\2", data) if name.endswith(".csv") else data


def is_whole(program, folder, path, form):
    """Whether a file that was written after the fault is a good model, checkpoint or state, of another moment."""
    if path.endswith(".train"):
        with open(os.path.join(folder, path), "rb") as f:
            return f.read(8) == b"mamba.t\n"
    if form.startswith("train"):
        return run(program, folder, ["info", path, "--verify"], "")[0] == 0
    return run(program, folder, ["m", "", "-n", "0", "--load-state", path], "")[0] == 0


def one_fault(program, start, folder, form, whole, n):
    """None, or what is wrong after call n failed."""
    name, arguments, stdin = form
    shutil.rmtree(folder)
    shutil.copytree(start, folder)
    status, out, said, what = run(program, folder, arguments, stdin, n)
    before, after, wanted = files_of(start), files_of(folder), whole[3]
    sentences = [line for line in said.split("\n") if line.startswith("mamba: ") or "> mamba: " in line]
    where = f"call {n}, {what}: status {status}: {said[-300:]!r}"
    if not what:
        return None  # fewer calls than the last time
    if status not in (0, 1):
        return where
    if any(each.endswith("mamba: ") or "(null)" in each for each in sentences) or (status and not sentences):
        return f"no sentence: {where}"
    if any(each.endswith(".tmp") for each in after):
        return f"a temporary is left: {where}"
    for each in set(before) | set(wanted):
        got = after.get(each)
        if each.endswith(".csv"):
            continue
        if got not in (before.get(each), wanted.get(each)) and not is_whole(program, folder, each, name):
            return f"{each} is neither the old file nor the new one: {where}"
        if got is None and each in before:
            return f"{each} is lost: {where}"
    same = out == whole[1] and all(times_removed(each, after.get(each, b"")) == times_removed(each, wanted[each])
                                   for each in wanted if not each.endswith(".train"))
    if status == 0 and what in WRITES and not same and name != "a session":
        return f"status 0 after a write that failed: {where}"
    if status == 0 and not same and not sentences:
        return f"status 0, and the result is another: {where}"
    return None


def main():
    compiler = os.environ.get("CC", "cc")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as scratch:
        program, start, folder = (os.path.join(scratch, name) for name in ("mamba", "start", "run"))
        sources = [os.path.join(ROOT, name) for name in ("mamba.c", "tests/faults.c")]
        subprocess.run([compiler, "-O1", "-std=gnu11", "-w", *sources, "-o", program, "-lm"] + [f"-Wl,--wrap={name}" for name in WRAPPED],
                       check=True)
        os.mkdir(start)
        shutil.copy(os.path.join(ROOT, "tests/odd.bin"), os.path.join(start, "m"))
        with open(os.path.join(start, "text"), "w") as f:
            f.write("Once upon a time there was a girl.\nShe had a dog, and it barked at the moon all night long.\n" * 3)
        prepare = [["m", "Once", "-n", "2", "-t", "0", "--save-state", "s"], ["train", "-o", "c", "--data", "text"] + TINY[:1] + ["1"] +
                   TINY[2:] + ["--schedule", "constant"]]
        for arguments in prepare:
            run(program, start, arguments, "")
        FORMS[[form[0] for form in FORMS].index("train --resume")][1].extend(["--schedule", "constant"])
        with open(os.path.join(start, "ids"), "wb") as f:
            f.write(run(program, start, ["tokenize", "m", "text"], "")[1])
        with open(os.path.join(start, "out"), "wb") as f:
            f.write(b"an old file")
        shutil.copy(os.path.join(start, "s"), os.path.join(start, "state"))  # outputs replace their own kind alone
        shutil.copy(os.path.join(start, "m"), os.path.join(start, "model"))
        for form in FORMS:
            shutil.copytree(start, folder)
            status, out, said, calls = run(program, folder, form[1], form[2])
            whole = (status, out, said, files_of(folder))
            wrong = [] if status == 0 else [f"without a fault: status {status}: {said}"]
            for n in range(1, int(calls or 0) + 1, every):
                problem = one_fault(program, start, folder, form, whole, n)
                if problem:
                    wrong.append(problem)
            check(not wrong, f"{form[0]}: {calls} calls, each fails once", "\n".join(wrong[:6]) + f"\n{len(wrong)} in all")
            shutil.rmtree(folder)
    print(f"{passed} passed, {failed} failed, 0 skipped")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
