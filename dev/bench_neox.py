#!/usr/bin/env python3
"""Generation by a transformer of the same size, to set `./mamba bench --shape 2.8b --dtype bf16 --only d` beside it.

    python dev/bench_neox.py [--batch 64] [--prompt 2048] [--new 128] [--runs 2] [--cache dynamic,static] [--limit 100]

GPT-NeoX 2.8B as Pythia 2.8B has it (hidden 2560, 32 layers, 32 heads, 10,240 in the MLP, 50,304 tokens), random weights made on the
GPU in bf16, scaled dot product attention, greedy generate() of transformers: each of `batch` different random prompts of `prompt`
tokens is read, then `new` tokens are generated for all together. tokens/s counts generated tokens over the whole time, the prompts'
reading included, as the paper does. One warm-up and `runs` timed runs for each kind of cache; the best median counts. Where memory
is short the batch is halved, and the line says so. Needs torch and transformers; no file is read or written."""

import argparse
import statistics
import time

import torch
import transformers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--cache", default="dynamic,static", help="kinds to try, in this order")
    parser.add_argument("--limit", type=float, default=100, help="seconds after which no further run begins")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=2560)
    args = parser.parse_args()
    begin = time.time()

    config = GPTNeoXConfig(
        vocab_size=50304, hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=32,
        intermediate_size=4 * args.hidden, max_position_embeddings=args.prompt + args.new, attn_implementation="sdpa")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = GPTNeoXForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    # generate() would stop at the end token, and a run shorter than asked would be no measurement
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    parameters = sum(p.numel() for p in model.parameters())
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(f"GPT-NeoX, {parameters / 1e9:.2f} G parameters in {model.dtype}, attention {model.config._attn_implementation}, {name}, "
          f"torch {torch.__version__}, transformers {transformers.__version__}", flush=True)

    def synchronize():
        if device == "cuda":
            torch.cuda.synchronize()

    def run(batch, kind, new):
        ids = torch.randint(0, config.vocab_size, (batch, args.prompt), device=device)
        options = {"cache_implementation": kind} if kind == "static" else {}
        if kind == "static" and hasattr(model.generation_config, "disable_compile"):
            options["disable_compile"] = True  # compiling would take longer than everything else here
        synchronize()
        start = time.time()
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new,
                                 max_new_tokens=new, use_cache=True, **options)
        synchronize()
        seconds = time.time() - start
        assert out.shape == (batch, args.prompt + new), out.shape
        return seconds

    batch, best = args.batch, None
    for kind in args.cache.split(","):
        while batch:
            times, failed, other = [], False, None
            try:
                for i in range(-1, args.runs):
                    if times and time.time() - begin > args.limit:
                        break
                    seconds = run(batch, kind, args.new)
                    if i >= 0:
                        times.append(seconds)
            except torch.cuda.OutOfMemoryError:
                failed = True  # handled below: the exception holds on to memory
            except (ValueError, NotImplementedError) as error:
                other = str(error).split("\n")[0]
            if not failed:
                break
            print(f"{kind} cache: batch {batch} does not fit in memory, trying {batch // 2}", flush=True)
            batch //= 2
            torch.cuda.empty_cache()
        if not batch:
            raise SystemExit("no batch fits")
        if other:
            print(f"{kind} cache: not measured: {other}", flush=True)
            continue
        middle, used = statistics.median(times), torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0
        rate = batch * args.new / middle
        print(f"{kind} cache: prompt {args.prompt} + {args.new}, x{batch}: {middle * 1e3:.0f} ms (runs "
              f"{', '.join(f'{t * 1e3:.0f}' for t in times)}), {rate:.0f} tokens/s generated, all counted, {used:.1f} GB", flush=True)
        if best is None or rate > best[0]:
            best = rate, kind, batch
        if device == "cuda":
            torch.cuda.empty_cache()
        if time.time() - begin > args.limit:
            break
    if best is None:
        raise SystemExit("nothing was measured")
    print(f"best: {best[0]:.0f} tokens/s, {best[1]} cache, batch {best[2]}")


main()
