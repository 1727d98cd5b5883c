#!/usr/bin/env python3
"""test_web.py: the page of `make web` in a headless Chromium, against ./mamba.

    python3 tests/test_web.py [PICTURES]     PICTURES: a folder for screenshots

Needs web/site (make web), ./mamba, and Chromium. The last line is `N passed, N failed, N skipped`.
"""
import os
import struct
import subprocess
import sys
import tempfile
import time

import browser

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SITE = os.path.join(ROOT, "web", "site")
STORY = os.path.join(ROOT, "models", "story.bin")
TALES = os.path.join(ROOT, "models", "tales.bin")
PROMPT = "Once upon a time"
PASSAGE = ("The old woman said, \"Who are you?\" and the wolf, who was very hungry, told her that "
           "he had lost his way in the dark wood.\n\nThe Queen of the fairies came at Christmas to "
           "the little house of the woodcutter, and there was grandmother's red shawl upon the "
           "door. Nobody knew how it had come there, and nobody dared to ask. So they waited till "
           "morning.")
counts = {"passed": 0, "failed": 0}


def check(name, good, note=""):
    counts["passed" if good else "failed"] += 1
    print("%s %-62s %s" % ("ok  " if good else "FAIL", name, note), flush=True)


def mamba(*args):
    done = subprocess.run([os.path.join(ROOT, "mamba"), *args], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, check=True)
    return done.stdout.decode()


def same_text(name, got, want):
    at = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
    check(name, got == want and len(got) > 20,
          "%d characters" % len(got) if got == want else "differs at %d: %r, not %r"
          % (at, got[at:at + 30], want[at:at + 30]))


class Mamba(browser.Page):
    """The page, and what one does with it."""

    def idle(self, seconds=120):
        self.wait("document.body.dataset.busy === '0'", seconds)

    def set(self, **values):
        for name, value in values.items():
            self.do("$('%s').value = %r; $('%s').oninput?.()" % (name, value, name))

    def read(self, words, most):
        self.set(words=words, most=most)
        self.click("#go")
        self.wait("document.body.dataset.busy === '1' || current.tokens.length > 0")
        self.idle()
        self.wait("document.querySelectorAll('.tok').length === +document.body.dataset.coloured")

    def text(self):
        return self.do("current.tokens.map(token => token.text).join('')")

    def click(self, selector):
        box = self.do("(e => { e.scrollIntoView({block: 'center'}); const b = "
                      "e.getClientRects()[0]; return [b.x + b.width / 2, b.y + b.height / 2] })"
                      "(document.querySelector(%r))" % selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left",
                      clickCount=1)

    def look(self, at, layer, channel):
        self.do("choose(%d, %d)" % (layer, channel))
        self.click("#t%d" % at)
        self.wait("document.body.dataset.looked === '%d %d %d'" % (at, layer, channel))

    def failed(self):
        return self.do("$('failed').hidden ? '' : $('failed').textContent")


def greedy(page):
    page.set(temperature=0, topP=1, seed=1)


def test_text(page):
    greedy(page)
    page.read(PROMPT, 100)
    same_text("greedy text of story.bin as by ./mamba", page.text(),
              mamba(STORY, PROMPT, "-t", "0", "-n", "100").rstrip("\n"))
    bytes_ = page.do("model.stateBytes")
    info = mamba("info", STORY)
    check("the state's size as in ./mamba info", "%d bytes a sequence" % bytes_ in info)
    check("the state's size stands on the page",
          page.do("$('bytes').textContent") == "{:,} bytes,".format(bytes_))
    check("tokens read are counted", page.do("$('position').textContent") == "104")
    return float(page.do("document.body.dataset.speed"))


