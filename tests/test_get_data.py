#!/usr/bin/env python3
"""test_get_data.py: dev/get_data.py against a web server on 127.0.0.1. Python's standard library only. The last line is
`N passed, N failed, N skipped`.

  python tests/test_get_data.py [FOLDER]    FOLDER has the real packages or archives: those are taken through the server too
"""
import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import os
import sys
import tarfile
import tempfile
import threading

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "dev"))
import get_data  # noqa: E402

passed = failed = 0


def check(good, name, detail=""):
    global passed, failed
    print(("ok   " if good else "FAIL ") + name)
    if good:
        passed += 1
    else:
        failed += 1
        print("    ", detail)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves Server.files with ranges, unless told otherwise; Server.cut: the bytes after which a connection ends."""
    files, ranges, cut, asked = {}, True, None, []

    def do_GET(self):
        data = Server.files.get(self.path)
        asked = self.headers.get("Range")
        Server.asked.append((self.path, asked))
        if data is None:
            self.send_error(404)
            return
        start = int(asked[6:].rstrip("-")) if asked and Server.ranges else 0
        if start >= len(data) and start:
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = data[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if Server.cut is None else body[:Server.cut])

    def log_message(self, *_):
        pass


def run(*arguments):
    """(status, stdout and stderr)"""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = get_data.main(list(arguments))
    return status, out.getvalue()


def tar_of(files, mode="w:gz"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def deb_of(files):
    data = b"!<arch>\n"
    for name, body in ("debian-binary", b"2.0\n"), ("control.tar.xz", tar_of({}, "w:xz")), ("data.tar.xz", tar_of(files, "w:xz")):
        data += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
    return data


def serve(name, data):
    """Puts a download of get_data.py on the server, with the checksum of data."""
    Server.files["/" + name] = data
    for source in get_data.SOURCES.values():
        for item in source["downloads"]:
            if item["name"] == name and "sha256" in item:
                item["sha256"], item["bytes"] = hashlib.sha256(data).hexdigest(), len(data)


def test_downloads(address, folder):
    name, part = os.path.join(folder, "tinyshakespeare.txt"), os.path.join(folder, "tinyshakespeare.txt.part")
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20000
    serve("tinyshakespeare.txt", text)
    get = functools.partial(run, "shakespeare", "-o", folder, "--mirror", address)
    Server.cut = 300000
    status, said = get()
    check(status == 1 and "run the command again" in said and os.path.getsize(part) == 300000 and not os.path.exists(name),
          "a connection that ends early", said)
    Server.cut = None
    status, said = get()
    check(status == 0 and open(name, "rb").read() == text and not os.path.exists(part), "the next run has the whole file", said)
    check(Server.asked[-1][1] == "bytes=300000-" and "goes on after 0.3 MB" in said, "and goes on where it stopped", said)
    check("100%" in said and "MB/s" in said and "public domain" in said, "progress and licence are told", said)
    before = len(Server.asked)
    status, said = get()
    check(status == 0 and len(Server.asked) == before and "is there" in said, "a file that is there is not fetched again", said)
    os.rename(name, part)
    status, said = get()
    check(status == 0 and open(name, "rb").read() == text, "a part that is whole already", said)
    with open(name, "wb") as f:
        f.write(b"mine")
    status, said = get()
    check(status == 1 and "is another file" in said and open(name, "rb").read() == b"mine", "a file of the user's is left alone", said)
    os.remove(name)
    Server.ranges = False
    with open(part, "wb") as f:
        f.write(text[:1000])
    status, said = get()
    check(status == 0 and open(name, "rb").read() == text, "a server without ranges: from the start", said)
    Server.ranges = True
    os.remove(name)
    with open(part, "wb") as f:
        f.write(b"x" * 1000)
    status, said = get()
    check(status == 1 and "nothing is kept" in said and not os.path.exists(part) and not os.path.exists(name), "a wrong checksum", said)
    del Server.files["/tinyshakespeare.txt"]
    status, said = get()
    check(status == 1 and "404" in said and address in said, "a file that the server has not", said)
    status, said = run("shakespeare", "-o", folder, "--mirror", "http://127.0.0.1:1")
    check(status == 1 and "127.0.0.1:1/tinyshakespeare.txt: " in said, "no server", said)
    with open(os.path.join(folder, "file"), "wb"):
        pass
    status, said = run("shakespeare", "-o", os.path.join(folder, "file"), "--mirror", address)
    check(status == 1 and "file" in said, "a folder that cannot be made", said)


def test_contents(address, folder):
    genomes, names = [{}, {}], list(get_data.GENOMES)
    for i, (path, name, _) in enumerate(names):
        data = f">{name}\nACGT\n".encode()
        place = f"./usr/share/doc/x/examples/{path}.gz"
        genomes[i == len(names) - 1][place] = gzip.compress(data)
        get_data.GENOMES[i] = (path, name, hashlib.sha256(data).hexdigest())
    for item, files in zip(get_data.SOURCES["genomes"]["downloads"], genomes):
        serve(item["name"], deb_of(files))
    status, said = run("genomes", "-o", folder, "--mirror", address)
    good = all(open(os.path.join(folder, name), "rb").read() == f">{name}\nACGT\n".encode() for _, name, _ in names) if status == 0 else False
    check(good, "genomes out of Debian packages", said)
    get_data.GENOMES[0] = (*get_data.GENOMES[0][:2], "0" * 64)
    status, said = run("genomes", "-o", folder, "--mirror", address)
    check(status == 1 and "its checksum differs" in said, "a genome that is another", said)
    get_data.GENOMES[0] = ("no/such", *get_data.GENOMES[0][1:])
    status, said = run("genomes", "-o", folder, "--mirror", address)
    check(status == 1 and "not in" in said, "a package without a genome", said)

    serve("fsdd.tar.gz", tar_of({f"fsdd/recordings/{d}_{who}_0.wav": b"RIFF%d" % d for d in range(10) for who in ("a", "b")}))
    status, said = run("digits", "-o", folder, "--mirror", address)
    check(status == 0 and "20 recordings; doc/RESULTS.md was made with 3000" in said, "recordings that are others than ours", said)

    books = {f"x-1/{author}/{title}.md": f"# Title: {title}\n## Author: {author}\n-------\n\n## I\n\nOne _two_\nthree.\n\nFour  \nfive.\n".encode()
             for author, title in (("Washington Irving", "Rip Van Winkle"), ("Charles Dickens", "Christmas Stories"),
                                   ("Lucy Maud Montgomery", "Christmas Stories"), ("J. M. Barrie", "Peter and Wendy"), ("A", "Another"))}
    serve("classic-books-markdown.tar.gz", tar_of(books))
    status, said = run("tales", "-o", folder, "--mirror", address)
    text = open(os.path.join(folder, "children_pd.txt"), encoding="utf-8").read() if status == 0 else ""
    check(text == "I\n\nOne two three.\n\nFour\nfive.\n<|endoftext|>\n" * 3 and "3 books" in said, "books out of Markdown", said + text)
    check("without The Christmas Angel" in said, "books that are missing are named", said)
    os.remove(os.path.join(folder, "classic-books-markdown.tar.gz"))
    serve("classic-books-markdown.tar.gz", b"no tar file")
    status, said = run("tales", "-o", folder, "--mirror", address)
    check(status == 1 and "get_data.py: " in said, "an archive that is none", said)


def test_command():
    check(run("genome")[1].count("did you mean genomes?") == 1, "a near miss")
    check(run()[0] == 1 and "one of shakespeare" in run()[1], "no name")
    said = run("--list")[1]
    check(all(item["address"] in said and item["tried"] in said for source in get_data.SOURCES.values() for item in source["downloads"]),
          "--list has every address and whether it was tried", said)


def test_real(address, folder, files):
    """The real files, where there are some: every checksum of get_data.py is compared."""
    global skipped
    for name, source in get_data.SOURCES.items():
        names = [item["name"] for item in source["downloads"]]
        if not all(os.path.exists(os.path.join(files, each)) for each in names):
            print(f"skip {name}: not in {files}")
            skipped += 1
            continue
        for each in names:
            with open(os.path.join(files, each), "rb") as f:
                Server.files["/" + each] = f.read()
        status, said = run(name, "-o", folder, "--mirror", address)
        check(status == 0 and "differ" not in said, f"the real {name}", said)


skipped = 0
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
here = f"http://127.0.0.1:{server.server_address[1]}"
if len(sys.argv) > 1:
    with tempfile.TemporaryDirectory() as scratch:
        test_real(here, scratch, sys.argv[1])
for test in test_downloads, test_contents:
    with tempfile.TemporaryDirectory() as scratch:
        test(here, scratch)
test_command()
server.shutdown()
print(f"{passed} passed, {failed} failed, {skipped} skipped")
sys.exit(failed > 0)
