#!/usr/bin/env python3
"""get_data.py: the data that README.md and doc/RESULTS.md name. Python's standard library only.

  python dev/get_data.py shakespeare        tinyshakespeare.txt, 1.1 MB
  python dev/get_data.py genomes            four bacteria and phage lambda, FASTA, 13.5 MB (fetches 28 MB)
  python dev/get_data.py digits             fsdd.tar.gz, 3,000 recordings of spoken digits
  python dev/get_data.py tales              children_pd.txt, 58 children's books, 18 MB (fetches the 755 books of the collection)
  python dev/get_data.py --list             addresses, licences, checksums

A download that was cut goes on where it stopped when the command is run again. What arrives is compared with a
checksum where we have one; a file that differs is not kept under its name.

TRIED says what could be tried when this was written, on a machine without access to most addresses. An address that
could not be tried is one that other programs use or that its index names; none is guessed.
"""
import argparse
import difflib
import gzip
import hashlib
import http.client
import io
import os
import re
import sys
import tarfile
import time
import urllib.error
import urllib.request

BOOKS_COMMIT = "f9edc0ac68ef4d4bc6b16cbc1a3d68d5783a7e28"
SOURCES = {
    "shakespeare": {
        "what": "tiny Shakespeare: 40,000 lines of the plays",
        "licence": "public domain",
        "downloads": [{
            "name": "tinyshakespeare.txt",
            "address": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            "bytes": 1115394,
            "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            "tried": "no; the address is that of nanoGPT. The checksum is that of our file",
        }],
    },
    "genomes": {
        "what": "genomes of E. coli, H. pylori, S. aureus, V. cholerae and phage lambda (NCBI sequences)",
        "licence": "public domain",
        "downloads": [{
            "name": "ragout-examples_2.3-4_all.deb",
            "address": "http://deb.debian.org/debian/pool/main/r/ragout/ragout-examples_2.3-4_all.deb",
            "bytes": 18434168,
            "sha256": "cbe6d0dd8b0e36ef2c93c9b9655955f42019dcd9e9b77388ee58ee54d50bd140",
            "tried": "yes; the file came through apt from this address, and holds our genomes",
        }, {
            "name": "bowtie2-examples_2.5.0-3_all.deb",
            "address": "http://deb.debian.org/debian/pool/main/b/bowtie2/bowtie2-examples_2.5.0-3_all.deb",
            "bytes": 9720024,
            "sha256": "9f9f580954187e501102b13484bdecdc2725155e0b8020e7a056a48a06642118",
            "tried": "yes; the file came through apt from this address, and holds our phage lambda",
        }],
    },
    "digits": {
        "what": "free spoken digit dataset 1.0.10: 3,000 recordings, 6 speakers, 8 kHz",
        "licence": "CC-BY-SA-4.0",
        "downloads": [{
            "name": "fsdd.tar.gz",
            "address": "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.tar.gz",
            "tried": "no; the address is that of SpeechBrain's recipes. The recordings are compared with ours",
        }],
    },
    "tales": {
        "what": "58 children's books of classic-books-markdown",
        "licence": "public domain in the US",
        "downloads": [{
            "name": "classic-books-markdown.tar.gz",
            "address": f"https://github.com/mlschmitt/classic-books-markdown/archive/{BOOKS_COMMIT}.tar.gz",
            "tried": "no; the commit is known from an index. The text that trained the models (sha256 29288d5c...) was "
                      "made from it by another script: line ends within paragraphs may differ",
        }],
    },
}

