#!/usr/bin/env python3
"""make_speech.py: the free spoken digit dataset to mu-law bytes (mulaw.py). Python's standard library only.

  python dev/make_speech.py fsdd.tar.xz --held-out yweweler -o speech/

train.mulaw has all recordings of the other speakers, in an order that --seed shuffles, so that a window hears several voices;
heldout.mulaw has those of the speaker held out, who is never trained on, in the order of their names. A byte 0 stands before each
recording: it is no sample, and asks a model for a new recording.
"""
import argparse
import io
import os
import random
import re
import sys
import tarfile

import mulaw


def recordings(path):
    """{(speaker, digit, index): mu-law bytes}"""
    found = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = re.fullmatch(r"(?:.*/)?(\d)_([a-z]+)_(\d+)\.wav", member.name)
                if not name or not member.isfile():
                    continue
                samples, rate = mulaw.read_wav(io.BytesIO(tar.extractfile(member).read()), member.name)
                if rate != 8000:
                    sys.exit(f"make_speech.py: {member.name}: {rate} Hz; 8000 are expected")
                found[name[2], int(name[1]), int(name[3])] = mulaw.encode(samples)
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        sys.exit(f"make_speech.py: {path}: {error}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="TAR", help="with files named digit_speaker_index.wav")
    parser.add_argument("--held-out", default="yweweler", metavar="NAME", help="speaker (default yweweler, the last by name)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the order of the training recordings (default 1)")
    parser.add_argument("-o", "--output", default=".", metavar="DIR")
    args = parser.parse_args()
    found = recordings(args.source)
    speakers = sorted({key[0] for key in found})
    if args.held_out not in speakers or len(speakers) < 2:
        sys.exit(f"make_speech.py: --held-out {args.held_out}: the speakers are {', '.join(speakers) or 'none'}")
    held = sorted(key for key in found if key[0] == args.held_out)
    train = sorted(key for key in found if key[0] != args.held_out)
    random.Random(args.seed).shuffle(train)
    os.makedirs(args.output, exist_ok=True)
    for name, chosen in ("train.mulaw", train), ("heldout.mulaw", held):
        data = b"".join(bytes([mulaw.START]) + found[key] for key in chosen)
        with open(os.path.join(args.output, name), "wb") as f:
            f.write(data)
        who = ", ".join(sorted({key[0] for key in chosen}))
        print(f"{name}: {len(chosen)} recordings, {len(data) - len(chosen):,} samples ({len(data) / 8000 / 60:.1f} minutes): {who}")


if __name__ == "__main__":
    main()
