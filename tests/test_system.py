#!/usr/bin/env python3
"""What the system refuses: a write, a thread, memory for many threads; a clock that stands still.

    python3 tests/test_system.py [--command ./mamba] [TEXT]

Each form of the commands below runs once for each n, and the n-th write or the n-th start of a
thread fails (tests/system.c; tests/test_faults.py lets the other calls fail). With TEXT only the
forms whose name contains it. After each run must hold:

  no crash and no hang; status 0 or 1; with status 1 a sentence on stderr
  with status 0 the output is the whole output, as without a fault
  with status 1 a file that was there is as it was, or it is another one that can be loaded
  no temporary file is left
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile

KINDS = ["write", "thread"]
PLAIN = "tests/plain.bin"

# name, arguments ({} is the work folder), stdin, files that the form writes, whether stdout counts
FORMS = [
    ("generation", [PLAIN, "Once upon a time", "-n", "8", "-s", "1"], "", [], True),
    ("generation, two threads", ["models/tales.bin", "x" * 40, "-n", "2", "-s", "1", "-T", "2"],
     "", [], True),
    ("session", [PLAIN, "-n", "4", "-s", "1"], "one\ntwo\n", [], True),
    ("state saved", [PLAIN, "Once", "-n", "3", "-s", "1", "--save-state", "{}/new"], "",
     ["new"], True),
    ("state replaced", [PLAIN, "Once", "-n", "3", "-s", "1", "--load-state", "{}/state",
                        "--save-state", "{}/state"], "", ["state"], True),
    ("batch", [PLAIN, "--batch", "-", "-n", "4", "-s", "1"], "one\ntwo\nthree\n", [], True),
    ("samples", [PLAIN, "Once", "--samples", "3", "-n", "4", "-s", "1"], "", [], True),
    ("selection", [PLAIN, "Once", "--show-selection"], "", [], True),
    ("quantising", ["quantize", PLAIN, "{}/model", "q4"], "", ["model"], False),
    ("logits", ["logits", PLAIN, "Once upon", "--all", "-o", "{}/text"], "", ["text"], False),
    ("evaluation", ["eval", PLAIN, "{}/text"], "", [], False),
    ("tokenize", ["tokenize", PLAIN, "{}/text"], "", [], True),
    ("info", ["info", PLAIN, "--verify"], "", [], True),
    ("training", ["train", "-o", "{}/new", "--data", "{}/text", "--steps", "2", "--batch", "2",
                  "--length", "16", "--d-model", "16", "--layers", "1", "-s", "1"], "",
     ["new"], False),
    ("training over a model", ["train", "-o", "{}/model", "--force", "--data", "{}/text",
                               "--steps", "2", "--batch", "2", "--length", "16", "--d-model",
                               "16", "--layers", "1", "-s", "1"], "", ["model"], False),
]


class Faults:
    def __init__(self, mamba, library):
        self.mamba, self.library = mamba, library
        self.passed = self.failed = self.runs = 0

    def prepare(self, folder):
        os.mkdir(folder)
        subprocess.run([self.mamba, PLAIN, "Once", "-n", "3", "-s", "1", "--save-state",
                        folder + "/state"], capture_output=True, check=True)
        shutil.copy("tests/odd.bin", folder + "/model")
        with open(folder + "/text", "w", encoding="utf-8") as f:
            f.write("A text of some words to learn from, and to be surprised by.\n" * 12)

    def run(self, form, folder, fault=None, count=None):
        environment = dict(os.environ, LD_PRELOAD=self.library, OMP_WAIT_POLICY="passive")
        if fault:
            environment["FAULT"] = fault
        if count:
            environment["FAULT_COUNT"] = count
        arguments = [a.replace("{}", folder) for a in form[1]]
        return subprocess.run([self.mamba] + arguments, input=form[2].encode(), timeout=60,
                              capture_output=True, env=environment)

    def problem(self, form, before, want, folder, result):
        """What is wrong after a run with a fault, or None."""
        code, error = result.returncode, result.stderr.decode("utf-8", "replace")
        if code not in (0, 1):
            return "status %d" % code
        if code == 1:
            said = [line for line in error.splitlines() if "mamba: " in line]
            if not said or len(said[-1].split("mamba: ", 1)[1]) < 10:
                return "no sentence: %r" % error[-200:]
        if code == 0 and form[4] and result.stdout != want[""]:
            if form[0] != "session" or "mamba: " not in error:  # a turn that fails is named there
                return "status 0, and another text on stdout"
        for name in form[3]:
            path = os.path.join(folder, name)
            now = open(path, "rb").read() if os.path.exists(path) else None
            if code == 0 and now != want[name]:
                return "status 0, and %s is not what it should be" % name
            if now != want[name] and now != before.get(name) and not self.whole(name, path):
                return "%s is neither the old file nor a whole one" % name
        left = [name for name in os.listdir(folder) if name.endswith(".tmp")]
        return "temporary files are left: %s" % left if left else None

    def whole(self, name, path):
        """Whether the file is a state or a model, of another moment: a state is saved also where
        the text could not be printed."""
        if not os.path.exists(path):
            return False
        state = [PLAIN, "", "-n", "0", "--load-state", path]
        model = ["info", path, "--verify"]
        return any(subprocess.run([self.mamba] + a, capture_output=True).returncode == 0
                   for a in (state, model))

    def test(self, form, work):
        master, folder = os.path.join(work, "master"), os.path.join(work, "run")
        before = {n: open(os.path.join(master, n), "rb").read() for n in form[3]
                  if os.path.exists(os.path.join(master, n))}
        shutil.copytree(master, folder)
        counts = os.path.join(work, "counts")
        result = self.run(form, folder, count=counts)
        if result.returncode != 0:
            self.report(form[0], ["without a fault: status %d, %s" % (result.returncode,
                                                                     result.stderr[-300:])])
            shutil.rmtree(folder)
            return
        want = {n: open(os.path.join(folder, n), "rb").read() for n in form[3]}
        want[""] = result.stdout
        shutil.rmtree(folder)
        number = dict(line.split() for line in open(counts))
        for kind in KINDS:
            n, problems = int(number[kind]), []
            for i in range(1, n + 1):
                shutil.copytree(master, folder)
                self.runs += 1
                try:
                    problem = self.problem(form, before, want, folder,
                                           self.run(form, folder, fault="%s:%d" % (kind, i)))
                except subprocess.TimeoutExpired:
                    problem = "hangs"
                if problem:
                    problems.append("%s %d of %d: %s" % (kind, i, n, problem))
                shutil.rmtree(folder)
            if n:
                self.report("%s: %d of %s" % (form[0], n, kind), problems)

    def test_clock(self):
        """Speeds are numbers where no time passes."""
        environment = dict(os.environ, LD_PRELOAD=self.library, FAULT_CLOCK="1")
        problems = []
        for form in ([PLAIN, "Once", "-n", "5", "-s", "1"], ["eval", PLAIN, "Makefile"]):
            result = subprocess.run([self.mamba] + form, capture_output=True, env=environment)
            error = result.stderr.decode().lower()
            if result.returncode or "inf " in error or "nan" in error or "tokens/s" not in error:
                problems.append(error)
        self.report("a clock that stands still", problems)

    def test_threads(self):
        """More threads than the system allows: fewer run, the text is the same."""
        form = [self.mamba, "models/tales.bin", "Once upon a time " * 20, "-n", "3", "-s", "1"]
        want = subprocess.run(form, capture_output=True).stdout
        for megabytes in (150, 400):
            room = megabytes << 20
            result = subprocess.run(form + ["-T", "200"], capture_output=True, preexec_fn=lambda:
                                    resource.setrlimit(resource.RLIMIT_AS, (room, room)))
            good = result.returncode == 0 and result.stdout == want
            self.report("200 threads in %d MB" % megabytes, [] if good else [str(result)])

    def report(self, name, problems):
        self.passed += not problems
        self.failed += bool(problems)
        print("%s %s" % ("FAIL" if problems else "ok  ", name), flush=True)
        for line in problems[:5]:
            print("     " + line)


def main():
    arguments, mamba = sys.argv[1:], "./mamba"
    if "--command" in arguments:
        at = arguments.index("--command")
        mamba = arguments[at + 1]
        del arguments[at:at + 2]
    only = arguments
    with tempfile.TemporaryDirectory() as work:
        library = os.path.join(work, "system.so")
        subprocess.run([os.environ.get("CC", "cc"), "-O1", "-fPIC", "-shared", "tests/system.c",
                        "-o", library, "-ldl"], check=True)
        faults = Faults(mamba, library)
        faults.prepare(os.path.join(work, "master"))
        for form in FORMS:
            if not only or only[0] in form[0]:
                faults.test(form, work)
        if not only:
            faults.test_clock()
            faults.test_threads()
    print("%d faults injected" % faults.runs)
    print("%d passed, %d failed, 0 skipped" % (faults.passed, faults.failed))
    sys.exit(1 if faults.failed or not faults.passed else 0)


if __name__ == "__main__":
    main()
