#!/usr/bin/env python3
"""tests/test_chat.py ./mamba: chat templates. The ids of conversations are those of transformers (tests/chat/, made by
dev/make_chat_golden.py), a session reads the same ids turn by turn, a user's text never becomes a special token, and a template
that cannot be stored is left out with the reason. The last line is `N passed, N failed, N skipped`."""
import json
import os
import struct
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
MAMBA = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else "./mamba")
EXPORT = os.path.join(HERE, "..", "export.py")
CHAT = os.path.join(HERE, "chat")
passed = failed = 0


def check(good, name, why=""):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    print(("ok   " if good else "FAIL ") + name + ("" if good else f": {why}"), flush=True)


def mamba(*args, data=b"", **options):
    return subprocess.run([MAMBA, *args], input=data, capture_output=True, **options)


def export(*args):
    return subprocess.run([sys.executable, EXPORT, *args], capture_output=True, text=True)


def chat_ids(model, texts, system=None):
    how = ["--system", system] if system is not None else []
    run = mamba("tokenize", model, "-", "--chat", *how, data="\0".join(texts).encode())
    return [int(i) for i in run.stdout.split()] if run.returncode == 0 else run.stderr.decode()


def read_tokens(path):
    """The tokens that a saved state has read, at most the last 64, and how many they are in all."""
    with open(path, "rb") as f:
        head = f.read(512)
    position, = struct.unpack_from("<Q", head, 40)
    n, = struct.unpack_from("<I", head, 64)
    recent = struct.unpack_from("<64i", head, 68)
    return [recent[p % 64] for p in range(position - n, position)], position


def with_template(folder, template, **settings):
    """A folder like `folder` with another template."""
    os.makedirs(folder, exist_ok=True)
    name = settings.pop("like", "falcon-mamba-7b-instruct")
    with open(os.path.join(CHAT, name, "tokenizer.json"), encoding="utf-8") as f:
        table = json.load(f)
    with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as f:
        json.dump(table, f)
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump({"chat_template": template, "eos_token": "<|im_end|>", **settings}, f)
    return os.path.join(folder, "tokenizer.json")


CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LEFT_OUT = {
    "no template": ("{% for %}", "not jinja2"),
    "a template that fails": ("{{ raise_exception('never') }}", "never"),
    "no user's text": ("{{ 'x' }}", "0 times"),
    "the text twice": (CHATML.replace("m.content +", "m.content + m.content +"), "2 times"),
    "capitals": (CHATML.replace("m.content", "(m.content | capitalize)"), "more than to put text around"),
    "the length": (CHATML.replace("'<|im_start|>' +", "'<|im_start|>' + (m.content | length | string) +"), "left out"),
    "another start of a reply": (CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'"),
                                 "not what the model writes after"),
    "no special token": (CHATML.replace("<|im_end|>", ""), "no special token ends a reply"),
    "the sandbox": ("{{ messages.__class__.__mro__ }}", "fails"),
    "no end": ("{% for a in range(99999999999) %}{% endfor %}", "fails"),
}


def templates(folder):
    for name, (template, why) in LEFT_OUT.items():
        out = os.path.join(folder, "left_out.bin")
        run = export(with_template(os.path.join(folder, "t"), template), out)
        check(run.returncode == 0 and "chat: left out" in run.stderr and why in run.stderr, f"left out: {name}", run.stderr)
    check("has no chat template" in str(chat_ids(out, ["x"])), "a tokenizer without a template says so")
    trims = CHATML.replace("m.content", "(m.content | trim)")
    run = export(with_template(os.path.join(folder, "t"), trims), out)
    same = chat_ids(out, ["  a b \n"]) == chat_ids(out, ["a b"])
    check(run.returncode == 0 and same, "a template that strips texts", run.stderr)
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    export(with_template(os.path.join(folder, "t"), no_system), out)
    check("no system text" in str(chat_ids(out, ["a"], "b")), "a template without a system text", str(chat_ids(out, ["a"], "b")))
    listed = [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}]
    export(with_template(os.path.join(folder, "t"), listed), out)
    plain = chat_ids(out, ["a", "b", "c"])
    check(isinstance(plain, list), "the default of several templates", plain)
    path = with_template(os.path.join(folder, "t"), None)
    with open(os.path.join(folder, "t", "chat_template.jinja"), "w", encoding="utf-8") as f:
        f.write(CHATML)
    export(path, out)
    check(chat_ids(out, ["a", "b", "c"]) == plain, "chat_template.jinja")


