#!/usr/bin/env python3
"""make_checkpoints.py: what transformers computes for the models of tests/families.py, for
tests/test_checkpoints.py; and the table in doc/CHECKPOINTS.md.

  python dev/make_checkpoints.py tests/checkpoints.npz
  python dev/make_checkpoints.py --table                 prints the rows

The first needs: pip install torch transformers (torch 2.15 with transformers 5.24 made the
committed file). transformers gets the sizes in its own words, not the published config, and the
weights under its own names: so each reading of a config is checked against a second one.
"""
import os
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests"))
from families import FAMILIES, IDS, drawn
from test_export import hf_config


def logits(family):
    import torch
    import transformers
    config, name = hf_config(family.sizes), "FalconMamba" if family.sizes.falcon else "Mamba"
    config = getattr(transformers, name + "Config")(**config)
    net = getattr(transformers, name + "ForCausalLM")(config).float().eval()
    state = {name: torch.from_numpy(a) for name, a in drawn(family).items()}
    if family.sizes.tied:
        state["lm_head.weight"] = state["backbone.embeddings.weight"]
    net.load_state_dict(state)
    with torch.no_grad():
        return net(torch.tensor([IDS])).logits[0].numpy()


def table():
    for family in FAMILIES:
        state = f"refused: {family.refused}" if family.refused else "equal to transformers"
        print(f"| {family.names} | {state} |")


def main(target):
    arrays = {family.names: logits(family) for family in FAMILIES if not family.refused}
    np.savez_compressed(target, **{name.replace("/", "|"): a for name, a in arrays.items()})
    print(f"{len(arrays)} families, largest logit {max(np.abs(a).max() for a in arrays.values())}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    table() if sys.argv[1] == "--table" else main(sys.argv[1])