# What the packages hold, and under which name it is kept: part of a path, name, checksum.
GENOMES = [
    ("E.Coli/references/MG1655-K12.fasta", "E.Coli_MG1655-K12.fasta", "3d70cf9dee928a6bf8f4763a3db0e0f8bf0ae32d25123a73f7a5bf2fe4d16828"),
    ("H.Pylori/references/G27.fasta", "H.Pylori_G27.fasta", "1c05a57d60701da8fa8a9e7f2af406d4bbf0c188f8082aa982ec2e4f3494f689"),
    ("S.Aureus/references/N315.fasta", "S.Aureus_N315.fasta", "fd70c9296e0fd6d78831a5ab21afcbc2e432816780869cbde4653df8c9da0fcc"),
    ("V.Cholerae/references/O395.fasta", "V.Cholerae_O395.fasta", "20bee4e367a0c493318a18509ab0dcd0a05e98387f012971b444bb2f17ca1308"),
    ("reference/lambda_virus.fa", "lambda_virus.fa", "0a04f81952deb68c204e8ae67e0573cb97d348f18ab1b527630d57c294028cf5"),
]
RECORDINGS = 3000
RECORDINGS_SHA256 = "a2e8a660492f28d9eed6270b290d26cbc5c81d6077ce87d3c0ad5adf4d4ee696"  # of names and checksums, see recordings_sum()

# In the order of the file: the last three are those that no model of models/ was trained on. | parts other titles.
BOOKS = """The Christmas Angel; Aesop's Fables; Black Beauty; Aladdin and the Magic Lamp; Great Big Treasury of Beatrix Potter;
The Adventures of Pinocchio; Five Children and It; The Book of Dragons; The Railway Children; A Little Princess; The Secret Garden;
The Princess and the Goblin; The Boxcar Children; Andersen's Fairy Tales; The Little Mermaid; Andy Gordon;
The Merry Adventures of Robin Hood; The Story of Doctor Dolittle; Peter Pan|Peter and Wendy|Peter Pan and Wendy; The Call of the Wild;
White Fang; Irish Fairy Tales; Swiss Family Robinson; Heidi; The Wind in the Willows; A Kidnapped Santa Claus;
Dorothy and the Wizard in Oz; Ozma of Oz; The Life and Adventures of Santa Claus; The Marvelous Land of Oz; The Wonderful Wizard of Oz;
Alice's Adventures in Wonderland; Through the Looking-Glass; An Old-Fashioned Girl; Jo's Boys; Little Men; Little Women;
Anne of Avonlea; Anne of Green Gables; Anne of the Island; Anne's House of Dreams; Christmas Stories@Lucy Maud Montgomery;
Emily of New Moon; Rainbow Valley; Rilla of Ingleside; The Adventures of Tom Sawyer; The Prince and the Pauper; The Canterville Ghost;
The Happy Prince & Other Tales; The Coral Island; Kidnapped; Treasure Island; Captains Courageous; The Jungle Book;
Grimms' Fairy Tales; Hawaiian Folk Tales|Hawaiian Folktales; Old Christmas; Rip Van Winkle"""


class Failed(Exception):
    """A sentence for the user."""


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- one download

def show_progress(name, have, total, start, began, last):
    """A line on stderr, at most five times a second on a terminal, else at the end alone. Returns when it was written."""
    now = time.monotonic()
    done = total is not None and have >= total
    if not done and (now - last < 0.2 or not sys.stderr.isatty()):
        return last
    of = f" of {total / 1e6:.1f} MB, {100 * have / total:.0f}%" if total else " MB"
    speed = (have - start) / max(now - began, 1e-9) / 1e6
    end = "\n" if done or not sys.stderr.isatty() else "   \r"
    print(f"{name}: {have / 1e6:.1f}{of}, {speed:.1f} MB/s", end=end, file=sys.stderr, flush=True)
    return now


