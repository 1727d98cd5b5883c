"""families.py: configs of public checkpoints, with the keys as they were published and the sizes
made small; tests/test_checkpoints.py exports each, dev/make_checkpoints.py lets transformers
compute it. doc/CHECKPOINTS.md is the table for people."""
import zlib
from collections import namedtuple

import numpy as np

from test_export import Sizes, weights

# names: checkpoints that share the config. sizes: what transformers is told. rename: the names of
# the tensors. refused: words of the sentence, or none. note: a word of the notes that are printed.
Family = namedtuple("Family", "names sizes config rename refused note", defaults=(None, None, None))

D, E, LAYERS, V = 32, 64, 2, 264  # N 16, K 4, R 2: the defaults at this D
STEPS = {"time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1,
         "time_step_min": 0.001, "time_step_scale": 1.0}
PYTORCH = {"torch_dtype": "float32", "transformers_version": "4.39.0.dev0", "use_cache": True}

MAMBA_HF = {
    "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": E,
    "d_model": D, "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu",
    "hidden_size": D, "initializer_range": 0.1, "intermediate_size": E, "layer_norm_epsilon": 1e-05,
    "model_type": "mamba", "n_layer": LAYERS, "num_hidden_layers": LAYERS, "pad_token_id": 0,
    "pad_vocab_size_multiple": 8, "rescale_prenorm_residual": False, "residual_in_fp32": True,
    "rms_norm": True, "ssm_cfg": {}, "state_size": 16, "time_step_rank": 2, "use_bias": False,
    "use_conv_bias": True, "vocab_size": V, **STEPS, **PYTORCH}
