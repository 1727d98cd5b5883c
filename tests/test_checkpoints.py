#!/usr/bin/env python3
"""test_checkpoints.py: what export.py makes of the configs and tensor names that stand on public
hubs, and of damaged ones.

  python tests/test_checkpoints.py [-k WORD] [-v]

Needs numpy, and ./mamba where it is built. The last line is "N passed, N failed, N skipped".

Contents: 1 configs | 2 names of tensors | 3 adapters | 4 GGUF |
5 public checkpoints | 6 damaged files
"""
import copy
import json
import os
import random
import struct
import subprocess
import sys
import zlib

import numpy as np

import test_export
from families import FAMILIES, IDS, drawn
from test_export import (Case, Sizes, VARIANTS, export, have, hf_config, layout, read_model,
                         reference_config, reference_names, spoilt, weights, write)

# --------------------------------------------------------------------------------------------------
# 1. Configs


class Checkpoint(Case):
    def same_tensors(self, s):
        w, (header, _, tensors) = weights(s), read_model(self.bin, s)
        for name, _, _, source in layout(s):
            self.assertEqual(tensors[name], w[source].tobytes(), name)
        return header

    def header_of(self, s, config, tensors=None):
        """(header, notes) of the export; its tensors are checked."""
        self.checkpoint(s, config, tensors)
        text = self.good()
        return self.same_tensors(s), [line for line in text.splitlines() if "note:" in line]

    def run_mamba(self, *arguments):
        mamba = os.path.join(test_export.HERE, "..", "mamba")
        if not os.path.exists(mamba):
            self.skipTest("./mamba is not built")
        result = subprocess.run([mamba, *arguments], capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result.stdout


class Configs(Checkpoint):
    def test_eps_under_every_key(self):
        s = Sizes(E=12, eps=3e-4)
        for base in (spoilt(hf_config(s), layer_norm_epsilon=...), reference_config(s)):
            for key in ("layer_norm_epsilon", "norm_epsilon", "norm_eps", "rms_norm_eps",
                        "layer_norm_eps", "rms_norm_epsilon"):
                with self.subTest(key=key):
                    header, notes = self.header_of(s, {**base, key: 3e-4})
                    self.assertEqual((header["norm_eps"], notes), (struct.pack("<f", 3e-4), []))
                    for value in (1.0, 0.99999999, -1e-5, "1e-5", True, None, 1e400):
                        self.checkpoint(s, {**base, key: value})
                        self.bad(key, "config.json")
            header, notes = self.header_of(s, {**base, "norm_eps": 3e-4, "rms_norm_eps": 3e-4})
            self.assertEqual((header["norm_eps"], notes), (struct.pack("<f", 3e-4), []))
            self.checkpoint(s, {**base, "norm_eps": 1e-5, "rms_norm_eps": 1e-6})
            self.bad("norm_eps 1e-05", "rms_norm_eps 1e-06", "differ")

    def test_eps_just_below_one_is_read_by_mamba(self):
        s = Sizes(eps=0.9999999)
        header, _ = self.header_of(s, hf_config(s))
        self.assertLess(struct.unpack("<f", header["norm_eps"])[0], 1)
        self.run_mamba("info", self.bin)

    def test_keys_of_both_layouts_mixed(self):
        s = Sizes(E=12, N=5, K=3, R=3)
        mixed = {"model_type": "mamba", "hidden_size": s.D, "n_layer": s.n_layer,
                 "vocab_size": s.V, "d_inner": s.E, "d_state": s.N, "d_conv": s.K, "dt_rank": s.R,
                 "tie_embeddings": True, "bias": False, "conv_bias": True}
        for config in (mixed, {**spoilt(mixed, n_layer=..., d_state=...), "state_size": s.N,
                               "num_hidden_layers": s.n_layer},
                       {**spoilt(mixed, hidden_size=..., n_layer=..., model_type=...),
                        "d_model": s.D, "num_hidden_layers": s.n_layer},
                       {**spoilt(mixed, d_state=..., d_conv=..., dt_rank=..., d_inner=...),
                        "ssm_cfg": {"d_state": s.N, "d_conv": s.K, "dt_rank": s.R}}):
            _, notes = self.header_of(s, config)
            self.assertEqual(notes, [])

    def test_contradictions_are_decided_by_the_tensors(self):
        s = Sizes(D=6, E=10, N=3, K=4, R=2, V=259, n_layer=2)
        for key, value, twin in (("n_layer", 3, "num_hidden_layers"), ("d_model", 7, "hidden_size"),
                                 ("d_inner", 11, "intermediate_size"), ("d_state", 4, "state_size"),
                                 ("d_conv", 3, "conv_kernel"), ("dt_rank", 1, "time_step_rank"),
                                 ("bias", True, "use_bias"), ("conv_bias", False, "use_conv_bias"),
                                 ("tie_embeddings", False, "tie_word_embeddings")):
            with self.subTest(key):
                right = hf_config(s)
                for config in ({**right, key: value}, {**right, twin: value, key: right[twin]}):
                    _, notes = self.header_of(s, config)
                    self.assertEqual(len(notes), 1, notes)
                    for word in (key, twin, json.dumps(value), json.dumps(right[twin]), "tensors"):
                        self.assertIn(word, notes[0])
                if type(value) is int:
                    self.checkpoint(s, {**right, key: value + 50, twin: value + 60})
                    self.bad(key, twin, "differ")
                    self.checkpoint(s, {**right, twin: value})  # no contradiction: a wrong config
                    self.bad("is missing" if twin == "num_hidden_layers" else "config.json implies")
        untied = Sizes(tied=False)
        _, notes = self.header_of(untied, {**hf_config(untied), "tie_embeddings": True})
        self.assertIn("tie_embeddings", notes[0])

    def test_what_is_not_stated_is_seen_in_the_tensors(self):
        s = Sizes(D=7, E=14, N=5, K=3, R=3, V=261, n_layer=3, proj_bias=True, conv_bias=False)
        for config in ({"model_type": "mamba"}, {"model_type": "mamba", "hidden_size": 7},
                       {"d_model": 7}, {"d_model": 7, "vocab_size": 261},
                       {"architectures": ["MambaForCausalLM"], "vocab_size": 261}):
            self.header_of(s, config)
        self.checkpoint(s, {"vocab_size": 261, "hidden_size": 7})
        self.bad("neither model_type")

    def test_ssm_cfg(self):
        s = Sizes(E=12, N=16, R=1)
        for ssm_cfg in (None, {}, {"device": "cuda", "dtype": "bfloat16"}, {"layer": "Mamba1"},
                        {"use_fast_path": True, "layer_idx": 3}, {"dt_rank": "auto"}):
            self.header_of(s, reference_config(s, ssm_cfg=ssm_cfg), reference_names(weights(s)))
        for ssm_cfg, word in ((3, "ssm_cfg"), ("{}", "ssm_cfg"), ({"chunk_size": 64}, "chunk_size"),
                              ({"layer": ["Mamba1"]}, "Mamba1"), ({"d_state": None}, "d_state")):
            self.checkpoint(s, reference_config(s, ssm_cfg=ssm_cfg), reference_names(weights(s)))
            self.bad(word, "config.json")

    def test_vocabulary_padded_or_not(self):
        s = Sizes(E=12, V=264)
        for base in (hf_config(s), reference_config(s)):
            for V, multiple in ((264, 8), (261, 8), (260, 12), (264, 16), (264, ...)):
                self.header_of(s, spoilt(base, vocab_size=V, pad_vocab_size_multiple=multiple))
            self.checkpoint(s, {**base, "vocab_size": 290, "pad_vocab_size_multiple": 8})
            self.bad("config.json implies")

    def test_unknown_keys(self):
        s = VARIANTS["plain"]
        harmless = {"temperature": 0.7, "transformers_version": "4.39", "torch_dtype": "float32",
                    "_name_or_path": "x", "id2label": {"0": "a"}, "use_mambapy": False,
                    "max_position_embeddings": 2048, "is_encoder_decoder": False,
                    "cross_attention_hidden_size": None, "time_step_limit": [0.0, float("inf")],
                    "residual_multiplier": 1.0, "final_logit_softcapping": None, "attn_cfg": {},
                    "use_bidirectional": False, "add_position_ids": False, "num_experts": 0,
                    "bidirectional": False, "bidirectional_strategy": "add",
                    "bidirectional_weight_tie": True, "layers_block_type": ["mamba", "mamba"]}
        _, notes = self.header_of(s, {**hf_config(s), **harmless})
        self.assertEqual(notes, [])
        _, notes = self.header_of(s, {**hf_config(s), "a_new\nkey": 1, "zeta": [2]})
        self.assertEqual(len(notes), 1)
        self.assertIn("a_new\\nkey, zeta", notes[0])
        for key, value in (("residual_multiplier", 0.22), ("logits_scaling", 8),
                           ("embedding_multiplier", 12.0), ("lm_head_multiplier", 0.5),
                           ("final_logit_softcapping", 30.0), ("use_bidirectional", True),
                           ("add_position_ids", True), ("scale_embeddings", True),
                           ("ssm_multipliers", [1, 2]), ("rope_theta", 10000.0),
                           ("num_experts", 8), ("layers_block_type", ["mamba", "attention"]),
                           ("time_step_limit", [0.001, 0.1]), ("norm_type", "layernorm"),
                           ("inner_layernorms", True), ("use_dt_norm", True),
                           ("attn", {"layers": [3]}),
                           ("is_encoder_decoder", True), ("add_cross_attention", True),
                           ("hidden_activation", "gelu"), ("mixer_rms_eps", 1e-6),
                           ("position_embedding_type", "absolute")):
            for base in (hf_config(s), reference_config(Sizes(E=12))):
                self.checkpoint(s, {**base, key: value})
                self.bad(key, "config.json", "not supported")

    def test_other_architectures(self):
        s = VARIANTS["plain"]
        for name in ("BiMambaForMaskedLM", "CaduceusForMaskedLM", "Mamba2ForCausalLM", "VimModel",
                     "JambaForCausalLM"):
            self.checkpoint(s, {**hf_config(s), "architectures": [name]})
            self.bad(name, "not supported")
        for kind in ("caduceus", "bimamba", "vim", "hymba", "samba"):
            self.checkpoint(s, {**hf_config(s), "model_type": kind})
            self.bad(kind, "not supported")
        s = Sizes(E=12)
        self.checkpoint(s, {**reference_config(s), "model_type": "caduceus"})
        self.bad("caduceus", "not supported")

    def test_generation_config_decides(self):
        s = VARIANTS["plain"]
        for config, generation, bos, eos in (
                ({"bos_token_id": 1, "eos_token_id": 2}, {"bos_token_id": 5, "eos_token_id": 6}, 5,
                 [6]), ({"bos_token_id": 1, "eos_token_id": 2}, {}, 1, [2]),
                ({"bos_token_id": 1, "eos_token_id": [2, 3]}, {"eos_token_id": None}, 1, [2, 3]),
                ({"bos_token_id": None, "eos_token_id": 2}, {"eos_token_id": [7, 8]}, -1, [7, 8])):
            self.checkpoint(s, {**hf_config(s), **config})
            write(os.path.join(self.src, "generation_config.json"), generation)
            self.good()
            header = read_model(self.bin, s)[0]
            self.assertEqual((header["bos"], [i for i in header["eos"] if i != -1]), (bos, eos))
            self.good("--to-hf", self.bin, os.path.join(self.dir, "back"), "--force")
            back = json.load(open(os.path.join(self.dir, "back", "generation_config.json")))
            self.assertEqual(back["bos_token_id"], bos if bos >= 0 else None)
            self.assertEqual(back["eos_token_id"], eos if len(eos) > 1 else eos[0])


# --------------------------------------------------------------------------------------------------
# 2. Names of tensors


class Names(Checkpoint):
    def test_prefixes(self):
        s = Sizes(tied=False)
        for prefix in ("module.", "_orig_mod.", "model.", "module._orig_mod.", "model.backbone.",
                       "_orig_mod.module.model.", "base_model.model."):
            with self.subTest(prefix):
                renamed = {prefix + name: a for name, a in weights(s).items()}
                self.header_of(s, hf_config(s), renamed)
        bare = {"model." + name.replace("backbone.", ""): a for name, a in weights(s).items()}
        self.header_of(s, hf_config(s), bare)

    def test_mamba_hf(self):
        s = Sizes(E=12, proj_bias=True, tied=False)
        renamed = {}
        for name, a in reference_names(weights(s)).items():
            renamed[name.replace("backbone.", "model.").replace(".mixer.", ".")] = a
        self.assertIn("model.layers.0.in_proj.weight", renamed)
        self.assertIn("model.layers.1.D", renamed)
        self.assertIn("model.embedding.weight", renamed)
        self.header_of(s, hf_config(s), renamed)

    def test_the_nearest_name_is_shown(self):
        s, w = VARIANTS["plain"], weights(VARIANTS["plain"])
        w["backbone.layers.0.mixer.in_project.weight"] = w.pop(
            "backbone.layers.0.mixer.in_proj.weight")
        self.checkpoint(s, tensors=w)
        self.bad("backbone.layers.0.mixer.in_proj.weight (20, 6) is missing",
                 "nearest name found is backbone.layers.0.mixer.in_project.weight")

    def test_names_are_escaped(self):
        s, w = VARIANTS["plain"], weights(VARIANTS["plain"])
        self.checkpoint(s, tensors={**w, "evil\n\x1b[31mname": np.zeros(2, "f4")})
        self.bad("evil\\n\\x1b[31mname")
        self.checkpoint(s, tensors={**w, "score.\x1b]0;x": np.zeros(2, "f4")})
        self.assertIn("score.\\x1b]0;x", self.good())

    def test_classifiers(self):
        for s in (Sizes(), Sizes(falcon=True)):
            for name in ("score.weight", "classifier.weight", "classifier.bias",
                         "classification_head.out_proj.weight", "module.score.weight"):
                config = {**hf_config(s), "architectures": ["MambaForSequenceClassification"]}
                tensors = {**weights(s), name: np.zeros((3, s.D), "f4")}
                _, notes = self.header_of(s, config, tensors)
                self.assertEqual(len(notes), 1)
                self.assertIn(name, notes[0])
        _, notes = self.header_of(s, {**config, "tie_word_embeddings": False}, tensors)
        self.assertEqual(len(notes), 2)
        self.assertIn("no lm_head.weight", notes[1])
        _, notes = self.header_of(s, {**hf_config(s), "tie_word_embeddings": False,
                                      "architectures": ["FalconMambaModel"]})
        self.assertIn("no lm_head.weight", notes[0])
        self.checkpoint(s, {**hf_config(s), "tie_word_embeddings": False})
        self.bad("lm_head.weight", "missing")


# --------------------------------------------------------------------------------------------------
# 3. Adapters, against peft (dev/make_adapters.py)


class Adapters(Checkpoint):
    SIZES = {"plain": Sizes(), "rslora": Sizes(tied=False), "patterns": Sizes(proj_bias=True),
             "embedding": Sizes(tied=False), "saved": Sizes(tied=False, proj_bias=True),
             "tied": Sizes(), "falcon": Sizes(falcon=True, tied=False),
             "one layer": Sizes(n_layer=3)}

    def setUp(self):
        super().setUp()
        self.lora = os.path.join(self.dir, "lora")
        self.command = (self.src, self.bin, "--tokenizer", "bytes", "--adapter", self.lora)

    def case(self, name):
        """(adapter_config.json, tensors of the adapter, merged weights), as peft has them."""
        with np.load(os.path.join(test_export.HERE, "adapters.npz")) as file:
            arrays = {key[len(name) + 1:]: file[key] for key in file if key.startswith(name + "/")}
        of = lambda kind: {key[len(kind):]: a for key, a in arrays.items() if key.startswith(kind)}
        return json.loads(arrays["config"].tobytes()), of("lora/"), of("merged/")

    def adapter(self, config, tensors):
        write(os.path.join(self.lora, "adapter_config.json"), config)
        write(os.path.join(self.lora, "adapter_model.safetensors"),
              test_export.safetensors(tensors))

    def test_equal_to_merge_and_unload(self):
        for name, s in self.SIZES.items():
            config, parts, merged = self.case(name)
            self.checkpoint(s)
            self.adapter(config, parts)
            for small in (False, True):
                if small:
                    self.small_chunks()
                text, want = self.good(*self.command), {**weights(s), **merged}
                if name == "tied":
                    self.assertIn("no longer tied", text)
                    s = Sizes(tied=False)
                _, _, tensors = read_model(self.bin, s)
                for tensor, shape, _, source in layout(s):
                    got = np.frombuffer(tensors[tensor], "<f4").reshape(shape)
                    error = np.abs(got - want[source]).max() / np.abs(want[source]).max()
                    self.assertLess(error, 1e-6, f"{name}: {tensor}")
                    if source not in merged:
                        self.assertEqual(error, 0)
                self.assertGreater(len(merged), 0)
                self.run_mamba("info", self.bin, "--verify")

    def test_other_bases(self):
        config, parts, _ = self.case("plain")
        s = Sizes(E=12)
        rng = np.random.Generator(np.random.PCG64(1))
        parts = {name: rng.standard_normal(a.shape).astype("<f4") for name, a in parts.items()
                 if "in_proj" in name}
        for name in parts:
            if "lora_B" in name:
                parts[name] = rng.standard_normal((24, 2)).astype("<f4")
        renamed = {name.replace(".weight", ".default.weight"): a for name, a in parts.items()}
        self.adapter(config, parts)
        self.checkpoint(s, reference_config(s), reference_names(weights(s)))
        self.good(*self.command)
        first = open(self.bin, "rb").read()
        self.adapter(config, renamed)
        self.good(*self.command)
        self.assertEqual(open(self.bin, "rb").read(), first)
        self.good(*self.command, "--dtype", "q8")
        self.run_mamba("info", self.bin, "--verify")

    def test_an_adapter_as_source(self):
        config, parts, _ = self.case("plain")
        self.adapter({**config, "base_model_name_or_path": "state-spaces/mamba-130m-hf"}, parts)
        self.bad("adapter of peft", "export.py state-spaces/mamba-130m-hf model.bin --adapter",
                 arguments=(self.lora, self.bin))

    def test_refusals(self):
        config, parts, _ = self.case("plain")
        self.checkpoint(Sizes())
        for key, value, word in (
                ("peft_type", "LOHA", "LOHA"), ("peft_type", None, "peft_type"),
                ("use_dora", True, "DoRA"), ("init_lora_weights", "pissa", "pissa"),
                ("init_lora_weights", "olora", "olora"), ("r", 0, "r is 0"), ("r", "2", "r is"),
                ("r", 3, "expected (3,"), ("lora_alpha", "a", "lora_alpha"),
                ("lora_bias", True, "lora_bias"), ("rank_pattern", {"(": 2}, "rank_pattern"),
                ("rank_pattern", {"x_proj": 5}, "expected (5, 10)"),
                ("rank_pattern", [3], "rank_pattern"), ("use_rslora", 1, "use_rslora"),
                ("alpha_pattern", {"x_proj": None}, "alpha_pattern"),
                ("layer_replication", [[0, 2]], "layer_replication"),
                ("trainable_token_indices", [1], "trainable_token_indices"),
                ("a_new_key", 0.5, "a_new_key")):
            self.adapter({**config, key: value}, parts)
            self.bad("lora", word, arguments=self.command)
        name = next(name for name in parts if "in_proj.lora_A" in name)
        for change, word in (({name: ...}, "no twin"), ({name: parts[name][:1]}, "expected (2, 6)"),
                             ({name: parts[name] * np.nan}, "nan"),
                             ({"base_model.model.backbone.layers.0.mixer.conv1d.lora_A.weight":
                               np.zeros((2, 6), "f4")}, "mixes channels"),
                             ({"base_model.model.backbone.layers.9.mixer.in_proj.lora_A.weight":
                               np.zeros((2, 6), "f4")}, "no matrix"),
                             ({"strange": np.zeros(3, "f4")}, "strange")):
            self.adapter(config, spoilt(parts, **change))
            self.bad(word, arguments=self.command)
        self.adapter(config, {})
        self.bad("no LoRA", arguments=self.command)
        os.unlink(os.path.join(self.lora, "adapter_model.safetensors"))
        self.bad("adapter_model.safetensors", arguments=self.command)
        os.unlink(os.path.join(self.lora, "adapter_config.json"))
        self.bad("adapter_config.json", arguments=self.command)
        self.bad("no directory", arguments=(*self.command[:-1], self.bin + "none"))


# --------------------------------------------------------------------------------------------------
# 4. GGUF, against llama.cpp (dev/make_gguf_golden.py) and the gguf package


class Gguf(Checkpoint):
    def setUp(self):
        super().setUp()
        self.gguf = os.path.join(self.dir, "model.gguf")
        self.back = os.path.join(self.dir, "back.bin")

    def logits(self, path, ids):
        out = os.path.join(self.dir, "logits")
        self.run_mamba("logits", path, "--tokens", ",".join(map(str, ids)), "--all", "-o", out)
        return np.fromfile(out, "<f4").reshape(len(ids), -1)

    def test_llama_cpp_reads_what_is_written(self):
        root = os.path.join(test_export.HERE, "..")
        file = np.load(os.path.join(test_export.HERE, "gguf.npz"))
        self.addCleanup(file.close)
        # llama.cpp rounds activations to the type of the matrix: bf16, or q8 in groups of 32
        for name, path, tolerance in (
                ("plain", "tests/plain.bin", 1e-6), ("falcon", "tests/falcon.bin", 1e-6),
                ("tales", "models/tales.bin", 1e-2), ("plain q8", None, 4e-2),
                ("plain q4", None, 4e-2)):
            with self.subTest(name):
                source = os.path.join(root, path) if path else os.path.join(self.dir, "q.bin")
                if not path:
                    self.run_mamba("quantize", os.path.join(root, "tests/plain.bin"), source,
                                   name[-2:])
                text = self.good("--to-gguf", source, self.gguf)
                self.assertEqual("one eps" in text, name == "falcon")
                crc = zlib.crc32(open(self.gguf, "rb").read())
                self.assertEqual(crc, file[name + "/crc"], "no longer what llama.cpp has read")
                self.good(self.gguf, self.back)
                ids, want = file[name + "/ids"], file[name + "/logits"]
                error = np.abs(self.logits(self.back, ids) - want).max() / np.abs(want).max()
                self.assertLess(error, tolerance)
                if name != "falcon":  # whose second eps has no place in the file
                    error = np.abs(self.logits(source, ids) - want).max() / np.abs(want).max()
                    self.assertLess(error, tolerance)

    def test_there_and_back(self):
        for name, s in {"tied": Sizes(E=12), "untied": Sizes(E=12, tied=False, conv_bias=False),
                        "falcon": Sizes(E=12, falcon=True, mixer_eps=1e-5),
                        "wide": Sizes(D=64, E=128, R=32, N=16)}.items():
            for dtype in ("f32", "f16", "bf16", "q8", "q4"):
                with self.subTest(name, dtype=dtype):
                    self.checkpoint(s)
                    self.good(self.src, self.bin, "--tokenizer", "bytes", "--dtype", dtype)
                    self.good("--to-gguf", self.bin, self.gguf)
                    self.good(self.gguf, self.back, "--tokenizer", "bytes")
                    folders = [os.path.join(self.dir, f"{name}-{dtype}-{i}") for i in range(2)]
                    for path, folder in zip((self.bin, self.back), folders):
                        self.good("--to-hf", path, folder)
                    one, two = (test_export.read_safetensors(os.path.join(f, "model.safetensors"))
                                for f in folders)
                    for tensor, (kind, shape, data) in one.items():
                        if tensor.endswith("A_log"):
                            a, b = (np.frombuffer(x, "<f4") for x in (data, two[tensor][2]))
                            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
                        elif kind == two[tensor][0]:
                            self.assertEqual(data, two[tensor][2], tensor)
                        a, b = (json.load(open(os.path.join(f, "config.json"))) for f in folders)
                        a.pop("use_conv_bias"), b.pop("use_conv_bias")
                        self.assertEqual({**a, "dtype": 0, "torch_dtype": 0},
                                         {**b, "dtype": 0, "torch_dtype": 0})

    def test_tokens(self):
        s = Sizes(E=12, V=264)
        self.checkpoint(s, {**hf_config(s), "eos_token_id": [260, 3]})
        table = test_export.tokenizer_json(test_export.MERGES, nfc=False)
        write(os.path.join(self.src, "tokenizer.json"), table)
        self.good(self.src, self.bin)
        self.good("--to-gguf", self.bin, self.gguf)
        self.good(self.gguf, self.back)
        one, two = (read_model(path, s) for path in (self.bin, self.back))
        self.assertEqual(*(test_export.export.tokenizer_json(blob) for blob in (one[1], two[1])))
        self.assertEqual((two[0]["eos"], two[0]["bos"]), ([260, 3, -1, -1], 1))

    def test_llama_cpp_makes_the_same_ids(self):
        root = os.path.join(test_export.HERE, "..")
        with np.load(os.path.join(test_export.HERE, "gguf.npz")) as file:
            cases = [(file[key].tobytes(), file["IDS/" + key[5:]]) for key in file
                     if key.startswith("TEXT/")]
        self.good("--to-gguf", os.path.join(root, "models/tales.bin"), self.gguf)
        self.good(self.gguf, self.back)
        self.assertGreater(len(cases), 3)
        for text, want in cases:
            write(os.path.join(self.dir, "text"), text)
            ids = self.run_mamba("tokenize", self.back, os.path.join(self.dir, "text")).split()
            self.assertEqual(list(map(int, ids)), want.tolist())

    def test_ways_to_split(self):
        s = Sizes(E=12, V=264)
        for name, code, bos in (("llama-bpe", export.GPT4, True), ("llama-bpe", export.GPT4, False),
                                ("qwen2", export.QWEN2, False)):
            table = test_export.tokenizer_json(test_export.MERGES, nfc=False)
            regex = next(regex for regex, other in export.REGEXES.items() if other == code)
            table["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
                 "invert": False}, {**table["pre_tokenizer"], "use_regex": False}]}
            table["model"]["ignore_merges"] = name == "llama-bpe"
            meta = {"tokenizer.ggml.bos_token_id": 260, "tokenizer.ggml.add_bos_token": bos}
            tokens = ["<|endoftext|>"] * 261
            table["post_processor"] = export.gguf_post_processor(meta, tokens, False)
            self.checkpoint(s, {**hf_config(s), "bos_token_id": 260})
            write(os.path.join(self.src, "tokenizer.json"), table)
            self.good(self.src, self.bin)
            self.good("--to-gguf", self.bin, self.gguf)
            meta = export.open_gguf(self.gguf)[0]
            self.assertEqual(meta["tokenizer.ggml.pre"], name)
            self.assertEqual(meta.get("tokenizer.ggml.add_bos_token", False), bos)
            self.good(self.gguf, self.back)
            one, two = (export.tokenizer_json(read_model(path, s)[1])
                        for path in (self.bin, self.back))
            self.assertEqual(one, two)

    def sentencepiece(self, seed):
        """The metadata of a small vocabulary: letters, then tokens that join two earlier ones."""
        rng = random.Random(seed)
        words = ["\u2581", *"abcd\u00e9"]
        while len(words) < 40:
            word = rng.choice(words) + rng.choice(words)
            words += [] if word in words or len(word) > 8 else [word]
        tokens = ["<unk>", "<s>", "</s>", *map("<0x%02X>".__mod__, range(256)), *words]
        scores = [0.0] * 259 + [-float(i) for i in rng.sample(range(1, 99), len(words))]
        return {"model": "llama", "tokens": tokens, "scores": scores, "bos_token_id": 1,
                "token_type": [2, 3, 3] + [6] * 256 + [1] * len(words), "unknown_token_id": 0}

    @staticmethod
    def sentencepiece_ids(meta, text):
        """The two neighbours whose joined token has the highest score are joined, the first of
        equal ones; what is no token is bytes."""
        score = {t: s for t, s, kind in zip(meta["tokens"], meta["scores"], meta["token_type"])
                 if kind == 1}
        word = list("\u2581" + text.replace(" ", "\u2581"))
        while True:
            pairs = [(-score[a + b], i) for i, (a, b) in enumerate(zip(word, word[1:]))
                     if a + b in score]
            if not pairs:
                break
            i = min(pairs)[1]
            word[i:i + 2] = [word[i] + word[i + 1]]
        return [i for part in word for i in ([meta["tokens"].index(part)] if part in score else
                                             [3 + byte for byte in part.encode("utf-8")])]

    def test_sentencepiece(self):
        long = lambda meta: {f"tokenizer.ggml.{key}": value for key, value in meta.items()}
        for seed in range(6):
            rng, meta = random.Random(seed), self.sentencepiece(seed)
            table = export.gguf_tokenizer(long(meta), "x")
            write(self.bin, export.tokenizer_blob(table))
            for _ in range(20):
                text = "".join(rng.choice("aabbccdd\u00e9  xy\u65e5") for _ in range(60))
                write(self.back, text.encode("utf-8"))
                ids = self.run_mamba("tokenize", self.bin, self.back).split()
                self.assertEqual(list(map(int, ids)), self.sentencepiece_ids(meta, text), text)
            self.assertEqual(table["post_processor"]["single"][0]["SpecialToken"]["id"], "<s>")
        for change, word in (({"scores": meta["scores"][1:]}, "scores"), ({"scores": 3}, "scores"),
                             ({"scores": [0.0] * len(meta["tokens"])}, "one score"),
                             ({"unknown_token_id": "a"}, "scores"),
                             ({"remove_extra_whitespaces": True}, "removes spaces")):
            with self.assertRaisesRegex(export.ExportError, word):
                export.gguf_tokenizer(long({**meta, **change}), "x")

    def write_by_package(self, tensors, kinds=None, **changes):
        """The same model by the gguf package's writer."""
        import gguf
        writer = gguf.GGUFWriter(self.gguf, changes.pop("arch", "mamba"))
        values = {"embedding_length": 64, "block_count": 2, "ssm.inner_size": 128,
                  "ssm.state_size": 3, "ssm.conv_kernel": 4, "ssm.time_step_rank": 32,
                  "context_length": 2048, "feed_forward_length": 0, "attention.head_count": 0}
        for key, value in {**values, **changes}.items():
            if value is not None:
                writer.add_uint32(key[3:] if key.startswith("../") else "mamba." + key, value)
        writer.add_layer_norm_rms_eps(1e-5)
        names = {"backbone." + short: name for name, short in export.GGUF_NAMES.items()}
        for i in range(2):
            names.update({f"backbone.layers.{i}.{short}": f"blk.{i}.{name}"
                          for name, short in export.GGUF_LAYER.items()})
        for name, a in tensors.items():
            a = a[:, 0] if a.ndim == 3 else -np.exp(a) if name.endswith("A_log") else a
            kind = (kinds or {}).get(name)
            if kind is None:
                writer.add_tensor(names[name], np.ascontiguousarray(a, "<f4"))
            else:
                kind = gguf.GGMLQuantizationType[kind]
                writer.add_tensor(names[name], gguf.quants.quantize(a, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    @have("gguf")
    def test_files_of_the_gguf_package(self):
        import gguf
        s = Sizes(D=64, E=128, R=32, V=256)
        w = weights(s)
        matrices = [source for _, shape, is_w, source in layout(s) if is_w]
        for kind in (None, "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
            with self.subTest(kind):
                self.write_by_package(w, dict.fromkeys(matrices, kind) if kind else None)
                for small in (False, True):
                    if small:
                        self.small_chunks()
                    self.good(self.gguf, self.bin, "--tokenizer", "bytes", "--dtype", "f32")
                    _, _, tensors = read_model(self.bin, s)
                    for name, shape, is_w, source in layout(s):
                        want, got = w[source], np.frombuffer(tensors[name], "<f4").reshape(shape)
                        if is_w and kind:
                            number = gguf.GGMLQuantizationType[kind]
                            blocks = gguf.quants.quantize(want, number)
                            want = gguf.quants.dequantize(blocks, number)
                        if name.endswith("A_log"):
                            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
                        else:
                            np.testing.assert_array_equal(got, want.reshape(shape))
        self.write_by_package(w)
        self.bad("tokenizer", "--tokenizer", arguments=(self.gguf, self.bin))
        command = (self.gguf, self.bin, "--tokenizer", "bytes")
        for changes, word in (({"arch": "mamba2"}, "mamba2"), ({"arch": "jamba"}, "attention"),
                              ({"arch": "llama"}, "llama"), ({"block_count": 3}, "missing"),
                              ({"ssm.state_size": 4}, "its metadata implies"),
                              ({"ssm.inner_size": 0}, "intermediate_size")):
            self.write_by_package(w, **changes)
            self.bad(word, arguments=command)
        self.write_by_package(w, **{"ssm.state_size": None, "block_count": None})
        self.good(*command)
        self.write_by_package(w, **{"../split.count": 2})
        self.bad("one of 2 parts", arguments=command)
        self.write_by_package(w, **{"ssm.group_count": 1})
        self.assertIn("mamba.ssm.group_count", self.good(*command))
        self.write_by_package({**w, "backbone.layers.0.mixer.A_log":
                               w["backbone.layers.0.mixer.A_log"] * np.inf})
        self.bad("blk.0.ssm_a", arguments=command)

    def test_what_llama_cpp_cannot_run(self):
        for s, word in ((Sizes(E=12, proj_bias=True), "biases"), (Sizes(E=10), "inner size")):
            self.checkpoint(s)
            self.good()
            self.bad(word, arguments=("--to-gguf", self.bin, self.gguf))
        self.bad("no model.bin", arguments=("--to-gguf", os.path.join(self.src, "config.json"),
                                            self.gguf))
        self.assertEqual(self.run_main("--to-gguf", "a", "b", "--dtype", "f16")[0], 2)
        self.assertEqual(self.run_main("--to-gguf", "--to-hf", "a", "b")[0], 2)

    def test_damaged(self):
        self.checkpoint(Sizes(E=12))
        self.good()
        self.good("--to-gguf", self.bin, self.gguf)
        whole = open(self.gguf, "rb").read()
        command = (self.gguf, self.back, "--tokenizer", "bytes")
        for n in (0, 3, 4, 8, 20, 24, 100, 2000, len(whole) // 2, len(whole) - 40):
            write(self.gguf, whole[:n])
            self.bad("model.gguf", arguments=command)
        for version in (0, 1, 4, 1 << 24):
            write(self.gguf, whole[:4] + struct.pack("<I", version) + whole[8:])
            self.bad("version", arguments=command)
        for at in (8, 16):
            for count in (1 << 63, 1 << 31, 500):
                write(self.gguf, whole[:at] + struct.pack("<Q", count) + whole[at + 8:])
                self.bad("model.gguf", arguments=command)


# --------------------------------------------------------------------------------------------------
# 5. Public checkpoints, against transformers (dev/make_checkpoints.py)


class Families(Checkpoint):
    def test_every_family(self):
        with np.load(os.path.join(test_export.HERE, "checkpoints.npz")) as file:
            want = {name.replace("|", "/"): file[name] for name in file}
        for family in FAMILIES:
            with self.subTest(family.names):
                rename, tensors = family.rename or (lambda name: name), drawn(family)
                tensors = {rename(name): a for name, a in tensors.items()}
                if family.note == "classifier.weight":
                    tensors["classifier.weight"] = np.zeros((2, family.sizes.D), "f4")
                self.checkpoint(family.sizes, family.config, tensors)
                if family.refused:
                    self.bad(family.refused)
                    continue
                text = self.good()
                self.assertEqual("note:" in text, bool(family.note), text)
                self.assertIn(family.note or "", text)
                out = os.path.join(self.dir, "logits")
                self.run_mamba("logits", self.bin, "--tokens", ",".join(map(str, IDS)), "--all",
                               "-o", out)
                got = np.fromfile(out, "<f4").reshape(len(IDS), -1)
                error = np.abs(got - want[family.names]).max() / np.abs(want[family.names]).max()
                self.assertLess(error, 5e-5)

    def float64_logits(self, s, w, ids):
        """The model again, in double precision and in numpy."""
        w = {name.replace("backbone.", ""): a.astype("f8") for name, a in w.items()}
        rms = lambda x, eps: x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)

        def norm(x, name):
            if s.layer_norm:
                x = x - x.mean(-1, keepdims=True)
            return rms(x, s.eps) * w[name + ".weight"] + w.get(name + ".bias", 0)

        silu, softplus = lambda x: x / (1 + np.exp(-x)), lambda x: np.log1p(np.exp(x))
        res = w["embeddings.weight"][ids]
        for i in range(s.n_layer):
            p = f"layers.{i}.mixer."
            xn = norm(res, f"layers.{i}.norm")
            x, z = np.split(xn @ w[p + "in_proj.weight"].T + w.get(p + "in_proj.bias", 0), 2, -1)
            padded = np.concatenate([np.zeros((s.K - 1, s.E)), x])
            conv = w[p + "conv1d.weight"][:, 0]
            u = sum(padded[k:k + len(ids)] * conv[:, k] for k in range(s.K))
            u = silu(u + w.get(p + "conv1d.bias", 0))
            parts = np.split(u @ w[p + "x_proj.weight"].T, [s.R, s.R + s.N], -1)
            low, B, C = (rms(v, s.mixer_eps) for v in parts) if s.falcon else parts
            delta = softplus(low @ w[p + "dt_proj.weight"].T + w[p + "dt_proj.bias"])
            h, y, A = np.zeros((s.E, s.N)), [], -np.exp(w[p + "A_log"])
            for t in range(len(ids)):
                h = np.exp(delta[t][:, None] * A) * h + (delta[t] * u[t])[:, None] * B[t]
                y.append(h @ C[t])
            g = (np.array(y) + w[p + "D"] * u) * silu(z)
            res = res + g @ w[p + "out_proj.weight"].T + w.get(p + "out_proj.bias", 0)
        head = w["embeddings.weight"] if s.tied else w["lm_head.weight"]
        return norm(res, "norm_f") @ head.T

    def test_layer_norm(self):
        """transformers has none of these; so double precision is held to it without LayerNorm."""
        with np.load(os.path.join(test_export.HERE, "checkpoints.npz")) as file:
            for family in FAMILIES:
                if not family.refused:
                    want = file[family.names.replace("/", "|")]
                    got = self.float64_logits(family.sizes, drawn(family), IDS)
                    self.assertLess(np.abs(got - want).max() / np.abs(want).max(), 5e-5)
        for changes in ({}, {"tied": False, "proj_bias": True, "eps": 1e-3}):
            s = Sizes(D=32, E=64, N=16, R=2, V=264, layer_norm=True, **changes)
            w = {name: a * np.float32(0.3 if a.ndim > 1 else 1) for name, a in weights(s).items()}
            config = reference_config(s, rms_norm=False, norm_epsilon=s.eps)
            self.checkpoint(s, config, reference_names(w))
            self.good()
            header, _, tensors = read_model(self.bin, s)
            self.assertEqual(header["flags"] & 16, 16)
            self.assertEqual(tensors["layer1.norm_bias"],
                             w["backbone.layers.1.norm.bias"].tobytes())
            out, want = os.path.join(self.dir, "logits"), self.float64_logits(s, w, IDS)
            self.run_mamba("logits", self.bin, "--tokens", ",".join(map(str, IDS)), "--all", "-o",
                           out)
            got = np.fromfile(out, "<f4").reshape(len(IDS), -1)
            self.assertLess(np.abs(got - want).max() / np.abs(want).max(), 5e-5)
            for way in ("--to-hf", "--to-gguf"):
                self.bad("LayerNorm", arguments=(way, self.bin, os.path.join(self.dir, "out")))
        self.checkpoint(s, {**config, "rms_norm": True}, reference_names(w))
        self.bad("norm.bias is unknown")
        del w["backbone.norm_f.bias"]
        self.checkpoint(s, config, reference_names(w))
        self.bad("norm_f.bias", "missing")

    def test_the_table_names_them_all(self):
        with open(os.path.join(test_export.HERE, "..", "doc", "CHECKPOINTS.md")) as file:
            table = file.read()
        for family in FAMILIES:
            self.assertIn(family.names, table)


# --------------------------------------------------------------------------------------------------
# 6. Damaged files
# Each one gives a sentence, or a model that ./mamba reads. A damaged number or name may still make
# a model; what may not happen is a traceback, a second line, or a file that mamba refuses.

STRANGE = (None, True, False, 0, 1, -1, 2, 3, 1 << 31, 1 << 63, 1 << 80, -(1 << 40), 0.5, 1.5, 1e-5,
           1e400, -1e400, float("nan"), "", "a", "auto", "\ud800", "\x00\x1b", "1" * 50, [], [[]],
           [1], ["a"], [None], {}, {"a": 1}, {"type": "BPE"}, [0, 1, 2, 3, 4, 5])


def containers(value):
    """Every object and list inside a JSON value."""
    if isinstance(value, (dict, list)):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


def spoil_json(rng, value):
    """A copy with one to three places spoilt: removed, replaced, renamed, doubled or moved."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = [place for place in containers(value) if place]
        # few places, so that the large lists of a tokenizer do not take all the damage
        place = rng.choice(places[:60] if rng.random() < 0.7 else places) if places else None
        if place is None:
            return copy.deepcopy(rng.choice(STRANGE))
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        what = rng.randrange(5)
        if what == 0:
            del place[key]
        elif what <= 2:
            place[key] = copy.deepcopy(rng.choice(STRANGE))
        elif isinstance(place, dict):
            name = rng.choice(("x", "type", str(key) + "s", "\n", "hidden_size"))
            place[name] = copy.deepcopy(place[key])
        else:
            place.append(copy.deepcopy(place[key]))
    return value


def spoil_bytes(rng, data, limit):
    """A copy with some bytes changed below limit, cut off or put in."""
    data, what = bytearray(data), rng.randrange(8)
    if what == 0:
        return bytes(data[:rng.randrange(len(data))])
    if what == 1:
        at = rng.randrange(limit)
        data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(limit)
        data[at] = rng.choice((0, 1, 127, 128, 255, data[at] ^ 1 << rng.randrange(8)))
    return bytes(data)


class Damaged(Checkpoint):
    """MAMBA_FUZZ=2500 in the environment: so many of each kind instead of 150, 10,000 in all."""

    def setUp(self):
        super().setUp()
        self.count, self.made = int(os.environ.get("MAMBA_FUZZ", 150)), 0

    def one_sentence(self, *arguments, seed):
        status, text = self.run_main(*arguments)
        self.assertIn(status, (0, 1), f"seed {seed}: {text}")
        lines = [line for line in text.strip().splitlines() if ": note: " not in line]
        self.assertEqual(len(lines), 1, f"seed {seed}: {text}")
        self.assertTrue(lines[0].isprintable() and len(lines[0]) < 2000, f"seed {seed}: {text}")
        if status == 0:
            self.made += 1
            self.run_mamba("info", self.bin, "--verify")
            os.unlink(self.bin)

    def seeds(self):
        for seed in range(self.count):
            yield seed, random.Random(seed)
        self.assertGreater(self.count, self.made, "no file was damaged enough")

    def test_configs(self):
        s = Sizes(E=12)
        rename = {False: lambda w: w, True: reference_names}
        for seed, rng in self.seeds():
            reference = seed % 3 == 0
            config = (reference_config(s) if reference else
                      rng.choice([family.config for family in FAMILIES if not family.refused])
                      if seed % 3 == 1 else hf_config(s))
            self.checkpoint(s, spoil_json(rng, config), rename[reference](weights(s)))
            if rng.random() < 0.3:
                write(os.path.join(self.src, "generation_config.json"),
                      spoil_json(rng, {"bos_token_id": 1, "eos_token_id": [2, 3]}))
            self.one_sentence(self.src, self.bin, "--tokenizer", "bytes", seed=seed)

    def test_tokenizers(self):
        s = Sizes(E=12, V=300)
        self.checkpoint(s)
        table = test_export.tokenizer_json(test_export.MERGES)
        path = os.path.join(self.src, "tokenizer.json")
        for seed, rng in self.seeds():
            if seed % 4:
                write(path, spoil_json(rng, table))
            else:
                data = json.dumps(table).encode()
                write(path, spoil_bytes(rng, data, len(data)))
            self.one_sentence(self.src, self.bin, seed=seed)

    def test_adapters(self):
        s = Sizes()
        self.checkpoint(s)
        with np.load(os.path.join(test_export.HERE, "adapters.npz")) as file:
            config = json.loads(file["patterns/config"].tobytes())
            parts = {key[len("plain/lora/"):]: file[key] for key in file
                     if key.startswith("plain/lora/")}
        data, lora = test_export.safetensors(parts), os.path.join(self.dir, "lora")
        limit = 8 + struct.unpack_from("<Q", data)[0]
        config = {**config, "alpha_pattern": {"x_proj": 3}, "rank_pattern": {"x_proj": 2}}
        for seed, rng in self.seeds():
            write(os.path.join(lora, "adapter_config.json"),
                  spoil_json(rng, config) if seed % 2 else config)
            write(os.path.join(lora, "adapter_model.safetensors"),
                  data if seed % 2 else spoil_bytes(rng, data, limit))
            self.one_sentence(self.src, self.bin, "--tokenizer", "bytes", "--adapter", lora,
                              seed=seed)

    def test_gguf(self):
        s, gguf = Sizes(E=12, V=264), os.path.join(self.dir, "model.gguf")
        self.checkpoint(s)
        write(os.path.join(self.src, "tokenizer.json"),
              test_export.tokenizer_json(test_export.MERGES, nfc=False))
        self.good(self.src, self.bin)
        self.good("--to-gguf", self.bin, gguf)
        os.unlink(self.bin)
        data = open(gguf, "rb").read()
        limit = data.index(b"blk.0.attn_norm.weight")
        for seed, rng in self.seeds():
            write(gguf, spoil_bytes(rng, data, rng.choice((len(data), limit, limit, 600))))
            self.one_sentence(gguf, self.bin, seed=seed)


if __name__ == "__main__":
    test_export.main(sys.modules[__name__])