def test_colours(page):
    page.click("#new")
    page.read(PASSAGE, 0)
    worst, shares = 0, True
    for layer in (-1, 0, 4, 8):
        page.do("$('layer').value = %d; recolour()" % (layer + 1))
        time.sleep(0.2)
        page.wait("document.body.dataset.coloured > 0")
        extra = ["--layer", str(layer)] if layer >= 0 else []
        lines = mamba(STORY, PASSAGE, "--show-selection", *extra).splitlines()
        want = [line.split("\t")[:2] for line in lines]
        got = page.do("[...document.querySelectorAll('.tok')].map(e => [e.dataset.id, "
                      "e.dataset.delta, e.style.getPropertyValue('--share')])")
        if [w[0] for w in want] != [g[0] for g in got]:
            check("the tokens of --show-selection", False)
            return
        worst = max([worst] + [abs(float(g[1]) / float(w[1]) - 1) for g, w in zip(got, want)])
        order = sorted(got, key=lambda g: float(g[1]))
        shares = shares and all(float(a[2]) <= float(b[2]) for a, b in zip(order, order[1:]))
        shares = shares and float(order[-1][2]) == 1 and float(order[0][2]) == 0
    check("delta of each token as --show-selection prints it", worst < 1e-4,
          "%d tokens, all layers and 3 of them, error %.1e of 1e-4" % (len(got), worst))
    check("colours go with delta", shares)


