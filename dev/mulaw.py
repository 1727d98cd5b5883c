#!/usr/bin/env python3
"""mulaw.py: wav to 8-bit mu-law bytes and back. Python's standard library only (audioop left it in 3.13).

  python dev/mulaw.py speech.wav speech.mulaw
  python dev/mulaw.py speech.mulaw speech.wav --rate 8000

A byte is round(127.5 + 127.5 sign(x) ln(1 + 255 |x|) / ln 256) for x in [-1, 1]: the formula itself, as in WaveNet and
after it, and not the telephone's G.711, which is made of straight pieces and turns bits around. Silence is 128. A wav
file must be mono PCM, 8 or 16 bits. The byte 0, which would be a sample at the very bottom of the range, is not used for
samples: it is what make_speech.py puts before each recording. On the way back each 0 is --pause seconds of silence.
"""
import argparse
import array
import math
import os
import sys
import wave

START = 0        # before a recording
TABLE = [max(1, int(127.5 + math.copysign(127.5 * math.log1p(255 * abs(x)) / math.log(256), x) + 0.5))
         for x in (i / 32768 for i in range(-32768, 32768))]


def level(code):
    """The value in [-1, 1] whose mu-law is code."""
    y = (code - 127.5) / 127.5
    return 0.0 if code == 128 else math.copysign((256 ** abs(y) - 1) / 255, y)


def encode(samples):
    """16-bit samples to bytes."""
    return bytes(TABLE[s + 32768] for s in samples)


def decode(codes):
    sample = [max(-32768, min(32767, round(32768 * level(code)))) for code in range(256)]
    return array.array("h", (sample[code] for code in codes))


def read_wav(source, name):
    """(16-bit samples, rate) of a path or an open file; ValueError says what is wrong."""
    try:
        with wave.open(source, "rb") as w:
            channels, width, rate, data = w.getnchannels(), w.getsampwidth(), w.getframerate(), w.readframes(w.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{name}: not a wav file that Python reads: {error}") from None
    if channels != 1 or width not in (1, 2):
        raise ValueError(f"{name}: {channels} channels of {8 * width} bits; mono with 8 or 16 is needed")
    if width == 1:
        return array.array("h", ((b - 128) * 256 for b in data)), rate
    samples = array.array("h", data[:len(data) // 2 * 2])
    if sys.byteorder == "big":
        samples.byteswap()
    return samples, rate


def write_wav(path, samples, rate):
    samples = array.array("h", samples)
    if sys.byteorder == "big":
        samples.byteswap()
    with wave.open(path, "wb") as w:
        w.setnchannels(1), w.setsampwidth(2), w.setframerate(rate)
        w.writeframes(samples.tobytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help=".wav, or bytes of mu-law")
    parser.add_argument("target", help=".wav or not: the other of the two")
    parser.add_argument("--rate", type=int, default=8000, metavar="HZ", help="of a wav file to write (default 8000)")
    parser.add_argument("--pause", type=float, default=0.2, metavar="S", help="silence for each byte 0 (default 0.2 s)")
    args = parser.parse_args()
    to_wav = args.target.lower().endswith(".wav")
    if to_wav == args.source.lower().endswith(".wav"):
        sys.exit("mulaw.py: one of the two files must be a .wav")
    try:
        if to_wav:
            with open(args.source, "rb") as f:
                data = f.read()
            pause = bytes([128]) * round(args.pause * args.rate)
            write_wav(args.target, decode(data.replace(bytes([START]), pause)), args.rate)
        else:
            samples, rate = read_wav(args.source, args.source)
            with open(args.target, "wb") as f:
                f.write(encode(samples))
            print(f"{len(samples)} samples at {rate} Hz")
    except (OSError, ValueError) as error:
        sys.exit(f"mulaw.py: {error}")


if __name__ == "__main__":
    main()