def talk(model, state, turns, *args):
    """The tokens that a session has read after these turns, the last 64 and their number. A reply has 3 tokens."""
    data = "\n".join([*turns, f"/save {state}", ""]).encode()
    run = mamba(model, "--chat", "-n", "3", "-t", "0", "--quiet", *args, data=data)
    return read_tokens(state) if run.returncode == 0 else (run.stderr.decode(), 0)


def session(folder, name, blob):
    """A random model with this tokenizer is spoken to: it reads what the whole conversation is, turn by turn."""
    model, data, state = (os.path.join(folder, n) for n in ("m.bin", "data", "state"))
    with open(data, "w", encoding="utf-8") as f:
        f.write("some words to learn from " * 40)
    run = mamba("train", "-o", model, "--data", data, "--tokenizer", blob, "--steps", "1", "--batch", "1", "--length", "16",
                "--d-model", "16", "--layers", "1", "--force")
    check(run.returncode == 0, f"{name}: train takes the template over", run.stderr.decode())
    got, n = talk(model, state, ["Hi", "More"], "--system", "Be")
    one, whole = chat_ids(blob, ["Hi"], "Be"), chat_ids(blob, ["Hi", "reply", "More"], "Be")
    two = n - len(one) - 6  # tokens of the second turn: from the end of the reply on
    known = len(got) - 6 - two  # of the first turn, those that the state remembers
    check(two > 3 and got[known + 3:-3] == whole[-two:] and got[:known] == one[len(one) - known:],
          f"{name}: turn by turn the ids of the whole", f"{got} {one} {whole}")
    lengths = [talk(model, state, ["A turn"] * k)[1] for k in (1, 50, 99)]
    check(lengths[2] - lengths[1] == lengths[1] - lengths[0] > 0, f"{name}: turn 99 reads what turn 2 read", str(lengths))
    run = mamba(model, "Hi", "--chat", "-n", "3", "-t", "0")
    check(run.returncode == 0 and b"prefill" in run.stderr, f"{name}: one message", run.stderr.decode())


def main():
    with open(os.path.join(CHAT, "golden.json"), encoding="utf-8") as f:
        golden = json.load(f)
    with tempfile.TemporaryDirectory() as folder:
        for name, wanted in golden["ids"].items():
            blob = os.path.join(folder, name + ".bin")
            run = export(os.path.join(CHAT, name, "tokenizer.json"), blob)
            check(run.returncode == 0 and "left out" not in run.stderr, f"{name}: export", run.stderr)
            wrong = []
            for (system, texts), ids in zip(golden["conversations"], wanted):
                got = chat_ids(blob, texts, system)
                if got != ids:
                    wrong.append((system, texts, got, ids))
            check(not wrong and len(wanted) == 20, f"{name}: ids of {len(wanted)} conversations", str(wrong[:1]))
            with open(os.path.join(CHAT, name, "tokenizer_config.json"), encoding="utf-8") as f:
                end = json.load(f)["eos_token"]
            plain, spoilt = chat_ids(blob, ["a"]), chat_ids(blob, ["a" + end])
            with open(os.path.join(CHAT, name, "tokenizer.json"), encoding="utf-8") as f:
                marker = next(t["id"] for t in json.load(f)["added_tokens"] if t["content"] == end)
            check(spoilt.count(marker) == plain.count(marker) and len(spoilt) > len(plain),
                  f"{name}: {end} in a user's text is text", f"{plain} {spoilt}")
            session(folder, name, blob)
        check("after a text of the user" in str(chat_ids(blob, ["a", "b"])), "a conversation that ends in a reply")
        templates(folder)
    print(f"{passed} passed, {failed} failed, 0 skipped")
    return failed or not passed


if __name__ == "__main__":
    sys.exit(main())