def state_of(path, model):
    with open(path, "rb") as f:
        data = f.read()[512:]
    floats = struct.unpack("<%df" % (len(data) // 4), data)
    return floats[int(model["V"] + model["layers"] * (model["K"] - 1) * model["E"]):]


def test_channel(page, folder):
    path = os.path.join(folder, "native.state")
    mamba(STORY, PASSAGE, "-n", "0", "--save-state", path)
    model = page.do("model")
    h, last = state_of(path, model), page.do("current.tokens.length") - 1
    E, N = int(model["E"]), int(model["N"])
    worst, sums, follows = 0, 0, 0
    for layer, channel in ((0, 5), (4, 300), (8, 639)):
        page.look(last, layer, channel)
        rows = page.do("[...$('rows').rows].map(r => [...r.cells].map(c => +c.textContent))")
        size = max(abs(row[4]) for row in rows)
        for row in rows:
            n, before, decay, inject, after = row
            worst = max(worst, abs(h[(layer * N + int(n)) * E + channel] - after) / size)
            sums = max(sums, abs(decay * before + inject - after) / size)
        page.look(last - 1, layer, channel)
        earlier = page.do("[...$('rows').rows].map(r => +r.cells[4].textContent)")
        follows = max(follows, max(abs(a - row[1]) for a, row in zip(earlier, rows)) / size)
    check("h of a channel as in a state that ./mamba saves", worst < 1e-3, "error %.1e" % worst)
    check("h after is decay times h before, plus inject", sums < 1e-3, "error %.1e" % sums)
    check("h before is h after the token before", follows < 1e-3, "error %.1e" % follows)
    drawn = page.do("['before', 'decay', 'inject', 'after', 'strip', 'map'].map(id => {"
                    " const c = $(id), g = c.getContext('2d');"
                    " const d = g.getImageData(0, 0, c.width, c.height).data;"
                    " return new Set(new Uint32Array(d.buffer)).size })")
    check("six pictures are drawn", min(drawn) > 1, str(drawn))


def test_states(page, folder):
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=folder)
    page.click("#new")
    page.read(PROMPT, 40)
    saved = os.path.join(folder, "mamba-44-tokens.state")
    page.click("#save")
    for _ in range(100):
        if os.path.exists(saved):
            break
        time.sleep(0.1)
    before = page.text()
    page.read("", 40)
    after = page.text()[len(before):]
    check("a saved state has the size that stands there",
          os.path.getsize(saved) == page.do("model.stateBytes"))
    same_text("./mamba goes on from a state that the page saved", after,
              mamba(STORY, "", "-t", "0", "-n", "40", "--load-state", saved).rstrip("\n"))
    native = os.path.join(folder, "once.state")
    first = mamba(STORY, PROMPT, "-t", "0", "-n", "40", "--save-state", native).rstrip("\n")
    page.choose_file("#state-file", native)
    page.wait("current.note.includes('once.state')")
    page.read("", 40)
    same_text("the page goes on from a state that ./mamba saved", first + page.text(),
              before + after)
    page.choose_file("#state-file", os.path.join(ROOT, "README.md"))
    page.wait("!$('failed').hidden")
    check("a file that is no state is refused by name", "README.md" in page.failed(), page.failed())
    # Forks: the whole text again from the middle of it, and the first one as it was.
    page.do("show(texts[0])")
    page.click("#t23")
    page.click("#fork")
    check("a fork has the text up to the token", page.do("current.tokens.length") == 24)
    page.read("", 60)
    check("a fork goes on as the text did", page.text() == before + after)
    page.read(" The dragon", 10)
    page.do("show(texts[0])")
    check("the text before stays as it was", page.text() == before + after)
    page.read("", 10)
    check("and goes on", page.do("$('position').textContent") == "94")


def test_files(page, folder):
    page.drop(os.path.join(ROOT, "README.md"))
    page.wait("!$('failed').hidden")
    page.idle()
    check("a file that is no model is refused by name", "README.md" in page.failed(), page.failed())
    check("the text is still there", page.do("current.tokens.length") == 94)
    page.drop(TALES)
    page.wait("document.body.dataset.model === 'tales.bin'")
    page.idle()
    greedy(page)
    page.read(PROMPT, 40)
    same_text("a dropped model.bin: its greedy text as by ./mamba", page.text(),
              mamba(TALES, PROMPT, "-t", "0", "-n", "40").rstrip("\n"))
    page.drop(os.path.join(ROOT, "tests", "plain.bin"))
    page.wait("document.body.dataset.model === 'plain.bin'")
    page.idle()
    page.read("n\u00e9e", 0)
    check("where tokens are bytes, characters are put together", page.text() == "n\u00e9e")
    cut = os.path.join(folder, "cut.bin")
    with open(TALES, "rb") as whole, open(cut, "wb") as part:
        part.write(whole.read()[:1000000])
    page.drop(cut)
    page.wait("document.body.dataset.model === 'story.bin'")
    page.idle()
    check("a damaged model is refused, and the stories are back",
          "truncated or damaged" in page.failed(), page.failed()[:60])


def test_keys(page):
    page.click("#new")
    page.do("$('words').focus()")
    page.set(words=PROMPT, most=1000, temperature=0.8, topP=0.95)
    page.key("Enter")
    page.wait("current.tokens.length > 10")
    page.key("Escape")
    page.idle()
    check("Enter writes, Escape stops", 10 < page.do("current.tokens.length") < 1000)
    count = page.do("current.tokens.length")
    page.set(words=PASSAGE * 40)
    page.do("$('words').focus()")
    page.key("Enter")
    page.wait("current.tokens.length > %d" % count)
    page.key("Escape")
    page.idle()
    check("Escape stops the reading, too", page.do("current.tokens.length") < count + 92 * 40)
    page.do("$('text').focus()")
    for key, want in (("End", "current.tokens.length - 1"), ("Home", "0"), ("ArrowRight", "1"),
                      ("ArrowRight", "2"), ("ArrowLeft", "1")):
        page.key(key)
        check("in the text: " + key, page.do("selected === " + want))
    page.key("ArrowDown")
    check("in the text: ArrowDown, the next channel", page.do("channel === +$('at-channel').value"))
    unnamed = page.do("[...document.querySelectorAll('button, select, textarea, input')].filter("
                      "e => e.offsetParent && !e.textContent.trim() && !e.labels?.length)"
                      ".map(e => e.id)")
    check("every control has a name", unnamed == [], str(unnamed))


CONTRAST = """(() => {
  const g = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const light = colour => {
    g.fillStyle = colour;
    g.fillRect(0, 0, 1, 1);
    const [r, b, c] = [...g.getImageData(0, 0, 1, 1).data].map(v => {
      v /= 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * b + 0.0722 * c + 0.05;
  };
  return Math.min(...[...document.querySelectorAll('.tok')].map(e => {
    const s = getComputedStyle(e), a = light(s.color), b = light(s.backgroundColor);
    return Math.max(a, b) / Math.min(a, b);
  }));
})()"""


def test_looks(page, pictures):
    page.click("#new")
    greedy(page)
    page.read(PROMPT, 120)
    page.look(60, 2, 33)
    page.do("document.activeElement.blur(); scrollTo(0, 0)")
    for name, width, dark in (("light", 1280, False), ("dark", 1280, True), ("narrow", 360, False),
                              ("narrow-dark", 360, True)):
        page.size(width, 900)
        page.dark(dark)
        time.sleep(0.3)
        over = page.do("document.documentElement.scrollWidth - innerWidth")
        check("%s: nothing is wider than the window" % name, over <= 0, "%d pixels" % over)
        least = page.do(CONTRAST)
        check("%s: every token can be read" % name, least >= 4, "contrast %.1f" % least)
        if pictures:
            page.picture(os.path.join(pictures, name + ".png"), whole=width < 1000)
    page.size(1280, 900)
    page.dark(False)


def test_copying(page, pictures):
    page.do("$('model').value = 'copying.bin'; $('model').onchange()")
    page.wait("document.body.dataset.model === 'copying.bin'")
    page.idle()
    page.set(length=256, seed=7)
    page.click("#go")
    page.wait("current.tokens.length === 256")
    page.idle()
    page.wait("document.body.dataset.coloured === '256'")
    check("selective copying: all letters come back",
          "16 of 16 letters are right" in page.do("$('speed').textContent"))
    means = page.do("current.tokens.map(token => [token.id, token.means[0]])")[:240]
    near = [d for i, (id_, d) in enumerate(means) if any(m[0] for m in means[max(0, i - 2):i + 1])]
    noise = [d for i, (id_, d) in enumerate(means)
             if not any(m[0] for m in means[max(0, i - 4):i + 1])]
    ratio = sum(near) / len(near) / (sum(noise) / len(noise))
    check("noise is skipped: its delta is smaller", ratio > 3, "%.1f times" % ratio)
    if pictures:
        time.sleep(0.5)
        page.picture(os.path.join(pictures, "copying.png"))


def main():
    pictures = sys.argv[1] if len(sys.argv) > 1 else None
    program = browser.find()
    if not program:
        print("skip: no Chromium\n0 passed, 0 failed, 1 skipped")
        return 1
    page_bytes = sum(os.path.getsize(os.path.join(SITE, name)) for name in os.listdir(SITE)
                     if not name.endswith((".bin", ".wasm")))
    check("the page has less than 60 kB", page_bytes < 60000, "%d bytes" % page_bytes)
    page = Mamba(program)
    with tempfile.TemporaryDirectory() as folder:
        try:
            page.call("Page.navigate", url="file://" + os.path.join(SITE, "index.html"))
            page.wait("document.getElementById('failed')?.textContent.includes('web server')")
            check("opened as a file, it asks for a web server", True)
            page.problems.clear()
            page.call("Page.navigate", url=browser.serve(SITE) + "?auto=0")
            page.wait("document.body && document.body.dataset.model === 'story.bin'")
            speed = test_text(page)
            test_colours(page)
            test_channel(page, folder)
            test_states(page, folder)
            test_files(page, folder)
            test_keys(page)
            test_looks(page, pictures)
            test_copying(page, pictures)
            problems = [str(problem)[:200] for problem in page.problems]
            check("no error in the console", not problems, "; ".join(problems))
            print("---- story.bin wrote %.0f tokens a second" % speed)
        finally:
            page.close()
    print("%d passed, %d failed, 0 skipped" % (counts["passed"], counts["failed"]))
    return counts["failed"] > 0


sys.exit(main())
