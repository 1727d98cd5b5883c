#!/usr/bin/env python3
"""make_chat_golden.py: tests/chat/, what tests/test_chat.py compares with. For each of four chat templates as published, a small
tokenizer of the kind that its models have, and the ids that transformers' apply_chat_template gives for 20 conversations.

  pip install transformers tokenizers jinja2; python dev/make_chat_golden.py

The tokenizers are trained on README.md of the moment: a new run changes all files. CI needs no transformers.
"""
import json
import os
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "..", "tests", "chat")
TEXT = open(os.path.join(HERE, "..", "README.md"), encoding="utf-8").read()

CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
FALCON3 = ("{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
           "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
           "{% elif message['role'] == 'assistant' %}{% if not loop.last %}"
           "{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}"
           "{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
           "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}")
ZEPHYR = ("{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
          "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
          "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
          "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")


def trained(tokenizer, special, **options):
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[AddedToken(t, special=True) for t in special],
                                  show_progress=False, **options)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def byte_level(normalizer, steps, special):
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = steps
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def falcon(special):
    steps = [pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.ByteLevel(add_prefix_space=False),
             pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")]
    return byte_level(None, pre_tokenizers.Sequence(steps), special)


def neox(special):
    return byte_level(normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True), special)


def llama(special):
    """The merges of words that begin with a space, and the bytes."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    table = json.loads(trained(words, []).to_str())["model"]
    tokens = [*special, *(f"<0x{b:02X}>" for b in range(256)), *table["vocab"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
                                     merges=[tuple(pair) for pair in table["merges"]], unk_token="<unk>", fuse_unk=True,
                                     byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


MODELS = {
    "falcon-mamba-7b-instruct": (falcon(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]), CHATML, "<|im_end|>"),
    "Falcon3-Mamba-7B-Instruct": (falcon(["<|endoftext|>"]), FALCON3, "<|endoftext|>"),
    "mamba-chat": (neox(["<|endoftext|>", "<|padding|>"]), ZEPHYR, "<|endoftext|>"),
    "zephyr-7b-beta": (llama(["<unk>", "<s>", "</s>"]), ZEPHYR, "</s>"),
}
TEXTS = ["Hello", "What is a state space?", "  two spaces before", "a newline after\n", "one\n\ntwo\n  three", "12345 + 67890 = 80235?",
         "écrire, 日本語, 🙂", "Ignore this: {{ x }} {% y %}", "don't, it's, we'll", "\ttab", "def f(x):\n    return x ** 2\n", "…", "A",
         "user", "<b>bold</b> & 'quotes' \"too\"", "x" * 70]


def conversations():
    rng = random.Random(17)
    for i in range(20):
        texts = [rng.choice(TEXTS) for _ in range(1 + 2 * (i % 4))]
        yield rng.choice(TEXTS) if i % 3 == 1 else None, texts


def messages(system, texts):
    first = [{"role": "system", "content": system}] if system is not None else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def main():
    golden = {"conversations": list(conversations()), "ids": {}}
    for name, (tokenizer, template, end) in MODELS.items():
        folder = os.path.join(OUT, name)
        os.makedirs(folder, exist_ok=True)
        tokenizer.save(os.path.join(folder, "tokenizer.json"), pretty=False)
        config = {"eos_token": end, "chat_template": template}
        with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
            json.dump(config, f, indent=1)
        library = PreTrainedTokenizerFast(tokenizer_file=os.path.join(folder, "tokenizer.json"), **config)
        ids = []
        for system, texts in golden["conversations"]:
            got = library.apply_chat_template(messages(system, texts), add_generation_prompt=True)
            ids.append(list(got["input_ids"] if hasattr(got, "keys") else got))
        golden["ids"][name] = ids
    with open(os.path.join(OUT, "golden.json"), "w", encoding="utf-8") as f:
        json.dump(golden, f, separators=(",", ":"))


if __name__ == "__main__":
    main()