def open_address(address, have):
    """(answer, where it begins): from byte `have` on if the server can. None: there is nothing after `have`."""
    request = urllib.request.Request(address, headers={"User-Agent": "mamba.c get_data.py"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            return None, have
        raise Failed(f"{address}: the server answers {error.code} {error.reason}") from None
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        raise Failed(f"{address}: {getattr(error, 'reason', error)}") from None
    begins = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", "")) if answer.status == 206 else None
    return answer, int(begins[1]) if begins and int(begins[1]) == have else 0


def receive(address, part, name):
    """Fetches the rest of the file into `part`."""
    have = os.path.getsize(part) if os.path.exists(part) else 0
    answer, start = open_address(address, have)
    if answer is None:
        return
    if have and not start and answer.status == 206:  # another piece than was asked for
        os.remove(part)
        answer, start = open_address(address, 0)
    if start:
        print(f"{name}: goes on after {start / 1e6:.1f} MB", file=sys.stderr)
    length = answer.headers.get("Content-Length")
    total = start + int(length) if length else None
    have, began, last = start, time.monotonic(), 0
    with answer, open(part, "ab" if start else "wb") as f:
        while True:
            try:
                block = answer.read(1 << 16)
            except (OSError, http.client.HTTPException) as error:
                raise Failed(f"{address}: {error} after {have} bytes; run the command again to go on") from None
            if not block:
                break
            f.write(block)
            have += len(block)
            last = show_progress(name, have, total, start, began, last)
    if total is not None and have < total:
        raise Failed(f"{address}: the connection ended after {have} of {total} bytes; run the command again to go on")


def download(item, folder, mirror):
    """The path of a file that is whole. It is not fetched again if it is there."""
    name, wanted = item["name"], item.get("sha256")
    path = os.path.join(folder, name)
    address = mirror.rstrip("/") + "/" + name if mirror else item["address"]
    if os.path.exists(path):
        if not wanted or sha256_of(path) == wanted:
            print(f"{name}: is there", file=sys.stderr)
            return path
        raise Failed(f"{path} is there and is another file: move it away")
    part = path + ".part"
    receive(address, part, name)
    if wanted and sha256_of(part) != wanted:
        size = os.path.getsize(part)
        os.remove(part)
        raise Failed(f"{address}: {size} bytes whose checksum is not that of our {name} of {item['bytes']} bytes: nothing is kept")
    os.replace(part, path)
    return path


def write_whole(path, data):
    with open(path + ".part", "wb") as f:
        f.write(data)
    os.replace(path + ".part", path)
    print(f"{path}: {len(data):,} bytes")


# --- what is made of it

def debian_files(path):
    """The tar file in a Debian package, which is an ar archive."""
    with open(path, "rb") as f:
        data = f.read()
    at = 8
    while data[:8] == b"!<arch>\n" and at + 60 <= len(data):
        name, size = data[at:at + 16].decode("ascii", "replace").strip(), int(data[at + 48:at + 58])
        if name.startswith("data.tar"):
            return tarfile.open(fileobj=io.BytesIO(data[at + 60:at + 60 + size]))
        at += 60 + size + size % 2
    raise Failed(f"{path}: no Debian package with a data.tar in it")


def make_genomes(paths, folder):
    missing = {name for _, name, _ in GENOMES}
    for path in paths:
        with debian_files(path) as tar:
            for member in tar:
                for part, name, wanted in GENOMES:
                    if not member.isfile() or member.name.removesuffix(".gz").split("examples/", 1)[-1] != part:
                        continue
                    data = tar.extractfile(member).read()
                    data = gzip.decompress(data) if member.name.endswith(".gz") else data
                    if hashlib.sha256(data).hexdigest() != wanted:
                        raise Failed(f"{path}: {member.name} is not our {name}: its checksum differs")
                    write_whole(os.path.join(folder, name), data)
                    missing.discard(name)
    if missing:
        raise Failed(f"{', '.join(sorted(missing))}: not in {', '.join(paths)}")


def recordings_sum(path):
    """(how many, checksum): of the sorted names of all recordings, each with its own checksum."""
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = member.name.rsplit("/", 1)[-1]
            if member.isfile() and re.fullmatch(r"\d_[a-z]+_\d+\.wav", name):
                found[name] = hashlib.sha256(tar.extractfile(member).read()).digest()
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(name.encode() + b"\0" + found[name])
    return len(found), digest.hexdigest()


def check_digits(paths, folder):
    count, digest = recordings_sum(paths[0])
    if count != RECORDINGS or digest != RECORDINGS_SHA256:
        print(f"{paths[0]}: {count} recordings; doc/RESULTS.md was made with {RECORDINGS}, and some differ from these", file=sys.stderr)
    print(f"{paths[0]}: {count} recordings; next: python dev/make_speech.py {paths[0]}")


def plain_text(markdown):
    """The paragraphs of a book: a line each, unless it ends in two spaces; without headings' # and without emphasis."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", markdown.replace("\r\n", "\n")):
        lines = [re.sub(r"^#+\s*", "", line) for line in block.split("\n") if line.strip(" -*_")]
        text = "".join(line.strip() + ("\n" if line.endswith("  ") else " ") for line in lines).strip()
        text = re.sub(r"(?<!\w)([*_]{1,3})(\S(?:[^*_]*\S)?)\1(?!\w)", r"\2", text)
        if text and not re.match(r"(Title|Author|Year): ", text):
            paragraphs.append(text)
    return "\n\n".join(paragraphs)


def plain_title(title):
    return re.sub(r"[^a-z0-9]", "", title.lower())


def make_tales(paths, folder):
    books, missing, texts = {}, [], []
    with tarfile.open(paths[0]) as tar:
        for member in tar:
            parts = member.name.split("/")
            if member.isfile() and len(parts) >= 3 and parts[-1].endswith(".md"):
                title = parts[-1].removesuffix(".md")
                data = tar.extractfile(member).read()
                books.setdefault(plain_title(title), data)
                books[plain_title(title) + "@" + plain_title(parts[-2])] = data
    for entry in BOOKS.replace("\n", " ").split(";"):
        titles, _, author = entry.strip().partition("@")
        keys = [plain_title(title) + ("@" + plain_title(author) if author else "") for title in titles.split("|")]
        found = [books[key] for key in keys if key in books]
        if found:
            texts.append(plain_text(found[0].decode("utf-8", "replace")) + "\n<|endoftext|>\n")
        else:
            missing.append(titles.split("|")[0])
    if missing:
        print(f"{paths[0]}: without {', '.join(missing)}", file=sys.stderr)
    if not texts:
        raise Failed(f"{paths[0]}: holds none of the books")
    write_whole(os.path.join(folder, "children_pd.txt"), "".join(texts).encode())
    print(f"{len(texts)} books")


def nothing_more(paths, folder):
    print(f"{paths[0]}: {os.path.getsize(paths[0]):,} bytes")


MAKE = {"shakespeare": nothing_more, "genomes": make_genomes, "digits": check_digits, "tales": make_tales}


# --- the command

def print_list():
    for name, source in SOURCES.items():
        print(f"{name}: {source['what']}\n  licence {source['licence']}")
        for item in source["downloads"]:
            size = f"{item['bytes']:,} bytes" if "bytes" in item else "size not known"
            print(f"  {item['address']}\n    {size}, sha256 {item.get('sha256', 'not known')}\n    TRIED: {item['tried']}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", metavar="NAME", help=", ".join(SOURCES))
    parser.add_argument("-o", "--output", default=".", metavar="DIR", help="where the files go (default: here)")
    parser.add_argument("--mirror", metavar="URL", help="take the files from this folder of a web server instead")
    parser.add_argument("--list", action="store_true", help="addresses, sizes, licences, and whether each was tried")
    args = parser.parse_args(arguments)
    if args.list:
        print_list()
        return 0
    try:
        if args.name not in SOURCES:
            near = difflib.get_close_matches(args.name or "", SOURCES, 1)
            hint = f"did you mean {near[0]}?" if near else "one of " + ", ".join(SOURCES)
            raise Failed(f"NAME '{args.name}': {hint}" if args.name else f"a NAME is needed: {hint}")
        os.makedirs(args.output, exist_ok=True)
        source = SOURCES[args.name]
        print(f"{args.name}: {source['what']}; licence: {source['licence']}", file=sys.stderr)
        paths = [download(item, args.output, args.mirror) for item in source["downloads"]]
        MAKE[args.name](paths, args.output)
    except (Failed, OSError, EOFError, tarfile.TarError) as error:
        print(f"get_data.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nget_data.py: interrupted; run the command again to go on", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
