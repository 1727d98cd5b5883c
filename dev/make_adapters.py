#!/usr/bin/env python3
"""make_adapters.py: small LoRA adapters and what peft's merge_and_unload makes of them, for
tests/test_checkpoints.py.

  python dev/make_adapters.py tests/adapters.npz

Needs: pip install torch transformers peft (torch 2.15, transformers 5.24 and peft 0.21 made the
committed file). The base models are those of tests/test_export.py, drawn from numpy's PCG64, so
that the file holds the adapters and the weights that the merge has changed, and nothing else.

An array CASE/config is adapter_config.json as bytes, CASE/lora/NAME a tensor of the adapter,
CASE/merged/NAME a weight that differs after the merge.
"""
import json
import os
import sys
import tempfile
import warnings

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests"))
import test_export
from test_export import Sizes, hf_config, safetensors, weights, write

PARTS = ["in_proj", "x_proj", "dt_proj"]  # peft refuses out_proj and conv1d for Mamba
CASES = {  # name: (sizes, changes to LoraConfig)
    "plain": (Sizes(), dict(r=2, lora_alpha=7, target_modules=PARTS)),
    "rslora": (Sizes(tied=False), dict(r=3, lora_alpha=4, use_rslora=True,
                                       target_modules=["in_proj", "lm_head"])),
    "patterns": (Sizes(proj_bias=True),
                 dict(r=2, lora_alpha=3, target_modules=r".*\.(in_proj|dt_proj|x_proj)",
                      rank_pattern={"x_proj": 1, r"layers\.1\.mixer\.in_proj": 3},
                      alpha_pattern={"dt_proj": 5.5, r"layers\.1\..*": 2})),
    "embedding": (Sizes(tied=False),
                  dict(r=2, lora_alpha=2, target_modules=["embeddings", "x_proj"])),
    "saved": (Sizes(tied=False, proj_bias=True),
              dict(r=1, target_modules=["in_proj"], modules_to_save=["lm_head", "norm_f"],
                   bias="all")),
    "tied": (Sizes(), dict(r=2, target_modules=["lm_head", "x_proj"])),
    "falcon": (Sizes(falcon=True, tied=False), dict(r=2, target_modules=PARTS)),
    "one layer": (Sizes(n_layer=3), dict(r=2, target_modules=["in_proj"], layers_to_transform=[1],
                                         layers_pattern="layers"))}


def case(s, options, seed):
    """(adapter_config.json, {name: tensor of the adapter}, {name: weight that changed})"""
    with tempfile.TemporaryDirectory() as folder:
        base, lora = os.path.join(folder, "base"), os.path.join(folder, "lora")
        before = weights(s)
        if s.tied:  # peft merges what changes one of the two into both; untied, as it was trained
            before["lm_head.weight"] = before["backbone.embeddings.weight"]
        write(os.path.join(base, "config.json"), {**hf_config(s), "tie_word_embeddings": False})
        write(os.path.join(base, "model.safetensors"), safetensors(before))
        load = lambda: transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        torch.manual_seed(seed)
        net = get_peft_model(load(), LoraConfig(task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for name, p in net.named_parameters():
                if p.requires_grad:  # lora_B starts at zero, so that a merge would change nothing
                    p.add_(0.5 * torch.randn_like(p))
        net.save_pretrained(lora)
        merged = PeftModel.from_pretrained(load(), lora).merge_and_unload().state_dict()
        changed = {name: a.numpy() for name, a in merged.items()
                   if not np.array_equal(a.numpy(), before[name])}
        config = json.load(open(os.path.join(lora, "adapter_config.json")))
        config["base_model_name_or_path"] = None
        parts = load_file(os.path.join(lora, "adapter_model.safetensors"))
        return config, {name: a.numpy() for name, a in parts.items()}, changed


def main(path):
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    arrays = {}
    for seed, (name, (s, options)) in enumerate(CASES.items()):
        config, parts, changed = case(s, options, seed)
        text = json.dumps(config, sort_keys=True).encode()
        arrays[f"{name}/config"] = np.frombuffer(text, "u1")
        arrays.update({f"{name}/lora/{key}": a for key, a in parts.items()})
        arrays.update({f"{name}/merged/{key}": a for key, a in changed.items()})
        print(f"{name}: {len(parts)} tensors of the adapter, {len(changed)} weights changed")
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