REFERENCE = {"d_model": D, "n_layer": LAYERS, "vocab_size": V - 3, "ssm_cfg": {}, "rms_norm": True,
             "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
FALCON = {
    "architectures": ["FalconMambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4,
    "eos_token_id": 11, "expand": 16, "hidden_act": "silu", "hidden_size": D,
    "initializer_range": 0.1, "intermediate_size": E, "layer_norm_epsilon": 1e-05,
    "model_type": "falcon_mamba", "num_hidden_layers": LAYERS, "pad_token_id": 11,
    "rescale_prenorm_residual": False, "residual_in_fp32": True, "state_size": 16,
    "tie_word_embeddings": False, "time_step_rank": 2, "use_bias": False, "use_conv_bias": True,
    "vocab_size": V, **STEPS, "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0",
    "use_cache": True}
FLA = {
    "architectures": ["MambaForCausalLM"], "bos_token_id": 1, "conv_kernel": 4, "eos_token_id": 2,
    "expand": 2, "fuse_cross_entropy": True, "fuse_norm": True, "hidden_act": "silu",
    "hidden_size": D, "initializer_range": 0.02, "intermediate_size": E, "model_type": "mamba",
    "norm_eps": 1e-06, "num_hidden_layers": LAYERS, "pad_token_id": 0,
    "rescale_prenorm_residual": False, "residual_in_fp32": False, "state_size": 16,
    "tie_word_embeddings": False, "time_step_rank": 2, "use_bias": False, "use_conv_bias": True,
    "vocab_size": V, **STEPS, **PYTORCH}
MAMBA_HF_CODE = {
    "architectures": ["MambaForCausalLM"], "bias": False, "conv_bias": True, "d_conv": 4,
    "auto_map": {"AutoConfig": "configuration_mamba.MambaConfig",
                 "AutoModelForCausalLM": "modeling_mamba.MambaForCausalLM"},
    "d_inner": E, "d_model": D, "d_state": 16, "dt_rank": 2, "expand": 2, "initializer_range": 0.02,
    "model_type": "mamba", "n_layer": LAYERS, "pad_vocab_size_multiple": 8,
    "torch_dtype": "float32", "transformers_version": "4.35.2", "vocab_size": V}
DNA = {key: value for key, value in MAMBA_HF.items()
       if key not in ("d_inner", "d_model", "fused_add_norm", "n_layer", "rms_norm", "ssm_cfg",
                      "pad_vocab_size_multiple")}

SMALL = Sizes(D=D, E=E, N=16, K=4, R=2, V=V, n_layer=LAYERS)
UNTIED = Sizes(**{**vars(SMALL), "tied": False})


def sizes(base=SMALL, **changes):
    return Sizes(**{**vars(base), **changes})


reference = lambda name: name.replace("embeddings.", "embedding.")
mamba_hf = lambda name: (reference(name).replace("backbone.", "model.").replace(".mixer.", "."))
behind = lambda prefix: lambda name: prefix + name

FAMILIES = [
    Family("state-spaces/mamba-130m-hf, -370m-hf, -790m-hf, -1.4b-hf, -2.8b-hf", SMALL, MAMBA_HF),
    Family("state-spaces/mamba-1.4b-hf, an early revision", SMALL,
           {**MAMBA_HF, "num_hidden_layers": 32}, note="n_layer 2"),
    Family("state-spaces/mamba-130m, -370m, -790m, -1.4b, -2.8b", SMALL, REFERENCE, reference),
    Family("state-spaces/mamba-2.8b-slimpj", SMALL, {**REFERENCE, "tie_embeddings": True},
           reference),
    Family("havenhq/mamba-chat", SMALL, {**REFERENCE, "torch_dtype": "float16"}, reference),
    Family("xiuyul/mamba-2.8b-zephyr, mamba-2.8b-ultrachat", SMALL,
           {**REFERENCE, "architectures": ["MambaLMHeadModel"], "ssm_cfg": None}, reference),
    Family("clibrain/mamba-2.8b-instruct-openhermes", SMALL,
           {**REFERENCE, "ssm_cfg": {"device": "cuda", "dtype": "bfloat16"}}, reference),
    Family("kotoba-tech/kotomamba-2.8B-v1.0", SMALL,
           {**REFERENCE, "vocab_size": V, "tie_embeddings": True}, reference),
    Family("tri-ml/mamba-7b-rw", UNTIED,
           {**DNA, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}),
    Family("tiiuae/falcon-mamba-7b, -instruct, -pre-decay", sizes(UNTIED, falcon=True), FALCON),
    Family("tiiuae/Falcon3-Mamba-7B-Base, -Instruct", sizes(UNTIED, falcon=True, mixer_eps=1e-6),
           {**FALCON, "mixer_rms_eps": 1e-06, "use_falcon_mambapy": False,
            "use_associative_scan": True, "dtype": "bfloat16"}),
    Family("fla-hub/mamba-370M-10B, mamba-790M-10B, mamba-1.3B-100B", sizes(UNTIED, eps=1e-6), FLA),
    Family("mamba-cobra's language model", sizes(eps=1e-5),
           {**REFERENCE, "norm_epsilon": 1e-05, "vocab_size": V}, reference),
    Family("Q-bert/Mamba-130M, -370M, -790M, -1B, -2.8B, Mamba-3B-slimpj", SMALL, MAMBA_HF_CODE,
           mamba_hf),
    Family("dominguesm/mambarim-110m", SMALL,
           {**MAMBA_HF, "bos_token_id": 1, "eos_token_id": 2, "repetition_penalty": 1.2}),
    Family("SpirinEgor/mamba-1.4b-ru", SMALL, {**DNA, "bos_token_id": 1, "eos_token_id": 2}),
    Family("lightonai/mambaoutai", SMALL, {**MAMBA_HF, "eos_token_id": 3}),
    Family("delphi-suite/v0-mamba-100k ... -25.6m", SMALL,
           {**DNA, "bos_token_id": 1, "eos_token_id": 2}),
    Family("zhangtaolab/plant-dnamamba-BPE, -6mer, -singlebase", SMALL, DNA),
    Family("zhangtaolab/plant-dnamamba-BPE-promoter and the other classifiers", SMALL,
           {**DNA, "architectures": ["MambaForSequenceClassification"], "num_labels": 2,
            "id2label": {"0": "No", "1": "Yes"}, "label2id": {"No": 0, "Yes": 1},
            "problem_type": "single_label_classification"}, note="classifier.weight"),
    Family("hf-internal-testing and trl-internal-testing tiny random Mamba", SMALL,
           {**DNA, "transformers_version": "4.56.0", "dtype": "float32", "use_mambapy": False}),
    Family("checkpoints of torch.compile and DataParallel", SMALL, MAMBA_HF,
           behind("_orig_mod.module.")),
    Family("checkpoints of a Lightning module (model.)", SMALL, DNA, behind("model.")),
    Family("mamba.py's own models", SMALL,
           {"d_model": D, "n_layers": LAYERS, "d_state": 16, "d_conv": 4, "expand_factor": 2,
            "dt_rank": "auto", "vocab_size": V, "bias": False, "conv_bias": True,
            "rms_norm_eps": 1e-5, "pscan": True, "use_cuda": False},
           lambda name: reference(name).replace("backbone.", "")),
    # and what is no Mamba-1
    Family("tiiuae/falcon-mamba-7b-4bit", sizes(UNTIED, falcon=True),
           {**FALCON, "quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}},
           refused="quantization_config means quantized weights"),
    Family("state-spaces/mamba2-130m ... -2.7b", SMALL,
           {**REFERENCE, "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {},
            "d_intermediate": 0, "pad_vocab_size_multiple": 16}, reference,
           "layer Mamba2 is not supported"),
    Family("state-spaces/mamba2attn-2.7b", SMALL,
           {**REFERENCE, "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [9, 18, 27, 36],
            "attn_cfg": {"causal": True}}, reference, "attn_layer_idx names attention layers"),
    Family("mistralai/Mamba-Codestral-7B-v0.1", SMALL,
           {**DNA, "model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "num_heads": 4},
           refused="model_type mamba2 is not supported"),
    Family("ai21labs/Jamba-v0.1, AI21-Jamba-1.5-Mini", SMALL,
           {"model_type": "jamba", "architectures": ["JambaForCausalLM"], "attn_layer_period": 8},
           refused="model_type jamba is not supported: it mixes Mamba layers with attention"),
    Family("Zyphra/Zamba-7B-v1", SMALL, {"model_type": "zamba"},
           refused="model_type zamba is not supported"),
    Family("Zyphra/Zamba2-1.2B, -2.7B, -7B", SMALL, {"model_type": "zamba2"},
           refused="model_type zamba2 is not supported"),
    Family("ibm-ai-platform/Bamba-9B", SMALL, {"model_type": "bamba"},
           refused="model_type bamba is not supported"),
    Family("ibm-granite/granite-4.0-h", SMALL, {"model_type": "granitemoehybrid"},
           refused="model_type granitemoehybrid is not supported"),
    Family("nvidia/Nemotron-H-8B-Base-8K", SMALL, {"model_type": "nemotron_h"},
           refused="model_type nemotron_h is not supported"),
    Family("nvidia/Hymba-1.5B-Base", SMALL, {"model_type": "hymba"},
           refused="model_type hymba is not supported"),
    Family("tiiuae/Falcon-H1-0.5B ... -34B", SMALL, {"model_type": "falcon_h1"},
           refused="model_type falcon_h1 is not supported"),
    Family("kuleshov-group/caduceus-ph, caduceus-ps", SMALL,
           {**REFERENCE, "model_type": "caduceus", "architectures": ["CaduceusForMaskedLM"],
            "bidirectional": True, "bidirectional_strategy": "add", "rcps": True,
            "bidirectional_weight_tie": True, "norm_epsilon": 1e-05}, reference,
           "model_type caduceus is not supported: it reads the text in both directions"),
    Family("Bitbol-Lab/ProtMamba", SMALL, {**REFERENCE, "add_position_ids": "2d"}, reference,
           'add_position_ids is "2d"'),
    Family("Zyphra/BlackMamba-1.5B, -2.8B", SMALL,
           {**REFERENCE, "mamba_moe_layers": ["r", "8", "r", "8"]}, reference, "mamba_moe_layers"),
    Family("nvidia/MambaVision-T-1K", SMALL, {"model_type": "mambavision"},
           refused="model_type mambavision is not supported: it reads pictures"),
]


def drawn(family):
    """Weights of a family, calm enough that float32 has its digits."""
    seed = zlib.crc32(family.names.encode())
    scale = lambda name, a: (0.3 if a.ndim == 2 and "A_log" not in name else
                             0.5 if "A_log" in name or a.ndim == 3 else 1)
    return {name: (a * np.float32(scale(name, a))).astype("<f4")
            for name, a in weights(family.sizes, seed).items()}


IDS = [1, 200, 3, 77, 77, 0]
