#!/usr/bin/env python3
"""export.py: makes the one file that mamba.c runs (model.bin) from a published Mamba checkpoint,
and goes back.

  python export.py DIRECTORY model.bin             transformers layout, or that of state-spaces
  python export.py org/name model.bin              the same from the hub, by huggingface_hub
  python export.py tokenizer.json tokenizer.bin    the tokenizer alone
  python export.py model.gguf model.bin            from llama.cpp's format
  python export.py --to-hf model.bin DIRECTORY     a directory that transformers loads
  python export.py --to-gguf model.bin FILE        a file that llama.cpp loads

It needs numpy; torch only where the weights are a pickle (pytorch_model.bin). It is no loader for
Mamba-2 or for hybrids with attention: it says so and stops.

Sizes, as everywhere in this project: D d_model, E d_inner, N d_state, K d_conv, R dt_rank, V rows
of the embedding (a tokenizer may know fewer ids), n_layer. "W" marks the matrices that --dtype
applies to. Norms, biases, conv, A_log and D_skip stay float32: they are small, and the recurrence
meets them again at every step.

Contents: 1 errors, files | 2 the model: sizes and tensors | 3 config.json in | 4 number formats |
5 stored tensors: safetensors, pickle | 6 matching names and shapes | 7 model.bin out | 8 the
tokenizer | 9 model.bin in, transformers out | 10 adapters | 11 GGUF | 12 chat | 13
command line
"""
import signal
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the imports run; see main()
import argparse
import contextlib
import difflib
import itertools
import json
import math
import os
import re
import stat
import struct
import sys
import tempfile
import unicodedata
import warnings
import zlib
from collections import namedtuple

try:
    import numpy as np
except ImportError:
    np = None                                         # --help needs none

# --------------------------------------------------------------------------------------------------
# 1. Errors, files
# Whatever a file or a flag can cause is an ExportError: one line on stderr, exit status 1, and no
# output file.

CHUNK = 1 << 20  # elements handled at a time: memory stays flat however large a tensor is
PIECE = 1 << 17  # bytes copied at a time: they stay in the cache from reading to writing


class ExportError(Exception):
    pass


def printable(text):
    """A name out of a file may hold a line feed or an escape sequence for the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(e):
    return (str(e).strip() or type(e).__name__).splitlines()[0][:200]


def unique_keys(pairs):
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"{next(k for k in keys if keys.count(k) > 1)[:60]!r} appears twice in one object")
    return table


def read_json(path):
    try:
        with open(path, "rb") as f:
            table = json.loads(f.read().decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as e:
        raise ExportError(f"{path} is not valid JSON ({first_line(e)})")
    if not isinstance(table, dict):
        raise ExportError(f"{path} should hold a JSON object")
    return table


def json_text(value):
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_exactly(f, n, path):
    data = f.read(n)
    if len(data) != n:
        raise ExportError(f"{path} ended {n - len(data)} bytes early; is the download complete?")
    return data


@contextlib.contextmanager
def signals_held():
    """Signals that end the program wait, where the platform can do that."""
    mask = getattr(signal, "pthread_sigmask", None)
    wanted = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
              if hasattr(signal, name)}
    old = mask(signal.SIG_BLOCK, wanted) if mask else None
    try:
        yield
    finally:
        if mask:
            mask(signal.SIG_SETMASK, old)


@contextlib.contextmanager
def atomic_file(path):
    """A file that appears under its name only when it is complete and on the disk. A path that is a
    link stays one: the file that it names is replaced. The mode of an existing file is kept."""
    if os.path.isdir(path):
        raise ExportError(f"{path} is a directory; name the file to write")
    if os.path.exists(path) and not os.path.isfile(path):  # a device would be replaced by the file
        raise ExportError(f"{path} is no regular file; name the file to write")
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    prefix, temporary = f".{name[:40]}.", None        # a file's name has at most 255 bytes
    try:
        with signals_held():  # a signal in between would leave the file
            fd, temporary = tempfile.mkstemp(prefix=prefix, dir=folder)
        with os.fdopen(fd, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if os.path.exists(target):
            mode = stat.S_IMODE(os.stat(target).st_mode) & 0o777
        else:
            umask = os.umask(0)
            os.umask(umask)
            mode = 0o666 & ~umask                                           # mkstemp makes it 0600
        os.chmod(temporary, mode)
        os.replace(temporary, target)
        temporary = None
    except OSError as e:
        if e.filename is None or os.path.basename(e.filename).startswith(prefix):
            raise ExportError(f"cannot write {path}: {e.strerror or e}")
        raise  # about another file, one that is read
    finally:
        if temporary:
            with signals_held():
                os.unlink(temporary)


class Discarded(Exception):
    """Ends an atomic_file that is not wanted."""


def check_output(path, inputs):
    """Before the work begins: path can be written, and is none of the inputs by another name."""
    if not path:
        raise ExportError("the output needs a name that is not empty")
    for name in inputs:
        if os.path.exists(path) and os.path.exists(name) and os.path.samefile(path, name):
            raise ExportError(f"{path}: that is an input, {name}; "
                              "choose another name for the output")
    with contextlib.suppress(Discarded), atomic_file(path):
        raise Discarded


def progress(done, total, name):
    """One line, rewritten in place on a terminal and silent elsewhere."""
    if sys.stderr.isatty():
        line = f"{done / 1e6:6.0f} / {total / 1e6:.0f} MB  {name}" if name else ""
        print("\r" + line.ljust(79)[:79], end="" if name else "\r", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# 2. The model: sizes and tensors
# tensor_list() alone knows names, shapes, order and which tensors are W: reading, writing, checking
# and going back all walk it. `source` is the name in a checkpoint, without the "backbone." in
# front.

ARCHS = ("mamba", "falcon_mamba")
DTYPES = ("f32", "f16", "bf16", "q8", "q4")
FLAGS = ("tied", "proj_bias", "conv_bias", "mixer_norm", "layer_norm")  # bits 0 to 4
Model = namedtuple("Model",
                   "arch D n_layer V E N K R norm_eps mixer_eps bos pad eos " + " ".join(FLAGS),
                   defaults=(False,))
Tensor = namedtuple("Tensor", "name source shape is_w")


def tensor_list(m):
    D, E, N, K, R, V = m.D, m.E, m.N, m.K, m.R, m.V
    layer = [
        ("norm", "norm.weight", (D,), False),
        ("norm_bias", "norm.bias", (D,), False),
        ("in_proj", "mixer.in_proj.weight", (2 * E, D), True),  # output rows [x | z]
        ("in_bias", "mixer.in_proj.bias", (2 * E,), False),
        ("conv", "mixer.conv1d.weight", (E, 1, K), False),  # the last tap meets the current input
        ("conv_bias", "mixer.conv1d.bias", (E,), False),
        ("x_proj", "mixer.x_proj.weight", (R + 2 * N, E), True),  # output rows [dt_low | B | C]
        ("dt_proj", "mixer.dt_proj.weight", (E, R), True),
        ("dt_bias", "mixer.dt_proj.bias", (E,), False),
        ("A_log", "mixer.A_log", (E, N), False),
        ("D_skip", "mixer.D", (E,), False),
        ("out_proj", "mixer.out_proj.weight", (D, E), True),
        ("out_bias", "mixer.out_proj.bias", (D,), False)
    ]
    absent = [] if m.proj_bias else ["in_bias", "out_bias"]
    absent += [] if m.conv_bias else ["conv_bias"]
    absent += [] if m.layer_norm else ["norm_bias"]
    tensors = [Tensor("embedding", "embeddings.weight", (V, D), True)]
    for i in range(m.n_layer):
        tensors += [Tensor(f"layer{i}.{name}", f"layers.{i}.{source}", shape, is_w)
                    for name, source, shape, is_w in layer if name not in absent]
    tensors.append(Tensor("norm_f", "norm_f.weight", (D,), False))
    if m.layer_norm:
        tensors.append(Tensor("norm_f_bias", "norm_f.bias", (D,), False))
    return tensors if m.tied else tensors + [Tensor("head", "lm_head.weight", (V, D), True)]


def with_backbone(source):
    return source if source.startswith("lm_head.") else "backbone." + source


def shape_text(shape):
    return "(" + ", ".join(map(str, shape)) + ")"


def summary(m, dtype):
    sizes = ", ".join(f"{name} {getattr(m, name)}" for name in ("D", "E", "N", "K", "R", "V"))
    return f"{m.arch}, {m.n_layer} layers, {sizes}, {dtype}"


# --------------------------------------------------------------------------------------------------
# 3. config.json in
# Configs come in dialects: transformers, mamba-ssm (state-spaces), flash-linear-attention, mamba-hf
# and mixtures of them. Each value is read under every key that it has there. Where the keys
# contradict each other, the shapes of the tensors decide and a note says so. What no tensor can
# decide (an eps, an activation) must be stated once. An absent key means the default of the code
# that wrote the file. A key that could change the result and is not carried over is refused here.

ATTENTION = "it mixes Mamba layers with attention"
ELSEWHERE = {
    "mamba2": "its recurrence is another one (one A per head)",
    **dict.fromkeys(["jamba", "bamba", "zamba", "zamba2", "falcon_h1", "nemotron_h", "samba",
                     "granitemoehybrid", "hymba", "hybrid_mamba"], ATTENTION),
    **dict.fromkeys(["caduceus", "bimamba", "bi_mamba"],
                    "it reads the text in both directions, so it cannot generate"),
    **dict.fromkeys(["vim", "mambavision", "mamba_vision"], "it reads pictures")}
SSM_CFG_KEYS = {"layer", "d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias",  # the model
                "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor",  # its training
                "use_fast_path", "device", "dtype", "layer_idx"}  # how and where it runs

LIMITS = {"V": 1 << 26, "n_layer": 1 << 16, "N": 1024, "K": 1 << 12}  # as in mamba.c; else 1 << 20
# Each size's keys in config.json; those after the * are in ssm_cfg.
SIZE_KEYS = {"D": "hidden_size d_model *", "n_layer": "num_hidden_layers n_layer n_layers *",
             "E": "intermediate_size d_inner *", "N": "state_size d_state * d_state",
             "K": "conv_kernel d_conv * d_conv", "R": "time_step_rank dt_rank * dt_rank",
             "expand": "expand expand_factor * expand"}
FLAG_KEYS = {"tied": "tie_word_embeddings tie_embeddings *", "proj_bias": "use_bias bias * bias",
             "conv_bias": "use_conv_bias conv_bias * conv_bias"}
EPS_KEYS = ["layer_norm_epsilon", "norm_epsilon", "norm_eps", "rms_norm_eps", "layer_norm_eps",
            "rms_norm_epsilon"]
ACTIVATION_KEYS = ["hidden_act", "hidden_activation", "activation", "activation_function",
                   "act_fn", "hidden_act_fn"]
HEADS = ("score", "classifier", "classification_head", "regression_head", "value_head", "v_head",
         "qa_outputs", "pre_classifier")  # of models that classify

# Keys that change no logit: names, versions, token ids, generation, training, memory.
HARMLESS = set("""
    architectures auto_map model_type torch_dtype dtype transformers_version unsloth_version name
    return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss
    chunk_size_feed_forward is_decoder use_cache use_return_dict attn_implementation license
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id cls_token_id mask_token_id
    decoder_start_token_id tokenizer_class prefix task_specific_params problem_type finetuning_task
    id2label label2id num_labels classifier_dropout dropout hidden_dropout hidden_dropout_prob
    resid_dropout resid_pdrop embd_pdrop attention_dropout drop_path_rate pruned_heads language
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    initializer_range initializer_cfg init_device rescale_prenorm_residual residual_in_fp32
    fused_add_norm fuse_norm fuse_cross_entropy fuse_linear_cross_entropy fuse_swiglu use_l2warp
    time_step_scale time_step_min time_step_max time_step_floor time_step_init_scheme dt_min dt_max
    dt_init dt_scale dt_init_floor use_mambapy use_falcon_mambapy use_fast_path use_cuda pscan
    use_associative_scan gradient_checkpointing use_gradient_checkpointing seed device attn_cfg
    max_position_embeddings n_positions n_ctx ctx_len context_length max_seq_len max_seq_length
    max_sequence_length seq_length sequence_length block_size model_max_length window_size
    pad_vocab_size_multiple vocab_size ssm_cfg pretraining_tp pre_weights base_std
    """.split())
# Keys that may change the result, unless their value is none, false, 0 or empty.
RISKY = re.compile(
    r"multiplier|softcap|logits?_scal|(emb|embed|embedding|residual|logit|output)s?_scale|"
    r"scale_(emb|depth|residual|logit|output|input)|scale_by|(^|_)mup(_|$)|bidirection|rcps|"
    r"complement|position_ids|positional|position_emb|pos_emb|rope|rotary|expert|(^|_)moe(_|$)|"
    r"attn_layer|attention_layer|attn$|block_type|layer_type|layers_block|hybrid|d_intermediate|"
    r"mlp_|ffn|(time_step|dt)_limit|cross_attention|encoder_decoder|norm_type|normali[sz]ation|"
    r"layernorm|(^|_)(b|c|bc|bcdt|dt|b_c_dt|dt_b_c)_(layer)?(norm|rms)|qk_norm|parallel_res|"
    r"softplus|zero_centered|conv_act|quantiz|compress|weight_t|share|recurr|loop|prefix_tun|"
    r"vision|mixer_")
NEUTRAL_WORDS = ("", "none", "rms", "rmsnorm", "rms_norm", "silu", "swish", "mamba", "mamba1")


def is_neutral(key, value):
    """Whether the value of a risky key leaves the model as it is."""
    if isinstance(value, list) and "limit" in key:
        return len(value) == 2 and value[0] == 0 and value[1] in (None, math.inf)
    if isinstance(value, list):
        return all(is_neutral(key, v) for v in value)
    if isinstance(value, str):
        return value.lower() in NEUTRAL_WORDS
    if re.search("multiplier|scal", key) and type(value) in (int, float):
        return value == 1
    return not value


class Fields:
    """The keys of a config, checked as they are read; an error names the file and the key."""

    def __init__(self, table, path, notes=None):
        self.table, self.path = table, path
        self.notes = [] if notes is None else notes  # for stderr, once the export has succeeded

    def refuse_if(self, condition, why):
        if condition:
            raise ExportError(f"{self.path}: {why}")

    def note(self, text):
        self.notes.append(f"{self.path}: {text}")

    def get(self, key, default, good, wanted):
        value = self.table.get(key, default)
        self.refuse_if(not good(value), f"{key} is {json.dumps(value)[:60]}, expected {wanted}")
        return value

    def size(self, key, limit):
        return self.get(key, None, lambda v: type(v) is int and 0 < v <= limit,
                        f"a whole number from 1 to {limit}")

    def flag(self, key, default):
        return self.get(key, default, lambda v: type(v) is bool, "true or false")

    def eps(self, key):
        good = lambda v: type(v) in (int, float) and 0 <= v < 1 and np.float32(v) < 1
        return float(self.get(key, None, good, "a number from 0 to 1, below 1 in float32"))

    def ids(self, key):
        value = self.table.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        bad = not all(type(i) is int for i in ids)
        self.refuse_if(bad, f"{key} is {json.dumps(value)[:60]}, expected a token id, "
                            "a list of them or null")
        return ids

    def decide(self, stated, found, default):
        """The one value of stated, {key: value}; where they differ, the one that was found in the
        tensors. Nothing stated: what was found, else the default."""
        values = list(stated.values())
        if not values:
            return default if found is None else found
        if all(v == values[0] for v in values):
            return values[0]
        text = " and ".join(f"{key} {json.dumps(v)}" for key, v in stated.items())
        self.refuse_if(found is not None and found not in values,
                       f"{text} differ, and the tensors say {json.dumps(found)}")
        value = values[0] if found is None else found
        self.note(f"{text} differ; the tensors say {json.dumps(value)}")
        return value


class Config(Fields):
    """config.json with its ssm_cfg, and the sizes that the tensors have (see found_sizes)."""

    def __init__(self, table, path, found=None, notes=None):
        super().__init__(table, path, notes)
        self.found = found or {}
        self.reference = "d_model" in table and "hidden_size" not in table
        ssm_cfg = self.get("ssm_cfg", None, lambda v: v is None or isinstance(v, dict), "an object")
        self.ssm = Fields(ssm_cfg or {}, path + ": ssm_cfg", self.notes)

    def stated(self, keys, read):
        """{key: value} of the keys that are there."""
        own, _, inner = keys.partition("*")
        values = {key: read(self, key) for key in own.split() if key in self.table}
        values.update({f"ssm_cfg.{key}": read(self.ssm, key)
                       for key in inner.split() if key in self.ssm.table})
        return values

    def size(self, letter, default, auto=None):
        limit = LIMITS.get(letter, 1 << 20)
        read = lambda fields, key: (auto if auto and fields.table[key] == "auto"
                                    else Fields.size(fields, key, limit))
        return self.decide(self.stated(SIZE_KEYS[letter], read), self.found.get(letter), default)

    def inner(self, D):
        """E is stated, or it is expand times D. falcon-mamba-7b states both, and its expand is
        wrong: transformers goes by intermediate_size."""
        whole = {key: Fields.size(self, key, 1 << 20) for key in ("intermediate_size", "d_inner")
                 if self.table.get(key) is not None}
        if whole:
            return self.decide(whole, self.found.get("E"), None)
        fits = lambda v: type(v) in (int, float) and 0 < v < 1 << 20 and 0 < int(v * D) <= 1 << 20
        wanted = f"a factor that makes an inner size of the model's {D}"
        read = lambda fields, key: int(fields.get(key, None, fits, wanted) * D)
        return self.decide(self.stated(SIZE_KEYS["expand"], read), self.found.get("E"), 2 * D)

    def vocabulary(self):
        """Rows of the embedding. mamba-ssm rounds vocab_size up to a multiple."""
        limit, found = LIMITS["V"], self.found.get("V")
        if "vocab_size" not in self.table and found:
            return found
        V, multiple = 50277 if self.reference else 50280, 8
        if "vocab_size" in self.table:
            V = Fields.size(self, "vocab_size", limit)
        if "pad_vocab_size_multiple" in self.table:
            multiple = Fields.size(self, "pad_vocab_size_multiple", limit)
        padded = -(-V // multiple) * multiple
        return found if found in (V, padded) else padded if self.reference else V

    def switch(self, flag, default):
        stated = self.stated(FLAG_KEYS[flag], lambda fields, key: fields.flag(key, None))
        return self.decide(stated, self.found.get(flag), default)

    def tied(self):
        """A head that differs from the embedding does not decide alone: see match_tensors."""
        stated = self.stated(FLAG_KEYS["tied"], lambda fields, key: fields.flag(key, None))
        differ = len(set(stated.values())) == 2
        return self.decide(stated, self.found["tied"]() if differ and self.found else None, True)

    def norm_eps(self):
        stated = {key: Fields.eps(self, key) for key in EPS_KEYS if key in self.table}
        text = " and ".join(f"{key} {value:g}" for key, value in stated.items())
        self.refuse_if(len(set(stated.values())) > 1,
                       f"{text} differ; remove the one that the model was not trained with")
        return next(iter(stated.values()), 1e-5)


def refuse_what_is_not_mamba(config):
    table, kind = config.table, config.table.get("model_type")
    config.refuse_if(isinstance(kind, str) and kind in ELSEWHERE,
                     f"model_type {kind} is not supported: {ELSEWHERE.get(str(kind))}")
    names = table.get("architectures")
    for name in names if isinstance(names, list) else []:
        other = type(name) is str and re.match(r"Bi|Caduceus|Jamba|Mamba2|Bamba|Zamba|Vi[sm]", name)
        config.refuse_if(other, f"architecture {str(name)[:60]} is not supported: it is no Mamba-1")
    for key, why in (("attn_layer_idx", "names attention layers, which are not supported"),
                     ("d_intermediate", "asks for MLP layers, which are not supported"),
                     ("bidirectional", "models are not supported: they cannot generate"),
                     ("quantization_config", "means quantized weights, which are not supported; "
                                             "take the original ones")):
        config.refuse_if(table.get(key), f"{key} {why}")
    config.refuse_if(not config.flag("rms_norm", True) and kind == "falcon_mamba",
                     "rms_norm is false, and falcon_mamba has no LayerNorm")
    for key in ACTIVATION_KEYS:
        act = json.dumps(table.get(key, "silu"))
        config.refuse_if(act not in ('"silu"', '"swish"'),
                         f"{key} {act[:60]} is not supported, only silu (also called swish)")
    ssm = config.ssm
    layer = ssm.table.get("layer", "Mamba1")
    ssm.refuse_if(layer == "Mamba2", f"layer Mamba2 is not supported: {ELSEWHERE['mamba2']}")
    ssm.refuse_if(layer != "Mamba1",
                  f"layer {json.dumps(layer)[:60]} is not supported, only Mamba1")
    unknown = sorted(set(ssm.table) - SSM_CFG_KEYS)
    ssm.refuse_if(unknown, f"{', '.join(unknown)[:200]} is unknown, so what it changes cannot be "
                           "carried over")


def check_other_keys(config, falcon):
    """A key that nothing above reads: harmless, refused, or named in a note."""
    known = HARMLESS | set(EPS_KEYS) | set(ACTIVATION_KEYS) | {"rms_norm"}
    for keys in (*SIZE_KEYS.values(), *FLAG_KEYS.values()):
        known.update(keys.partition("*")[0].split())
    if falcon:
        known.add("mixer_rms_eps")
    one_way = config.table.get("bidirectional", True) in (False, None)
    unknown = []
    for key, value in config.table.items():
        if key in known or key.startswith("_") or one_way and key.startswith("bidirectional"):
            continue
        if not RISKY.search(key):
            unknown.append(key)
        elif not is_neutral(key, value):
            config.refuse_if(True, f"{key} is {json.dumps(value)[:60]}, which may change the "
                                   "result and is not supported")
    if unknown:
        config.note(f"not used, because unknown here: {', '.join(sorted(unknown))[:300]}")


def architecture(config):
    """mamba or falcon_mamba, by model_type or else by architectures."""
    kind = config.table.get("model_type")
    if "model_type" not in config.table:
        names = config.table.get("architectures")
        names = [str(name) for name in names] if isinstance(names, list) else []
        kind = ("falcon_mamba" if any(name.startswith("FalconMamba") for name in names) else
                "mamba" if config.reference or any(name.startswith("Mamba") for name in names)
                else None)
        config.refuse_if(kind is None,
                         "has neither model_type (transformers) nor d_model (state-spaces)")
    config.refuse_if(kind not in ARCHS, f"model_type {json.dumps(kind)[:60]} is not supported, "
                                        "only mamba and falcon_mamba")
    return kind


def model_from_config(config, generation, end_of_text=None):
    """end_of_text: the tokenizer's <|endoftext|>, since the reference layout states no ids."""
    refuse_what_is_not_mamba(config)
    arch = architecture(config)
    falcon, reference = arch == "falcon_mamba", config.reference
    check_other_keys(config, falcon)
    D = config.size("D", 2560 if reference else 768)
    mixer_eps = 0.0
    if falcon:
        mixer_eps = config.eps("mixer_rms_eps") if "mixer_rms_eps" in config.table else 1e-6
    config_ids = lambda key: ([0] if key not in config.table and not reference else config.ids(key))
    ids = lambda key: generation.ids(key) or config_ids(key)
    eos = ids("eos_token_id")
    if not eos and reference and end_of_text is not None:
        eos = [end_of_text]
    return check_ids(config, Model(
        arch=arch, D=D, n_layer=config.size("n_layer", 64 if reference else 32),
        V=config.vocabulary(), E=config.inner(D), N=config.size("N", 16), K=config.size("K", 4),
        R=config.size("R", -(-D // 16), auto=-(-D // 16)), norm_eps=config.norm_eps(),
        mixer_eps=mixer_eps, bos=(ids("bos_token_id") + [-1])[0],
        pad=(ids("pad_token_id") + [-1])[0], eos=eos, tied=config.tied(),
        proj_bias=config.switch("proj_bias", False), conv_bias=config.switch("conv_bias", True),
        mixer_norm=falcon, layer_norm=not config.flag("rms_norm", True)))


def check_ids(config, m):
    """Each id is a row of the embedding, each eos is kept once; model.bin has four places."""
    eos = [i for i in dict.fromkeys(m.eos) if i != -1]
    ids = [("bos_token_id", m.bos), ("pad_token_id", m.pad)] + [("eos_token_id", i) for i in eos]
    for key, i in ids:
        config.refuse_if(not -1 <= i < m.V, f"{key} {i} is outside the vocabulary of {m.V}")
    config.refuse_if(len(eos) > 4,
                     f"{len(eos)} values of eos_token_id, and model.bin has room for 4")
    return m._replace(eos=eos)


# --------------------------------------------------------------------------------------------------
# 4. Number formats
# bf16 is the upper half of a float32: rounding to nearest even adds 0x7fff plus the lowest bit that
# stays. NaN is kept apart, because that addition can carry it into infinity or through to zero.

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
LARGEST = {
    "F32": math.inf, "F16": 65504.0, "BF16": 3.3895313892515355e38, "Q8": math.inf, "Q4": math.inf
}
CODE_BITS, TILE = {"Q8": 8, "Q4": 4}, 32


def stored_bytes(shape, kind):
    """Of a tensor in model.bin."""
    if kind in CODE_BITS:
        return math.prod(-(-n // TILE) for n in shape) * tile_bytes(kind)
    return math.prod(shape) * ITEM_BYTES[kind]


def tile_bytes(kind):
    return 2 * TILE + CODE_BITS[kind] * 4 * TILE


def f32_to_bf16(x):
    bits = np.ascontiguousarray(x, "<f4").view("<u4")
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype("<u4")) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype("<u2")


def bf16_to_f32(half):
    return (half.astype("<u4") << 16).astype("<u4", copy=False).view("<f4")


def decode(raw, kind):
    """Stored bytes to float32, where every f16 and bf16 value is exact."""
    if kind == "BF16":
        return bf16_to_f32(np.frombuffer(raw, "<u2"))
    return np.frombuffer(raw, "<f4" if kind == "F32" else "<f2").astype("<f4", copy=False)


def check_values(x, kind, name, first):
    """x[0] is element `first` of the tensor, for the message."""
    bad = ~(np.abs(x) <= LARGEST[kind]) | np.isinf(x)                       # NaN compares false
    if bad.any():
        i = int(bad.argmax())
        hint = (
            f"too large for {kind.lower()}; use --dtype {'bf16 or f32' if kind == 'F16' else 'f32'}"
            if np.isfinite(x[i]) else "so the checkpoint is damaged, or its training diverged")
        raise ExportError(f"tensor {name} holds {x[i]:g} at element {first + i}, {hint}")


def all_finite(raw, kind):
    """Whether no stored number is NaN or infinite: their exponents are all ones."""
    letter, infinity = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00),
                        "BF16": ("<u2", 0x7F80)}[kind]
    bits = np.frombuffer(raw, letter)
    sign = 1 << (8 * ITEM_BYTES[kind] - 1)
    return len(bits) == 0 or int((bits & bits.dtype.type(sign - 1)).max()) < infinity


def encode(x, kind):
    """float32 to the bytes of model.bin."""
    if kind == "BF16":
        return f32_to_bf16(x).tobytes()
    return x.astype("<f4" if kind == "F32" else "<f2").tobytes()


# Q8 and Q4, described in files/tensors.h: tiles of 32 rows times 32 inputs, a bf16 scale and 32
# codes a row. Scales are chosen as files/quantizer.h chooses them, by operations that have one
# right result, so the bytes are the same.

def codes_of(w, scale, kind):
    lowest, highest = (-127, 127) if kind == "Q8" else (-8, 7)
    return np.clip(np.rint(w / np.where(scale == 0, np.float32(1), scale)), lowest, highest)


def quantize(x, kind):
    """(rows, inputs) to the bytes of their tiles."""
    bits, rows, inputs = CODE_BITS[kind], *x.shape
    x = np.pad(x, ((0, -rows % TILE), (0, -inputs % TILE)))
    w = x.reshape(-1, TILE, x.shape[1] // TILE, TILE)
    w = np.ascontiguousarray(w.transpose(3, 0, 2, 1))  # input, panel, tile, row
    peak = np.take_along_axis(w, np.abs(w).argmax(0)[None], 0)[0]
    scale, error = np.zeros_like(peak), np.full(peak.shape, np.inf)
    divisors = [127] if kind == "Q8" else [s * n / 4 for n in range(24, 35) for s in (-1, 1)]
    for divisor in divisors:
        tried = bf16_to_f32(f32_to_bf16(peak / np.float32(divisor)).reshape(-1)).reshape(peak.shape)
        total = np.zeros_like(error)
        for one in w:  # in this order, as mamba.c adds them up
            total += (one - codes_of(one, tried, kind) * tried).astype("f8") ** 2
        scale, error = np.where(total < error, tried, scale), np.minimum(total, error)
    scale = np.where(scale == 0, np.float32(0), scale)                      # not -0
    codes = (codes_of(w, scale, kind).astype("i4") + (1 << (bits - 1))).astype("u4")
    codes = codes.reshape(bits, 32 // bits, *peak.shape)
    words = np.zeros((bits, *peak.shape), "<u4")
    for j in range(32 // bits):
        words |= codes[:, j] << np.uint32(bits * j)
    words = (words ^ np.uint32(1 << 31)).transpose(1, 2, 0, 3)
    words = np.ascontiguousarray(words, "<u4").view("u1")
    scales = np.ascontiguousarray(f32_to_bf16(scale)).view("u1")
    return np.concatenate([scales, words.reshape(*scales.shape[:2], -1)], axis=-1).tobytes()


def tile_codes(raw, kind, inputs):
    """The tiles of whole panels: codes (rows, inputs) and scales (rows, groups of 32 inputs), rows
    rounded up to 32."""
    bits = CODE_BITS[kind]
    tiles = np.frombuffer(raw, "u1")
    tiles = tiles.reshape(-1, -(-inputs // TILE), tile_bytes(kind))  # panel, tile, byte
    scale = bf16_to_f32(np.ascontiguousarray(tiles[..., :2 * TILE]).view("<u2"))
    words = np.ascontiguousarray(tiles[..., 2 * TILE:]).view("<u4") ^ np.uint32(1 << 31)
    words = words.reshape(*tiles.shape[:2], bits, TILE)
    mask = np.uint32((1 << bits) - 1)
    codes = [words >> np.uint32(bits * j) & mask for j in range(32 // bits)]
    codes = np.stack(codes, axis=3).reshape(*tiles.shape[:2], TILE, TILE)
    codes = codes.astype("i4") - (1 << (bits - 1))  # panel, tile, input, row
    codes = codes.transpose(0, 3, 1, 2).reshape(-1, tiles.shape[1] * TILE)[:, :inputs]
    return codes, scale.transpose(0, 2, 1).reshape(-1, tiles.shape[1])


def code_values(codes, scale):
    return codes.astype("f4") * np.repeat(scale, TILE, axis=1)[:, :codes.shape[1]]


# --------------------------------------------------------------------------------------------------
# 5. Stored tensors
# A checkpoint is a dict from name to an object with .name, .kind, .shape and .chunks(), which
# yields float32 pieces. safetensors: u64 length, that much JSON {name: {"dtype", "shape",
# "data_offsets"}}, then the data without gaps.

class SafeTensor:
    def __init__(self, path, name, kind, shape, start):
        self.path, self.name, self.kind, self.shape, self.start = path, name, kind, shape, start

    def chunks(self):
        for raw in self.raw_chunks():
            x = decode(raw, self.kind)
            yield x.copy() if self.kind == "F32" else x  # not the buffer that is filled again

    def raw_chunks(self):
        """The stored bytes. Each piece is gone when the next one is asked for."""
        left = math.prod(self.shape) * ITEM_BYTES[self.kind]
        piece = memoryview(bytearray(min(left, CHUNK * ITEM_BYTES[self.kind], PIECE)))
        with open(self.path, "rb", buffering=0) as f:
            f.seek(self.start)
            while left:
                n, got = min(left, len(piece)), 0
                while got < n:
                    count = f.readinto(piece[got:n])
                    if not count:
                        raise ExportError(f"{self.path} ended {left - got} bytes early; "
                                          "is the download complete?")
                    got += count
                yield piece[:n]
                left -= n


class TorchTensor:
    KINDS = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}

    def __init__(self, path, name, tensor):
        self.path, self.name, self.shape, self.tensor = path, name, tuple(tensor.shape), tensor
        self.kind = self.KINDS.get(str(tensor.dtype))
        if self.kind is None or str(tensor.layout) != "torch.strided" or tensor.is_meta:
            raise ExportError(f"{path}: tensor {name} is {tensor.dtype}, {tensor.layout}; "
                              "dense float32, float16 and bfloat16 can be read")

    def chunks(self):
        flat = self.tensor.detach().reshape(-1)
        for i in range(0, flat.numel(), CHUNK):
            yield flat[i:i + CHUNK].float().numpy()


def safetensors_entry(path, name, entry, data_start, data_bytes):
    """(begin, end, SafeTensor) of one entry of the header, every field checked."""
    whole = lambda v: type(v) is int and 0 <= v < 1 << 62
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        good = isinstance(shape, list) and len(shape) <= 8 and all(map(whole, shape))
        good = good and whole(begin) and whole(end) and begin <= end
    except (TypeError, KeyError, ValueError):
        good = False
    if not good:
        raise ExportError(f"{path}: the header's entry for tensor {name!r} is malformed")
    if kind not in ("F32", "F16", "BF16"):
        raise ExportError(f"{path}: tensor {name} is {kind}; F32, F16 and BF16 can be read")
    if end > data_bytes:
        raise ExportError(
            f"{path}: tensor {name} ends {end - data_bytes} bytes past the end of the file; "
            "is the download complete?")
    if end - begin != math.prod(shape) * ITEM_BYTES[kind]:
        raise ExportError(
            f"{path}: tensor {name}, {kind} {shape_text(shape)}, does not fill its "
            f"{end - begin} bytes"
        )
    return begin, end, SafeTensor(path, name, kind, tuple(shape), data_start + begin)


def open_safetensors(path):
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        n = struct.unpack("<Q", read_exactly(f, 8, path))[0]
        if n > min(size - 8, 100 << 20):
            raise ExportError(
                f"{path} is truncated, or no safetensors file (its header would be {n} bytes long)")
        try:
            header = json.loads(read_exactly(f, n, path).decode("utf-8"),
                                object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as e:
            raise ExportError(f"{path}: the safetensors header is not valid JSON ({first_line(e)})")
    if not isinstance(header, dict):
        raise ExportError(f"{path}: the safetensors header is not a JSON object")
    entries = sorted((safetensors_entry(path, name, entry, 8 + n, size - 8 - n)
                      for name, entry in header.items() if name != "__metadata__"),
                     key=lambda e: e[:2])
    position = 0
    for begin, end, tensor in entries:
        if begin != position:
            wrong = "overlaps" if begin < position else "leaves a gap after"
            raise ExportError(f"{path}: tensor {tensor.name} {wrong} the one before it")
        position = end
    if 8 + n + position != size:
        raise ExportError(f"{path} has {size - 8 - n - position} bytes that belong to no tensor")
    return {tensor.name: tensor for _, _, tensor in entries}


def open_pickle(path):
    try:
        import torch
    except ImportError:
        raise ExportError(
            f"{path} is a pickle, and reading it needs torch 2.6 or newer (pip install torch)")
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if not version or tuple(map(int, version.groups())) < (2, 6):
        raise ExportError(
            f"reading {path} needs torch 2.6 or newer, this is {torch.__version__}: in older "
            "ones a crafted file can run code in spite of weights_only (CVE-2025-32434)")
    warnings.simplefilter("ignore")  # what is wrong comes as an error
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of torch before 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:
        raise ExportError(f"{path} cannot be read as a file of tensors alone: {first_line(e)}")
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ExportError(f"{path} does not hold a plain dictionary of tensors")
    return {str(name): TorchTensor(path, name, tensor) for name, tensor in state.items()}


def open_checkpoint(folder):
    readers = {"model.safetensors": open_safetensors, "pytorch_model.bin": open_pickle}
    for name, reader in readers.items():
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return reader(path)
        if os.path.exists(path + ".index.json"):
            return open_shards(folder, path + ".index.json", reader)
    raise ExportError(
        f"{folder} has no model.safetensors or pytorch_model.bin, nor an .index.json of their "
        "shards")


def open_shards(folder, index_path, reader):
    weight_map = read_json(index_path).get("weight_map")
    plain = lambda name: (isinstance(name, str) and name and name.isprintable()
                          and name == os.path.basename(name))
    if not isinstance(weight_map, dict) or not all(map(plain, weight_map.values())):
        raise ExportError(
            f"{index_path}: weight_map should give the name of a file beside it for each tensor")
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        path = os.path.join(folder, shard)
        found = reader(path)
        twice = sorted(set(found) & set(tensors))
        absent = sorted(name for name in weight_map
                        if weight_map[name] == shard and name not in found)
        if twice or absent:
            raise ExportError(f"{path}: tensor " +
                              (f"{twice[0]} is in another shard too" if twice else
                               f"{absent[0]} is missing, though the index promises it"))
        tensors.update(found)
    return tensors


# --------------------------------------------------------------------------------------------------
# 6. Matching names and shapes
# Checkpoints say embedding or embeddings, and put backbone., model., module. or _orig_mod. in
# front; mamba-hf has no "mixer." in its names. A tied head may be stored too: then it has to equal
# the embedding, because a config that ties two different tensors does not say which one was meant.

PREFIX = re.compile(r"(module|_orig_mod|base_model|model|backbone|mamba)\.")
MIXER_PART = re.compile(r"(layers\.\d+\.)((in_proj|conv1d|x_proj|dt_proj|out_proj)\.|(A_log|D)$)")


def canonical(name):
    """The name as in tensor_list: as transformers has it, without backbone."""
    while True:
        match = PREFIX.match(name)
        if not match:
            break
        name = name[match.end():]
    name = MIXER_PART.sub(r"\1mixer.\2", name)
    return "embeddings.weight" if name == "embedding.weight" else name


def by_canonical_name(stored, folder):
    """(the stored tensors by canonical name, the names of classifier heads, which are left out)"""
    by_name, left_out = {}, []
    for name, tensor in stored.items():
        short = canonical(name)
        if short.split(".")[0] in HEADS:
            left_out.append(name)
            continue
        twin = by_name.setdefault(short, tensor)
        if twin is not tensor:
            raise ExportError(f"{folder}: tensors {twin.name} and {name} mean the same one")
    return by_name, left_out


def found_sizes(by_name):
    """The sizes and flags that the tensors have. What cannot be seen is absent."""
    shape = lambda name: by_name[name].shape if name in by_name else ()
    embedding, A_log = shape("embeddings.weight"), shape("layers.0.mixer.A_log")
    dt_proj, conv = shape("layers.0.mixer.dt_proj.weight"), shape("layers.0.mixer.conv1d.weight")
    layers = {int(match[1]) for match in map(re.compile(r"layers\.(\d{1,9})\.").match, by_name)
              if match}
    found = {"n_layer": max(layers) + 1} if layers else {}
    if len(embedding or shape("lm_head.weight")) == 2:
        found.update(zip("VD", embedding or shape("lm_head.weight")))
    if len(A_log) == 2:
        found.update(zip("EN", A_log))
    if len(dt_proj) == 2:
        found["R"] = dt_proj[1]
    if len(conv) == 3:
        found["K"] = conv[2]
    if layers:
        found["proj_bias"] = "layers.0.mixer.in_proj.bias" in by_name
        found["conv_bias"] = "layers.0.mixer.conv1d.bias" in by_name
    head, embedding = by_name.get("lm_head.weight"), by_name.get("embeddings.weight")
    found["tied"] = lambda: not head or not embedding or same_values(head, embedding)
    return found


def missing(want, by_name, m, folder):
    others = sorted(set(by_name) - {other.source for other in tensor_list(m)})
    near = difflib.get_close_matches(want.source, others, 1, 0.5)
    hint = f"; the nearest name found is {by_name[near[0]].name}" if near else ""
    return ExportError(f"{folder}: tensor {with_backbone(want.source)} {shape_text(want.shape)} "
                       f"is missing{hint}")


def match_tensors(m, stored, folder, says="config.json"):
    """[(Tensor, stored tensor)] in the order of tensor_list(m). stored: by canonical name."""
    if m.n_layer > len(stored):
        raise ExportError(f"{folder}: {says} states {m.n_layer} layers, "
                          f"but there are only {len(stored)} tensors")
    by_name, pairs = dict(stored), []
    head = by_name.pop("lm_head.weight", None) if m.tied else None
    if head and "embeddings.weight" not in by_name:  # tied, and saved under its other name only
        by_name["embeddings.weight"], head = head, None
    for want in tensor_list(m):
        tensor = by_name.pop(want.source, None)
        if tensor is None:
            raise missing(want, by_name, m, folder)
        if tensor.shape != want.shape:
            raise ExportError(f"{folder}: tensor {tensor.name} has shape "
                              f"{shape_text(tensor.shape)}, but {says} implies "
                              f"{shape_text(want.shape)}")
        pairs.append((want, tensor))
    for tensor in by_name.values():
        raise ExportError(f"{folder}: tensor {tensor.name} is unknown, "
                          f"or {says} says that it is not there")
    if head and not same_values(head, pairs[0][1]):
        raise ExportError(
            f"{folder}: config.json ties the head to the embedding, but {head.name} differs from "
            f"{pairs[0][1].name}; if the head counts, set tie_word_embeddings (tie_embeddings) "
            "to false")
    return pairs


def same_values(a, b):
    return a.shape == b.shape and all(np.array_equal(x, y) for x, y in zip(a.chunks(), b.chunks()))


def stored_dtype(pairs):
    """The smallest dtype that loses nothing."""
    kinds = {tensor.kind for want, tensor in pairs if want.is_w}
    return kinds.pop().lower() if len(kinds) == 1 else "f32"


# --------------------------------------------------------------------------------------------------
# 7. model.bin out
# 256 bytes of header | tokenizer | zeros | the tensors, each at a multiple of 64 bytes, so that a
# mapped file is used in place. Three CRC-32 find damage: of the header, of the tokenizer, of the
# tensors with the gaps between them. The header is written last, when the sums are known.

MAGIC = b"mamba.c\n"
HEADER = struct.Struct("<8s12I2f6i4Q2I")  # 128 bytes; up to 252 is zero, then the CRC


def align(n):
    return -(-n // 64) * 64


def pack_header(m, dtype, blob, tensors_offset, tensors_bytes, tensors_crc):
    flags = sum(getattr(m, name) << bit for bit, name in enumerate(FLAGS))
    head = HEADER.pack(MAGIC, 1, 256, ARCHS.index(m.arch), DTYPES.index(dtype), flags, m.D,
                       m.n_layer, m.V, m.E, m.N, m.K, m.R, m.norm_eps, m.mixer_eps, m.bos, m.pad,
                       *(m.eos + [-1] * 4)[:4], 256, len(blob), tensors_offset, tensors_bytes,
                       zlib.crc32(blob), tensors_crc)
    head = head.ljust(252, b"\0")
    return head + struct.pack("<I", zlib.crc32(head))


def regrouped(chunks, n):
    """The same elements, n at a time."""
    held, count = [], 0
    for x in chunks:
        held, count = held + [x], count + len(x)
        if count >= n:
            x = np.concatenate(held)
            yield x[:count - count % n]
            held, count = [x[count - count % n:]], count % n
    if count:
        yield np.concatenate(held)


def encoded(want, tensor, kind):
    """The tensor's bytes in model.bin, piece by piece. Numbers that keep their format are copied:
    16-bit ones five times as fast as through float32."""
    done, row = 0, want.shape[-1]
    if kind == tensor.kind and hasattr(tensor, "raw_chunks"):
        for raw in tensor.raw_chunks():
            if not all_finite(raw, kind):
                check_values(decode(raw, kind), kind, tensor.name, done)
            done += len(raw) // ITEM_BYTES[kind]
            yield raw
        return
    for x in regrouped(tensor.chunks(), TILE * row) if kind in CODE_BITS else tensor.chunks():
        check_values(x, kind, tensor.name, done)
        done += len(x)
        yield quantize(x.reshape(-1, row), kind) if kind in CODE_BITS else encode(x, kind)


def write_model(path, m, pairs, blob, dtype):
    start = position = align(256 + len(blob))
    kind_of = lambda want: dtype.upper() if want.is_w else "F32"
    total = sum(stored_bytes(want.shape, kind_of(want)) for want, _ in pairs)
    with atomic_file(path) as f:
        f.write(bytes(256) + blob + bytes(start - 256 - len(blob)))
        crc = 0
        for want, tensor in pairs:
            gap = bytes(align(position) - position)
            f.write(gap)
            crc, position = zlib.crc32(gap, crc), position + len(gap)
            for data in encoded(want, tensor, dtype.upper() if want.is_w else "F32"):
                f.write(data)
                crc, position = zlib.crc32(data, crc), position + len(data)
                progress(position - start, total, want.name)
        f.seek(0)
        f.write(pack_header(m, dtype, blob, start, position - start, crc))
    progress(0, 0, "")
    print(f"wrote {path}: {summary(m, dtype)}, {position / 1e6:.1f} MB", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# 8. The tokenizer
# tokenizer.json <-> the "mtok" blob that tokenizer.c reads (its layout is described there). Only
# what the engine reproduces id for id is accepted; every other key, type or option is an error that
# names the part. What cannot change an id of a single text is left out with a note.
#
# A tokenizer.json is a pipeline of five parts, each one step or a Sequence of steps: normalizer,
# pre_tokenizer, model, post_processor, decoder. Recipe holds what they come to.

GPT2, GPT4, QWEN2, NUMBERS, DIGITS, PUNCT, FALCON, WORDS, BLANKS, SPACES, CHARS = range(1, 12)
CONTRACTIONS = ("'s|'t|'re|'ve|'m|'ll|'d", "'(?:[sdmt]|ll|ve|re)")
GPT2_TAIL = r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ANY_CASE = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)")
GPT4_TAILS = (r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
              r"|[^\r\n\p{L}\p{N}]?+\p{L}+|%s| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
              r"|[^\r\n\p{L}\p{N}]?+\p{L}+|%s| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# The spellings that give the same words; the first one is written by --to-hf.
REGEXES = {
    **{head + GPT2_TAIL: GPT2 for head in CONTRACTIONS},
    **{head + tail % r"\p{N}{1,3}": GPT4 for tail in GPT4_TAILS for head in ANY_CASE},
    **{head + tail % r"\p{N}": QWEN2 for tail in GPT4_TAILS for head in ANY_CASE},
    r"[\s\S]": CHARS,
}
FALCON_SEQUENCE = [("Punctuation", {"behavior": "Contiguous"}),
                   ("ByteLevel", {"add_prefix_space": False, "use_regex": True}),
                   ("Digits", {"individual_digits": False}),
                   ("Split", {"pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated",
                              "invert": False})]
FALCON_TAIL = FALCON_SEQUENCE[2:]                               # the steps after ByteLevel
ADDED_FLAGS = ["special", "lstrip", "rstrip", "single_word", "normalized"]  # bits 0..4
ADDED_NORMALIZED = 16
ADDED_OUTSIDE = 32                                              # not in the model's vocabulary
HOLE, LITERAL, ONE_BYTE = 0xFFFFFFFF, 0x80000000, 0x40000000
MAX_IDS = 1 << 24
MAX_ADDED_LENGTH, MAX_ADDED_BYTES = 512, 1 << 20                # tokenizer.c's bounds
BPE_BYTES, BPE_CHARS, WORD_LIST = 1, 2, 3                       # the kinds
BLOB_FLAGS = ("nfc prefix_space ignore_merges fuse_unknown byte_fallback first_prefix "
              "normal_spaces normal_prefix word_spaces decode_spaces decode_strip "
              "decode_strip_token decode_join").split()         # bits 0..12
SPACE_SYMBOL = "\u2581"                                         # SentencePiece's space


class Recipe:
    """What a tokenizer.json comes to: the fields of the blob."""

    def __init__(self):
        self.kind, self.flags, self.steps = BPE_CHARS, set(), []
        self.bos = self.unknown = -1
        self.decodes_bytes = False                              # <0xNN> is a byte


def byte_alphabet():
    """The character that stands for each byte in a byte-level vocabulary."""
    shown = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    hidden = [b for b in range(256) if b not in shown]
    return {**{b: chr(b) for b in shown}, **{b: chr(256 + i) for i, b in enumerate(hidden)}}


SYMBOL_OF = byte_alphabet()
BYTE_OF = {symbol: b for b, symbol in SYMBOL_OF.items()}


def refuse(part, why):
    raise ExportError(f"tokenizer: {part} {why}")


def short(value):
    return json.dumps(value)[:60]


def need(part, table, allowed, required=()):
    """Every key of the table must be known, and its value one of those listed for it (None: any
    value)."""
    if not isinstance(table, dict):
        refuse(part, f"is {short(table)}, expected an object")
    for key, value in table.items():
        if key not in allowed:
            refuse(f"{part}.{key}", "is not known")
        good = allowed[key]
        if good is not None and not any(type(value) is type(ok) and value == ok for ok in good):
            refuse(f"{part}.{key}", f"is {short(value)}, which is not supported")
    for key in required:
        if key not in table:
            refuse(f"{part}.{key}", "is missing")


def flatten(part, table, key):
    """[(part, step)] of one step, of a Sequence of them, of Sequences of Sequences, or of null."""
    if table is None:
        return []
    if not isinstance(table, dict) or not isinstance(table.get("type"), str):
        refuse(part, f"is {short(table)}; it has no type")
    if table["type"] != "Sequence":
        return [(part, table)]
    need(part, table, {"type": None, key: None})
    if not isinstance(table.get(key), list):
        refuse(f"{part}.{key}", "is not a list")
    if len(table[key]) == 1:
        return flatten(part, table[key][0], key)
    return [pair for i, step in enumerate(table[key])
            for pair in flatten(f"{part}.{key}[{i}]", step, key)]


def check_byte_level(part, table):
    """A ByteLevel entry; trim_offsets never changes ids. A missing use_regex is true."""
    both = [True, False]
    need(part, table, {"type": ["ByteLevel"], "add_prefix_space": both, "trim_offsets": both,
                       "use_regex": both}, ["add_prefix_space", "trim_offsets"])


def is_string_pattern(step, text):
    return step.get("pattern") == {"String": text}


def read_normalizer(recipe, table):
    for part, step in flatten("normalizer", table, "normalizers"):
        kind = step["type"]
        if kind == "NFC" and not recipe.flags:
            need(part, step, {"type": None})
            recipe.flags.add("nfc")
        elif kind == "Prepend" and "normal_prefix" not in recipe.flags:
            need(part, step, {"type": None, "prepend": [SPACE_SYMBOL]}, ["prepend"])
            recipe.flags.add("normal_prefix")
        elif kind == "Replace" and is_string_pattern(step, " "):
            need(part, step, {"type": None, "pattern": None, "content": [SPACE_SYMBOL]},
                 ["content"])
            recipe.flags.add("normal_spaces")
        else:
            refuse(part, f"is {short(kind)}, which is not supported in this place")
    if "normal_prefix" in recipe.flags and "normal_spaces" not in recipe.flags:
        refuse("normalizer", "prepends U+2581, but replaces no spaces")


def metaspace_prefix(part, step):
    """The prefix that a Metaspace adds: always, first or never."""
    need(part, step, {"type": None, "replacement": [SPACE_SYMBOL], "split": [True, False],
                      "add_prefix_space": [True, False], "str_rep": [SPACE_SYMBOL],
                      "prepend_scheme": ["always", "first", "never"]}, ["replacement"])
    old = "always" if step.get("add_prefix_space", True) else "never"
    return step.get("prepend_scheme", old)


def read_split(part, step):
    """The step of a Split."""
    need(part, step, {"type": None, "pattern": None, "behavior": None, "invert": [True, False]},
         ["pattern", "behavior", "invert"])
    pattern = step["pattern"]
    regex = pattern.get("Regex") if isinstance(pattern, dict) and len(pattern) == 1 else None
    known = REGEXES.get(regex) if isinstance(regex, str) else None
    code = CHARS if is_string_pattern(step, "") else known
    if code is None:
        refuse(part + ".pattern", f"is {short(pattern)}, which is not supported")
    if (step["behavior"], step["invert"]) not in (("Isolated", False), ("Removed", True)):
        refuse(part + ".behavior", f"is {short(step['behavior'])}, which is not supported")
    return code


def read_pre_tokenizer(recipe, table):
    steps = flatten("pre_tokenizer", table, "pretokenizers")
    for i, (part, step) in enumerate(steps):
        kind = step["type"]
        if recipe.kind == BPE_BYTES:                            # it must be the end, but for Falcon
            tail = [step for _, step in steps[i:]]
            if tail != [{"type": name, **options} for name, options in FALCON_TAIL]:
                refuse(part, f"is {short(kind)}; after ByteLevel only Falcon's steps are known")
            recipe.steps.append(FALCON)
            break
        if kind == "ByteLevel":
            check_byte_level(part, step)
            recipe.kind = BPE_BYTES
            if step["add_prefix_space"] and i > 0:
                refuse(part + ".add_prefix_space", "is true after another step")
            recipe.flags |= {"prefix_space"} if step["add_prefix_space"] else set()
            recipe.steps += [GPT2] if step.get("use_regex", True) else []
        elif kind == "Metaspace" and len(steps) == 1:
            prefix = metaspace_prefix(part, step)
            recipe.flags |= {"word_spaces"} | (set() if prefix == "never" else {"prefix_space"})
            recipe.flags |= {"first_prefix"} if prefix == "first" else set()
            recipe.steps += [SPACES] if step.get("split", True) else []
        elif kind == "Split" and is_string_pattern(step, " ") and len(steps) == 1 and \
                "normal_spaces" in recipe.flags:
            need(part, step, {"type": None, "pattern": None, "behavior": None, "invert": [False]})
            if step.get("behavior") not in ("MergedWithPrevious", "MergedWithNext", "Isolated"):
                refuse(part + ".behavior", f"is {short(step.get('behavior'))}")
        elif "normal_spaces" in recipe.flags:
            refuse(part, f"is {short(kind)} after a normalizer that replaces spaces")
        elif kind == "Split":
            recipe.steps.append(read_split(part, step))
        elif kind == "Digits":
            need(part, step, {"type": None, "individual_digits": [True, False]},
                 ["individual_digits"])
            recipe.steps.append(DIGITS if step["individual_digits"] else NUMBERS)
        elif kind == "Punctuation":
            need(part, step, {"type": None, "behavior": ["Contiguous"]}, ["behavior"])
            recipe.steps.append(PUNCT)
        elif kind in ("Whitespace", "WhitespaceSplit"):
            need(part, step, {"type": None})
            recipe.steps.append(WORDS if kind == "Whitespace" else BLANKS)
        else:
            refuse(part, f"is {short(kind)}, which is not supported in this place")
    if len(recipe.steps) > 4:
        refuse("pre_tokenizer", f"has {len(recipe.steps)} steps, at most 4 are supported")


def read_decoder(recipe, table):
    steps, flags = flatten("decoder", table, "decoders"), recipe.flags
    names = [step["type"] for _, step in steps]
    if (recipe.kind == BPE_BYTES) != (names == ["ByteLevel"]):
        refuse("decoder" if recipe.kind == BPE_BYTES else "pre_tokenizer",
               "does not fit: ByteLevel stands in both, pre_tokenizer and decoder, or in none")
    for i, (part, step) in enumerate(steps):
        kind = step["type"]
        if kind == "ByteLevel":
            check_byte_level(part, step)
        elif kind == "Metaspace" and len(steps) == 1:
            flags.add("decode_spaces")
            flags |= set() if metaspace_prefix(part, step) == "never" else {"decode_strip_token"}
        elif kind == "Replace" and step.get("pattern") == {"String": SPACE_SYMBOL} and i == 0:
            need(part, step, {"type": None, "pattern": None, "content": [" "]}, ["content"])
            flags.add("decode_spaces")
        elif kind == "ByteFallback" and "Fuse" not in names[:i]:
            need(part, step, {"type": None})
            recipe.decodes_bytes = True
        elif kind == "Fuse":
            need(part, step, {"type": None})
        elif kind == "Strip" and i == len(steps) - 1 and "Fuse" in names:
            need(part, step, {"type": None, "content": [" "], "start": [0, 1], "stop": [0]},
                 ["content", "start", "stop"])
            flags |= {"decode_strip"} if step["start"] else set()
        else:
            refuse(part, f"is {short(kind)}, which is not supported in this place")
    if not steps:
        flags.add("decode_join")
    encodes = bool(flags & {"normal_spaces", "word_spaces"})
    if encodes != ("decode_spaces" in flags):
        refuse("decoder", "does not make spaces of U+2581 again" if encodes else
               "makes spaces of U+2581, but nothing made U+2581 of spaces")


def read_post_processor(recipe, table, vocab):
    """A ByteLevel moves offsets only. A template may put one token before a text."""
    for part, step in flatten("post_processor", table, "processors"):
        if step["type"] == "ByteLevel":
            check_byte_level(part, step)
            continue
        if step["type"] != "TemplateProcessing":
            refuse(part, f"is {short(step['type'])}, which is not supported: only a template that "
                         "puts one token before the text is")
        need(part, step, {"type": None, "single": None, "pair": None, "special_tokens": None})
        single = step.get("single")
        good = isinstance(single, list) and all(isinstance(p, dict) and len(p) == 1 for p in single)
        names = [list(piece)[0] for piece in single] if good else []
        values = [value for piece in single for value in piece.values()] if good else []
        if names not in (["Sequence"], ["SpecialToken", "Sequence"]) or \
                not all(isinstance(value, dict) for value in values) or values[-1].get("id") != "A":
            refuse(part + ".single", f"is {json.dumps(single)[:160]}; only one token before the "
                                     "text is supported")
        if names == ["Sequence"]:
            continue
        name, tokens = single[0]["SpecialToken"].get("id"), step.get("special_tokens")
        ids = tokens.get(name, {}) if isinstance(tokens, dict) and isinstance(name, str) else {}
        ids = ids.get("ids") if isinstance(ids, dict) else None
        if not (isinstance(ids, list) and len(ids) == 1 and type(ids[0]) is int):
            refuse(part + ".special_tokens", f"has no single id for {short(name)}")
        if recipe.bos != -1:
            refuse(part, "puts a second token before the text")
        recipe.bos = ids[0]


def read_model(recipe, model, notes):
    """Checks the options of the model; returns its vocabulary."""
    kind = model.get("type") if isinstance(model, dict) else None
    if kind is None and isinstance(model, dict) and "merges" in model:
        kind = "BPE"                                            # files before 2020 name no type
    if kind not in ("BPE", "WordLevel"):
        refuse("model.type", f"is {short(kind)}; BPE and WordLevel are supported")
    if kind == "WordLevel":
        need("model", model, {"type": None, "vocab": None, "unk_token": None})
        if recipe.kind == BPE_BYTES:
            refuse("pre_tokenizer", "is ByteLevel before a WordLevel model")
        if recipe.flags & {"word_spaces", "normal_spaces", "decode_spaces"}:
            refuse("model.type", "is WordLevel where spaces become U+2581")
        recipe.kind = WORD_LIST
    else:
        need("model", model, {"type": None, "dropout": [None, 0, 0.0], "unk_token": None,
                              "continuing_subword_prefix": [None, ""],
                              "end_of_word_suffix": [None, ""], "fuse_unk": [True, False],
                              "byte_fallback": [True, False], "ignore_merges": [True, False],
                              "vocab": None, "merges": None})
    if model.get("dropout") is not None:
        notes.append("tokenizer: model.dropout is 0, which changes nothing")
    vocab, unknown = read_vocab(model), model.get("unk_token")
    bytes_of = SYMBOL_OF.values() if recipe.kind == BPE_BYTES else map("<0x%02X>".__mod__,
                                                                       range(256))
    complete = all(token in vocab for token in bytes_of)        # nothing is ever unknown
    if unknown is not None and not isinstance(unknown, str):
        refuse("model.unk_token", f"is {short(unknown)}, expected a token")
    if recipe.kind == BPE_CHARS and model.get("byte_fallback"):
        recipe.flags.add("byte_fallback")
        if not recipe.decodes_bytes:
            refuse("decoder", "has no ByteFallback, but the model has byte_fallback")
    elif model.get("byte_fallback") and not complete:
        refuse("model.byte_fallback", "is true, and byte symbols are missing in model.vocab")
    unused = complete and (recipe.kind == BPE_BYTES or "byte_fallback" in recipe.flags)
    if unknown is not None and not unused:
        if unknown in vocab:
            recipe.unknown = vocab[unknown]
        elif recipe.kind != WORD_LIST:                          # there, the library has none, too
            refuse("model.unk_token", f"is {short(unknown)}, which model.vocab lacks")
    recipe.flags |= {"fuse_unknown"} if model.get("fuse_unk") and recipe.unknown != -1 else set()
    recipe.flags |= {"ignore_merges"} if model.get("ignore_merges") else set()
    return vocab


def read_vocab(model):
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        refuse("model.vocab", "is missing or empty")
    seen = {}
    for token, i in vocab.items():
        if type(i) is not int or not 0 <= i < MAX_IDS:
            refuse("model.vocab", f"has id {short(i)} for {short(token)}; ids are 0..{MAX_IDS - 1}")
        if i in seen:
            refuse("model.vocab", f"has id {i} twice, for {short(seen[i])} and {short(token)}")
        if not token:
            refuse("model.vocab", f"has an empty token, id {i}")
        seen[i] = token
    return vocab


BYTE_TOKEN, ODD_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>"), re.compile("<0x[+0-9A-Fa-f]{2}>")


def token_bytes(recipe, token):
    """What the decoder makes of one token, and its mark: LITERAL, ONE_BYTE or 0."""
    if recipe.kind == BPE_BYTES:
        if all(ch in BYTE_OF for ch in token):
            return bytes(BYTE_OF[ch] for ch in token), 0
        return token.encode("utf-8"), LITERAL
    if recipe.decodes_bytes and BYTE_TOKEN.fullmatch(token):
        return bytes([int(token[3:5], 16)]), ONE_BYTE
    if recipe.decodes_bytes and ODD_BYTE_TOKEN.fullmatch(token):
        refuse("model.vocab", f"has {short(token)}, which is a byte for the decoder only")
    if "decode_spaces" not in recipe.flags:
        return token.encode("utf-8"), 0
    literal = LITERAL if " " in token else 0
    if literal and SPACE_SYMBOL in token:
        refuse("model.vocab", f"has {short(token)}, with spaces of both kinds")
    return token.replace(SPACE_SYMBOL, " ").encode("utf-8"), literal


def normalized_token(recipe, content):
    """How the library decodes an added token that it looks for in normalized text."""
    prefix = SPACE_SYMBOL if "normal_prefix" in recipe.flags else ""
    return prefix + content.replace(" ", SPACE_SYMBOL) if "normal_spaces" in recipe.flags \
        else content


def read_merges(recipe, model, vocab):
    """Id triples by rank. A later duplicate replaces an earlier one, as in the library; a merge of
    a token that no word can contain can never apply and is left out."""
    merges, triples = model.get("merges"), {}
    if recipe.kind == WORD_LIST:
        return []
    if not isinstance(merges, list):
        refuse("model.merges", "is not a list")
    for rank, merge in enumerate(merges):
        part = f"model.merges[{rank}]"
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or \
                not all(isinstance(p, str) and p for p in pair):
            refuse(part, f"is {short(merge)}, not a pair")
        tokens = pair[0], pair[1], pair[0] + pair[1]
        for token in tokens:
            if token not in vocab:
                refuse(part, f"needs {short(token)}, which model.vocab lacks")
            if recipe.decodes_bytes and BYTE_TOKEN.fullmatch(token):
                refuse(part, f"has {short(token)}, the token of a byte")
        triples.pop(tuple(pair), None)
        triples[tuple(pair)] = tuple(vocab[token] for token in tokens)
    return [ids for pair, ids in triples.items()
            if not any(token_bytes(recipe, token)[1] for token in pair)]


def read_added(recipe, table, vocab, merges, notes):
    """[(id, flags, content)] in the file's order; ids must be those that the library gives when it
    loads the file. Of a token that is listed twice, it keeps the first id and the last flags."""
    added, contents, next_id, searched = {}, {}, len(vocab), {}
    taken, merged = set(vocab.values()), {i for merge in merges for i in merge}
    table = [] if table is None else table
    if not isinstance(table, list):
        refuse("added_tokens", "is not a list")
    for n, entry in enumerate(table):
        part = f"added_tokens[{n}]"
        need(part, entry, {"id": None, "content": None,
                           **{name: [True, False] for name in ADDED_FLAGS}},
             ["id", "content"] + ADDED_FLAGS)
        content = entry["content"]
        if not isinstance(content, str) or \
                not 0 < len(content.encode("utf-8", "surrogatepass")) <= MAX_ADDED_LENGTH:
            refuse(part + ".content", f"is not a string of 1 to {MAX_ADDED_LENGTH} bytes")
        if "nfc" in recipe.flags and entry["normalized"] and \
                not unicodedata.is_normalized("NFC", content):
            refuse(part + ".content", f"{json.dumps(content)} is not in NFC; how it decodes "
                                      "depends on the library's version")
        flags = sum(1 << bit for bit, name in enumerate(ADDED_FLAGS) if entry[name])
        if content in contents:
            i = contents[content]
            flags |= added[i][1] & ADDED_OUTSIDE
            notes.append(f"tokenizer: {part} repeats {short(content)}, which keeps id {i}")
        elif content in vocab:
            i = vocab[content]
        else:
            i, next_id, flags = next_id, next_id + 1, flags | ADDED_OUTSIDE
            if i in taken:
                refuse(part, f"{short(content)} gets id {i}, which the vocabulary uses")
        if content not in contents and (entry["id"] != i or type(entry["id"]) is not int):
            refuse(part + ".id",
                   f"is {short(entry['id'])}, but the library gives {short(content)} id {i}")
        if recipe.decodes_bytes and BYTE_TOKEN.fullmatch(content):
            refuse(part, f"is {short(content)}, the token of a byte")
        contents[content] = i
        added[i] = (i, flags, content)
        if entry["normalized"] and "normal_spaces" in recipe.flags:
            other = searched.setdefault(normalized_token(recipe, content), content)
            if other != content:
                refuse(part, f"{short(content)} is found where {short(other)} is")
            if content in vocab and (len(content) == 1 or i in merged):
                refuse(part, f"{short(content)} is normalized and a part of words, too")
    if sum(12 + len(content.encode("utf-8", "surrogatepass"))
           for _, _, content in added.values()) > MAX_ADDED_BYTES:
        refuse("added_tokens", f"hold more than {MAX_ADDED_BYTES} bytes")
    return list(added.values())


def tokenizer_blob(path_or_dict, notes=None, source=b""):
    """tokenizer.json, as a path or already parsed, to the blob. notes: a list that gets a sentence
    for each thing that was left out. source: the bytes of the file, which --to-hf gives back."""
    data, notes = path_or_dict, [] if notes is None else notes
    if not isinstance(data, dict):
        try:
            with open(path_or_dict, encoding="utf-8") as f:
                data = json.load(f, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            refuse(str(path_or_dict), f"is not JSON: {error}")
    need("tokenizer.json", data, dict.fromkeys(
        ["version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
         "post_processor", "decoder", "model"]))
    if data.get("version", "1.0") != "1.0":
        refuse("version", f"is {short(data['version'])}, expected \"1.0\"")
    for key in ("truncation", "padding"):
        if data.get(key) is not None:
            notes.append(f"tokenizer: {key} is left out; a prompt is read whole")
    recipe, model = Recipe(), data.get("model")
    if isinstance(model, dict) and model.get("type") in ("Unigram", "WordPiece"):
        refuse("model.type", f"is {short(model['type'])}; BPE and WordLevel are supported")
    read_normalizer(recipe, data.get("normalizer"))
    read_pre_tokenizer(recipe, data.get("pre_tokenizer"))
    if recipe.kind == BPE_BYTES and "normal_spaces" in recipe.flags:
        refuse("normalizer", "replaces spaces before ByteLevel")
    read_decoder(recipe, data.get("decoder"))
    vocab = read_model(recipe, model, notes)
    merges = read_merges(recipe, model, vocab)
    added = read_added(recipe, data.get("added_tokens"), vocab, merges, notes)
    read_post_processor(recipe, data.get("post_processor"), vocab)
    return pack_tokenizer(recipe, vocab, merges, added, zlib.compress(source, 9) if source else b"")


def pack_tokenizer(recipe, vocab, merges, added, packed_source):
    token_of = {i: token for token, i in vocab.items()}
    token_of.update((i, normalized_token(recipe, content) if bits & ADDED_NORMALIZED else content)
                    for i, bits, content in added)
    n_ids = max(token_of) + 1
    if recipe.bos != -1 and recipe.bos not in token_of:
        refuse("post_processor", f"puts id {recipe.bos} before the text, which has no token")
    flags = sum(1 << bit for bit, name in enumerate(BLOB_FLAGS) if name in recipe.flags)
    cuts = sum(step << 8 * i for i, step in enumerate(recipe.steps))
    old = {(GPT2,): 1, (PUNCT, GPT2, FALCON): 2}.get(tuple(recipe.steps))
    fields = recipe.kind, flags, cuts, n_ids, len(merges), len(added)
    if recipe.kind == BPE_BYTES and old and flags <= (3 if old == 1 else 1) and \
            recipe.bos == recipe.unknown == -1 and not packed_source:  # what older programs read
        out = [struct.pack("<4s7I", b"mtok", 1, *fields[:2], old, *fields[3:])]
    else:
        out = [struct.pack("<4s7I2iI20x", b"mtok", 2, *fields, recipe.bos, recipe.unknown,
                           len(packed_source))]
    one_byte = {}
    for i in range(n_ids):
        if i not in token_of:
            out.append(struct.pack("<I", HOLE))
            continue
        try:
            raw, mark = token_bytes(recipe, token_of[i])
        except UnicodeEncodeError:
            refuse(f"token {i}", f"is {short(token_of[i])}, which holds half a surrogate pair")
        if mark == ONE_BYTE:
            one_byte[raw[0]] = i
        out.append(struct.pack("<I", len(raw) | mark) + raw)
    if recipe.kind == BPE_BYTES:
        one_byte = {b: vocab[SYMBOL_OF[b]] for b in range(256) if SYMBOL_OF[b] in vocab}
    if recipe.kind != WORD_LIST:
        out.append(struct.pack("<256i", *(one_byte.get(b, -1) for b in range(256))))
    out += [struct.pack("<3I", *merge) for merge in merges]
    for i, bits, content in added:
        raw = content.encode("utf-8")
        out.append(struct.pack("<3I", i, bits, len(raw)) + raw)
    return b"".join(out) + packed_source


def tokenizer_source(blob):
    """The tokenizer.json that a blob was made of, as bytes; None where it was not kept."""
    n = struct.unpack_from("<I", blob, 40)[0] if struct.unpack_from("<I", blob, 4)[0] == 2 else 0
    if n == 0:
        return None
    try:
        return zlib.decompress(blob[len(blob) - n:])
    except zlib.error as error:
        refuse("blob", f"is damaged ({error})")


def bytes_tokenizer_blob():
    """Ids 0..255 are the bytes themselves."""
    return struct.pack("<4s7I", b"mtok", 1, 0, 0, 0, 256, 0, 0)


def vocab_txt_table(path, notes):
    """A vocab.txt, a token a line, as a tokenizer.json: what EsmTokenizer makes of it, which reads
    the longest token first, as for k-mers of DNA. tokenizer_config.json beside it may say
    otherwise."""
    with open(path, "rb") as f:
        try:
            tokens = [line.strip() for line in f.read().decode("utf-8").splitlines()]
        except UnicodeDecodeError as error:
            raise ExportError(f"{path} is not UTF-8 ({first_line(error)})")
    config_path = os.path.join(os.path.dirname(path), "tokenizer_config.json")
    config = read_json(config_path) if os.path.exists(config_path) else {}
    kind = config.get("tokenizer_class")
    if any(token.startswith("##") for token in tokens) or str(kind).startswith("Bert"):
        refuse(path, "is the vocabulary of WordPiece; BPE and WordLevel are supported")
    if kind not in (None, "EsmTokenizer"):
        refuse(path, f"belongs to {short(kind)}, which is not supported")
    if kind is None:
        notes.append(f"{path}: no tokenizer_config.json names its class; it is read as "
                     "EsmTokenizer does, the longest token first")

    def special(key, default):                                  # text, or an object with a content
        value = config.get(key, default)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    vocab = {token: i for i, token in enumerate(tokens) if token}
    names = [special(name, f"<{name[:-6]}>") for name in
             ("unk_token", "pad_token", "mask_token", "cls_token", "eos_token", "bos_token")]
    unknown, cls, eos = names[0], special("cls_token", None), special("eos_token", None)
    template = None
    if cls in vocab:
        template = {"type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": cls, "type_id": 0}},
                               {"Sequence": {"id": "A", "type_id": 0}}],
                    "pair": [], "special_tokens": {cls: {"id": cls, "ids": [vocab[cls]],
                                                         "tokens": [cls]}}}
    if eos in vocab:
        notes.append(f"{path}: {printable(eos)} is not put after a prompt, as transformers does: "
                     "the text goes on")
    added = [{"id": i, "content": token, "special": token in names, "lstrip": False,
              "rstrip": False, "single_word": False, "normalized": False}
             for token, i in sorted(vocab.items(), key=lambda item: item[1])]
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": unknown}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": template, "decoder": None, "model": model}


TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")


def find_tokenizer(choice, folder, notes=None):
    """(blob, id of <|endoftext|> or None). choice: bytes, none, a file, or a folder; None: the
    folder of the checkpoint. The blob of none is empty."""
    notes = [] if notes is None else notes
    if choice == "bytes":
        return bytes_tokenizer_blob(), None
    if choice == "none":
        return b"", None
    path = choice or folder
    if os.path.isdir(path):
        names = [name for name in TOKENIZER_FILES if os.path.exists(os.path.join(path, name))]
        if not names and not choice:
            raise ExportError(
                f"{folder} has no tokenizer.json; pass --tokenizer FILE (state-spaces models use "
                "the tokenizer.json of GPT-NeoX-20B), --tokenizer bytes for a byte model, or "
                "--tokenizer none for a model that reads and writes ids only")
        path = os.path.join(path, names[0] if names else TOKENIZER_FILES[0])
    source = b""
    if path.endswith(".txt"):
        table = vocab_txt_table(path, notes)
    else:
        table = read_json(path)
        with open(path, "rb") as f:
            source = f.read()
    blob = tokenizer_blob(table, notes, source)
    ends = [token["id"] for token in table.get("added_tokens") or []
            if token["content"] == "<|endoftext|>"]
    return blob, ends[0] if ends else None


def tokenizer_ids(blob):
    """How many ids a blob knows; 0 where there is no tokenizer."""
    return struct.unpack_from("<I", blob, 20)[0] if blob else 0


def tokenizer_json(blob):
    """The way back: a tokenizer.json (as a dict) that gives the same ids and the same text. A bytes
    blob becomes a vocabulary of the 256 byte symbols without merges; the library then takes UTF-8
    only, as it always does."""
    try:
        return unpack_tokenizer(blob)
    except (struct.error, IndexError, KeyError, ValueError) as error:
        refuse("blob", f"is damaged ({error})")


def step_json(recipe):
    """The pre_tokenizer of a recipe."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": "prefix_space" in recipe.flags,
                  "trim_offsets": True, "use_regex": False}
    split = {code: {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
                    "invert": False} for regex, code in reversed(list(REGEXES.items()))}
    made = {**split,
            NUMBERS: {"type": "Digits", "individual_digits": False},
            DIGITS: {"type": "Digits", "individual_digits": True},
            PUNCT: {"type": "Punctuation", "behavior": "Contiguous"},
            WORDS: {"type": "Whitespace"}, BLANKS: {"type": "WhitespaceSplit"}}
    steps, falcon = list(recipe.steps), FALCON in recipe.steps
    if falcon:
        steps.remove(FALCON)
    if recipe.kind == BPE_BYTES and steps and steps[-1] == GPT2:
        steps.pop()
        byte_level["use_regex"] = True
    if "word_spaces" in recipe.flags:
        scheme = "first" if "first_prefix" in recipe.flags else \
            "always" if "prefix_space" in recipe.flags else "never"
        out = [{"type": "Metaspace", "replacement": SPACE_SYMBOL, "prepend_scheme": scheme,
                "split": steps == [SPACES]}]
    else:
        out = [made[step] for step in steps]
    out += [byte_level] if recipe.kind == BPE_BYTES else []
    out += [{"type": name, **options} for name, options in FALCON_TAIL] if falcon else []
    return one_or_sequence(out, "pretokenizers")


def one_or_sequence(steps, key):
    return None if not steps else steps[0] if len(steps) == 1 else {"type": "Sequence", key: steps}


def decoder_json(recipe):
    if recipe.kind == BPE_BYTES:
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                "use_regex": True}
    if "decode_join" in recipe.flags:
        return None
    if "decode_strip_token" in recipe.flags:
        return {"type": "Metaspace", "replacement": SPACE_SYMBOL, "prepend_scheme": "always",
                "split": True}
    steps = [{"type": "Replace", "pattern": {"String": SPACE_SYMBOL}, "content": " "}]
    steps = steps if "decode_spaces" in recipe.flags else []
    steps += [{"type": "ByteFallback"}] if recipe.decodes_bytes else []
    steps += [{"type": "Fuse"}]
    if "decode_strip" in recipe.flags:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return one_or_sequence(steps, "decoders")


def unpack_header(blob):
    """(recipe, n_ids, n_merges, n_added, offset of the tokens)"""
    magic, version, kind, flags, cuts, n_ids, n_merges, n_added = struct.unpack_from("<4s7I", blob)
    if magic != b"mtok" or version not in (1, 2) or kind > WORD_LIST:
        refuse("blob", "is not a tokenizer of version 1 or 2")
    recipe, at = Recipe(), 32
    recipe.kind = kind
    recipe.flags = {name for bit, name in enumerate(BLOB_FLAGS) if flags >> bit & 1}
    if version == 1:
        recipe.steps = {0: [GPT2], 1: [GPT2], 2: [PUNCT, GPT2, FALCON]}[cuts]
    else:
        recipe.bos, recipe.unknown = struct.unpack_from("<2i", blob, 32)
        recipe.steps, at = [step for step in struct.pack("<I", cuts) if step], 64
    return recipe, n_ids, n_merges, n_added, at


def unpack_tokenizer(blob):
    recipe, n_ids, n_merges, n_added, at = unpack_header(blob)
    tokens, merges, added, outside, marks = {}, [], [], set(), set()
    if recipe.kind == 0:
        recipe.kind, tokens = BPE_BYTES, {b: SYMBOL_OF[b] for b in range(256)}
        n_ids = n_merges = n_added = 0
    for i in range(n_ids):
        length, = struct.unpack_from("<I", blob, at)
        at += 4
        if length == HOLE:
            continue
        raw, mark = blob[at:at + (length & ~(LITERAL | ONE_BYTE))], length & (LITERAL | ONE_BYTE)
        at += len(raw)
        marks.add(mark)
        if mark == ONE_BYTE:
            tokens[i] = "<0x%02X>" % raw[0]
        elif recipe.kind == BPE_BYTES and not mark:
            tokens[i] = "".join(SYMBOL_OF[b] for b in raw)
        else:
            spaces = "decode_spaces" in recipe.flags and not mark
            tokens[i] = raw.decode("utf-8").replace(" ", SPACE_SYMBOL if spaces else " ")
    recipe.decodes_bytes = ONE_BYTE in marks
    at += 256 * 4 if recipe.kind != WORD_LIST else 0
    for rank in range(n_merges):
        left, right, _ = struct.unpack_from("<3I", blob, at)
        at += 12
        merges.append([tokens[left], tokens[right]])
    for n in range(n_added):
        i, bits, length = struct.unpack_from("<3I", blob, at)
        content = blob[at + 12:at + 12 + length].decode("utf-8")
        at += 12 + length
        added.append({"id": i, "content": content,
                      **{name: bool(bits >> bit & 1) for bit, name in enumerate(ADDED_FLAGS)}})
        tokens[i] = content                                     # normalized ones are stored so
        if bits & ADDED_OUTSIDE:
            outside.add(i)
    return recipe_json(recipe, tokens, merges, added, outside)


def recipe_json(recipe, tokens, merges, added, outside):
    flags = recipe.flags
    normalizers = [{"type": "NFC"}] if "nfc" in flags else []
    if "normal_prefix" in flags:
        normalizers.append({"type": "Prepend", "prepend": SPACE_SYMBOL})
    if "normal_spaces" in flags:
        normalizers.append({"type": "Replace", "pattern": {"String": " "},
                            "content": SPACE_SYMBOL})
    bos, template = tokens.get(recipe.bos), None
    if bos is not None:
        one = {"SpecialToken": {"id": bos, "type_id": 0}}
        a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
        template = {"type": "TemplateProcessing", "single": [one, a], "pair": [one, a, b],
                    "special_tokens": {bos: {"id": bos, "ids": [recipe.bos], "tokens": [bos]}}}
    vocab = {token: i for i, token in tokens.items() if i not in outside}
    unknown = tokens.get(recipe.unknown)
    if recipe.kind == WORD_LIST:
        missing = "<unk>"                                       # the library wants a string here
        while unknown is None and missing in vocab:
            missing += ">"
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": unknown or missing}
    else:
        model = {"type": "BPE", "dropout": None, "unk_token": unknown,
                 "continuing_subword_prefix": None, "end_of_word_suffix": None,
                 "fuse_unk": "fuse_unknown" in flags, "byte_fallback": "byte_fallback" in flags,
                 "ignore_merges": "ignore_merges" in flags, "vocab": vocab, "merges": merges}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": one_or_sequence(normalizers, "normalizers"),
            "pre_tokenizer": step_json(recipe), "post_processor": template,
            "decoder": decoder_json(recipe), "model": model}


# --------------------------------------------------------------------------------------------------
# 9. model.bin in, transformers out
# The tensors' bytes are copied as they are, so float32 comes back bit for bit; q8 and q4 become the
# float32 values that they stand for. config.json is written last: a directory that lacks it was not
# finished.

def read_header(f, path):
    """(Model, dtype, tokenizer blob, tensors_offset), every field checked."""
    def refuse_if(condition, why):
        if condition:
            raise ExportError(f"{path}: {why}")

    size, head = os.fstat(f.fileno()).st_size, f.read(256)
    refuse_if(head[:8] != MAGIC, f"is no model.bin (its first 8 bytes are {head[:8]!r})")
    refuse_if(len(head) < 256 or zlib.crc32(head[:252]) != struct.unpack_from("<I", head, 252)[0],
              "the header's checksum is wrong; the file is damaged")
    (_, version, header_bytes, arch, dtype, flags, D, n_layer, V, E, N, K, R, norm_eps, mixer_eps,
     bos, pad, *eos, blob_offset, blob_bytes, offset, tensors_bytes, blob_crc,
     _) = HEADER.unpack_from(head)
    refuse_if(
        version != 1 or header_bytes != 256 or arch >= len(ARCHS) or dtype >= len(DTYPES)
        or flags >> len(FLAGS),
        f"version {version}, arch {arch}, dtype {dtype}, flags {flags} are not known to this "
        "export.py")
    refuse_if(
        not (min(D, E, N, K, R, V) > 0 and 0 < n_layer <= size // 64 and 0 <= norm_eps < 1
             and 0 <= mixer_eps < 1 and all(-1 <= i < V for i in [bos, pad, *eos])),
        "a field of its header is out of range")
    refuse_if(
        blob_offset != 256 or offset != align(256 + blob_bytes) or offset + tensors_bytes != size,
        f"its {size} bytes do not match its header; is the copy complete?")
    blob = read_exactly(f, blob_bytes, path)
    refuse_if(zlib.crc32(blob) != blob_crc or any(read_exactly(f, offset - 256 - blob_bytes, path)),
              "the tokenizer's checksum is wrong; the file is damaged")
    bits = {name: bool(flags >> bit & 1) for bit, name in enumerate(FLAGS)}
    shortest = lambda eps: float(str(np.float32(eps)))  # 1e-05, not 9.999999747378752e-06
    return Model(ARCHS[arch], D, n_layer, V, E, N, K, R, shortest(norm_eps), shortest(mixer_eps),
                 bos, pad, [i for i in eos if i != -1], **bits), DTYPES[dtype], blob, offset


def config_json(m, dtype):
    """(config.json, generation_config.json)"""
    name = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[dtype]
    one = lambda ids: ids if len(ids) > 1 else ids[0] if ids and ids[0] != -1 else None
    ids = {"bos_token_id": one([m.bos]), "eos_token_id": one(m.eos), "pad_token_id": one([m.pad])}
    config = {
        "architectures": ["MambaForCausalLM" if m.arch == "mamba" else "FalconMambaForCausalLM"],
        "model_type": m.arch, "hidden_size": m.D, "num_hidden_layers": m.n_layer, "vocab_size": m.V,
        "intermediate_size": m.E, "expand": max(1, m.E // m.D),
        "state_size": m.N, "conv_kernel": m.K,
        "time_step_rank": m.R, "layer_norm_epsilon": m.norm_eps, "hidden_act": "silu",
        "use_bias": m.proj_bias, "use_conv_bias": m.conv_bias, "tie_word_embeddings": m.tied,
        "residual_in_fp32": True, "use_cache": True, "dtype": name, "torch_dtype": name, **ids
    }  # the latter is what transformers 4 reads
    if m.mixer_norm:
        config["mixer_rms_eps"] = m.mixer_eps
    return config, ids


def tokenizer_files(m, blob):
    """tokenizer.json and what names its special tokens; nothing for bytes, which have none."""
    if not blob or struct.unpack_from("<I", blob, 8)[0] == 0:
        return {}
    source = tokenizer_source(blob)
    table = json.loads(source) if source else tokenizer_json(blob)
    added = {token["id"]: token["content"] for token in table.get("added_tokens") or []}
    special = {
        "bos_token": added.get(m.bos), "eos_token": added.get((m.eos or [-1])[0]),
        "pad_token": added.get(m.pad)
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              **{key: content for key, content in special.items() if content is not None}}
    return {"tokenizer.json": source.decode("utf-8") if source else json_text(table),
            "tokenizer_config.json": json_text(config)}


def stored_pieces(m, dtype, f, source, tensors_offset):
    """(Tensor, its type, first row, data) of the open model.bin, piece by piece; of q8 and q4 whole
    panels of 32 rows. The checksum is compared at the end."""
    size, crc = os.fstat(f.fileno()).st_size, 0
    f.seek(tensors_offset)
    for want in tensor_list(m):
        kind, row = dtype.upper() if want.is_w else "F32", 0
        gap = read_exactly(f, align(f.tell()) - f.tell(), source)
        n, crc, step = stored_bytes(want.shape, kind), zlib.crc32(gap, crc), 4
        if kind in CODE_BITS:
            step = -(-want.shape[-1] // TILE) * tile_bytes(kind)
        while n:
            data = read_exactly(f, min(n, max(1, 4 * CHUNK // step) * step), source)
            crc, n = zlib.crc32(data, crc), n - len(data)
            yield want, kind, row, data
            row += len(data) // step * TILE if kind in CODE_BITS else 0
            progress(f.tell() - tensors_offset, size - tensors_offset, want.name)
    if f.tell() != size:
        raise ExportError(f"{source}: the sizes in its header do not match its length")
    f.seek(124)
    if crc != struct.unpack("<I", f.read(4))[0]:
        raise ExportError(f"{source}: the tensors' checksum is wrong; the file is damaged")
    progress(0, 0, "")


def write_safetensors(path, m, dtype, f, source, tensors_offset):
    """Copies the tensors out of the open model.bin."""
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for want in tensor_list(m):
        kind = dtype.upper() if want.is_w else "F32"
        kind = "F32" if kind in CODE_BITS else kind
        end = start + stored_bytes(want.shape, kind)
        header[with_backbone(want.source)] = {"dtype": kind, "shape": want.shape,
                                              "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for want, kind, row, data in stored_pieces(m, dtype, f, source, tensors_offset):
            if kind in CODE_BITS:
                values = code_values(*tile_codes(data, kind, want.shape[-1]))
                data = values[:want.shape[0] - row].astype("<f4").tobytes()
            out.write(data)


HF_FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
            "tokenizer_config.json", "chat_template.jinja")


def to_transformers(source, folder, force):
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ExportError(f"{folder} exists and is no directory")
    new = not os.path.isdir(folder)
    if not new and os.listdir(folder) and not force:
        raise ExportError(
            f"{folder} is not empty; choose another, or add --force to replace the files in it")
    for name in () if new else HF_FILES:
        check_output(os.path.join(folder, name), [source])
    with open(source, "rb") as f:
        m, dtype, blob, tensors_offset = read_header(f, source)
        if m.layer_norm:
            raise ExportError(f"{source}: transformers has no Mamba with LayerNorm")
        texts = tokenizer_files(m, blob)
        if stored_template(blob) is not None:
            texts["chat_template.jinja"] = stored_template(blob)
        config, generation = config_json(m, "f32" if dtype.upper() in CODE_BITS else dtype)
        texts.update(
            {"generation_config.json": json_text(generation), "config.json": json_text(config)})
        if new:
            os.mkdir(folder)
        try:
            write_safetensors(os.path.join(folder, "model.safetensors"), m, dtype, f, source,
                              tensors_offset)
        except BaseException:
            if new:
                os.rmdir(folder)
            raise
    for name, text in texts.items():
        with atomic_file(os.path.join(folder, name)) as out:
            out.write(text.encode("utf-8"))
    print(f"wrote {folder}: {summary(m, dtype)}", file=sys.stderr)
    if "tokenizer.json" not in texts:                 # transformers has no file for bytes
        kind = "bytes" if blob else "none"
        print_notes([f"a folder says nothing of a tokenizer that is {kind}; the way back is "
                     f"export.py {folder} model.bin --tokenizer {kind}"])


# --------------------------------------------------------------------------------------------------
# 10. Adapters
# A LoRA directory of peft holds two thin matrices for some of the weights: W becomes W + s B A,
# where s is alpha / r, or alpha / sqrt(r) with use_rslora. Other keys of adapter_config.json are
# fine when they are off, and refused by name when they are not.

ADAPTER_KEYS = set("""
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r
    target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora
    modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern
    megatron_core megatron_config qalora_group_size eva_config runtime_config ensure_weight_tying
    """.split())
LORA_PART = re.compile(r"(.*)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?$")


class Merged:
    """A stored tensor plus scale times left times right, which has its shape."""

    def __init__(self, base, left, right, scale):
        self.path, self.name, self.kind, self.shape = base.path, base.name, base.kind, base.shape
        self.base, self.left, self.right, self.scale = base, left, right, scale

    def chunks(self):
        row, first = self.shape[-1], 0
        for x in regrouped(self.base.chunks(), row):
            x = x.reshape(-1, row)
            delta = self.left[first:first + len(x)] @ self.right
            first += len(x)
            yield (x + delta * self.scale).astype("<f4").reshape(-1)


def whole_tensor(tensor):
    """As float64, checked for NaN: a thin matrix of an adapter."""
    parts = list(tensor.chunks())
    x = np.concatenate(parts) if parts else np.zeros(0, "f4")
    check_values(x, "F32", tensor.name, 0)
    return x.reshape(tensor.shape).astype("f8")


class Adapter:
    def __init__(self, folder):
        path = os.path.join(folder, "adapter_config.json")
        if not os.path.isdir(folder):
            raise ExportError(f"{folder} is no directory; --adapter takes the one that peft saved")
        self.folder, self.config = folder, Fields(read_json(path), path)
        self.check_config()
        for name, reader in (("adapter_model.safetensors", open_safetensors),
                             ("adapter_model.bin", open_pickle)):
            if os.path.exists(os.path.join(folder, name)):
                self.stored = reader(os.path.join(folder, name))
                break
        else:
            raise ExportError(f"{folder} has no adapter_model.safetensors or adapter_model.bin")
        self.paths = {path} | {tensor.path for tensor in self.stored.values()}

    def check_config(self):
        config, table = self.config, self.config.table
        kind = table.get("peft_type")
        config.refuse_if(kind != "LORA",
                         f"peft_type {json.dumps(kind)[:60]} is not supported, only LORA")
        config.refuse_if(table.get("use_dora"), "DoRA adapters (use_dora) are not supported")
        init = json.dumps(table.get("init_lora_weights", True))
        config.refuse_if(init not in ("true", "false", '"gaussian"', '"orthogonal"', '"eva"'),
                         f"init_lora_weights {init[:60]} is not supported, because it changes the "
                         "base model too")
        for key, value in table.items():
            config.refuse_if(key not in ADAPTER_KEYS and value not in (None, False, 0, "", [], {}),
                             f"{key} is {json.dumps(value)[:60]}, which is not supported")
        self.r = self.rank("r", table.get("r", 8))
        self.alpha = self.number("lora_alpha", table.get("lora_alpha", 8))
        self.rslora = config.flag("use_rslora", False)
        self.ranks = self.patterns("rank_pattern", self.rank)
        self.alphas = self.patterns("alpha_pattern", self.number)

    def rank(self, key, value):
        self.config.refuse_if(type(value) is not int or not 0 < value <= 1 << 20,
                              f"{key} is {json.dumps(value)[:60]}, expected a whole number above 0")
        return value

    def number(self, key, value):
        good = type(value) in (int, float) and abs(value) < 1e9
        self.config.refuse_if(not good, f"{key} is {json.dumps(value)[:60]}, expected a number")
        return value

    def patterns(self, key, check):
        """[(compiled pattern, value)]; peft matches the end of a module's name."""
        table = self.config.table.get(key) or {}
        self.config.refuse_if(not isinstance(table, dict), f"{key} should be an object")
        result = []
        for pattern, value in table.items():
            text = pattern if pattern.startswith("^") else rf"(.*\.)?({pattern})$"
            try:
                result.append((re.compile(text), check(f"{key} of {pattern[:60]!r}", value)))
            except (re.error, RecursionError, OverflowError):
                raise ExportError(f"{self.config.path}: {key}: {pattern[:60]!r} is no valid "
                                  "regular expression")
        return result

    def scale(self, module):
        """(the rank that the config gives this module, its factor)"""
        first = lambda patterns, default: next((v for p, v in patterns if p.match(module)), default)
        r, alpha = first(self.ranks, self.r), first(self.alphas, self.alpha)
        return r, alpha / math.sqrt(r) if self.rslora else alpha / r

    def parts(self):
        """({canonical weight: (module, {"A", "B"}, embedding?)}, {canonical name: whole tensor},
        names of classifier heads)"""
        thin, whole, left_out = {}, {}, []
        for name, tensor in self.stored.items():
            match = LORA_PART.match(name)
            module = re.sub(r"^base_model\.model\.", "", match[1] if match else name)
            short = canonical(module + ".weight" if match else
                              re.sub(r"\.(modules_to_save|original_module)(\.default)?\.", ".",
                                     module.replace(".base_layer.", ".")))
            if short.split(".")[0] in HEADS:
                left_out.append(name)
            elif ".original_module." in name:
                continue  # the base model's own
            elif match:
                entry = thin.setdefault(short, (module, {}, bool(match[2])))
                if match[3] in entry[1]:
                    raise ExportError(f"{tensor.path}: tensor {name} is there twice")
                entry[1][match[3]] = tensor
            elif short in whole:
                raise ExportError(f"{tensor.path}: tensor {name} is there twice")
            else:
                whole[short] = tensor
        if not thin and not whole:
            raise ExportError(f"{self.folder} holds no LoRA matrices (lora_A, lora_B)")
        return thin, whole, left_out

    def merged(self, base, module, matrices, embedding):
        """The stored tensor base with the two matrices added."""
        if set(matrices) != {"A", "B"}:
            name = next(iter(matrices.values())).name
            raise ExportError(f"{self.folder}: tensor {name} has no twin, lora_A and lora_B")
        A, B = matrices["A"], matrices["B"]
        rows, columns = reversed(base.shape) if embedding else base.shape  # embedding: (B A)^T
        r, scale = self.scale(module)
        for tensor, shape in ((A, (r, columns)), (B, (rows, r))):
            if tensor.shape != shape:
                raise ExportError(f"{tensor.path}: tensor {tensor.name} has shape "
                                  f"{shape_text(tensor.shape)}, expected {shape_text(shape)}")
        A, B = whole_tensor(A), whole_tensor(B)
        return Merged(base, A.T, B.T, scale) if embedding else Merged(base, B, A, scale)

    def apply(self, m, by_name, config):
        """(m, tensors by canonical name) of the model that results."""
        by_name, (thin, whole, left_out) = dict(by_name), self.parts()
        if left_out:
            config.note(f"left out, because mamba.c predicts tokens: {', '.join(sorted(left_out))}")
        own, head = "embeddings.weight", "lm_head.weight"
        touched = (set(thin) | set(whole)) & {own, head}
        if m.tied and touched:  # peft trains one of the two, so that they differ from now on
            shared = by_name.get(own) or by_name.get(head)
            by_name.update({own: by_name.get(own, shared), head: by_name.get(head, shared)})
            config.note(f"the adapter changes {' and '.join(sorted(touched))} alone, so that head "
                        "and embedding are no longer tied")
            m = m._replace(tied=False)
        for name, tensor in whole.items():
            if name not in by_name:
                raise ExportError(f"{tensor.path}: tensor {tensor.name} belongs to no tensor of "
                                  "the model")
            by_name[name] = tensor
        for name, (module, matrices, embedding) in thin.items():
            base, tensor = by_name.get(name), next(iter(matrices.values()))
            if name.endswith(".conv1d.weight"):
                raise ExportError(f"{tensor.path}: tensor {tensor.name} mixes channels before "
                                  "the convolution, where each is by itself: it cannot be "
                                  "merged (peft refuses, too)")
            if base is None or len(base.shape) != 2:
                raise ExportError(f"{tensor.path}: tensor {tensor.name} belongs to no matrix of "
                                  "the model")
            by_name[name] = self.merged(base, module, matrices, embedding)
        return m, by_name


# --------------------------------------------------------------------------------------------------
# 11. GGUF
# The files of llama.cpp, whose architecture "mamba" is this one: header, metadata, a list of
# tensors, their data. Shapes stand in reverse. ssm_a is -exp(A_log). FalconMamba is a flag,
# ssm.dt_b_c_rms, and shares the one eps: there is no second one. F32, F16, BF16, Q8_0 and Q4_0 are
# read here, other types by the gguf package.

GGUF_VALUES = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))  # as struct has them
GGUF_STRING, GGUF_ARRAY, GGUF_ALIGNMENT = 8, 9, 32
GGUF_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),  # number: name, elements
              8: ("Q8_0", 32, 34), 2: ("Q4_0", 32, 18)}                # and bytes of a block
GGUF_NAMES = {"token_embd.weight": "embeddings.weight", "output_norm.weight": "norm_f.weight",
              "output.weight": "lm_head.weight"}
GGUF_LAYER = {"attn_norm.weight": "norm.weight", "ssm_a": "mixer.A_log", "ssm_d": "mixer.D",
              **{f"ssm_{short}.{part}": f"mixer.{name}.{part}" for part in ("weight", "bias")
                 for short, name in (("in", "in_proj"), ("conv1d", "conv1d"), ("x", "x_proj"),
                                     ("dt", "dt_proj"), ("out", "out_proj"))}}
GGUF_SIZES = {"embedding_length": "hidden_size", "block_count": "num_hidden_layers",
              "ssm.inner_size": "intermediate_size", "ssm.state_size": "state_size",
              "ssm.conv_kernel": "conv_kernel", "ssm.time_step_rank": "time_step_rank",
              "vocab_size": "vocab_size"}
GGUF_EPS = "attention.layer_norm_rms_epsilon"
GGUF_IDLE = {"context_length", "feed_forward_length", "attention.head_count", "ssm.dt_b_c_rms",
             "attention.head_count_kv", GGUF_EPS, *GGUF_SIZES}  # that llama.cpp reads or ignores
# How llama.cpp names a way to split text: (its step here, whether ignore_merges and bos are on)
GGUF_SPLITS = {**dict.fromkeys(("gpt-2", "", "default", "mpt", "olmo", "jais", "phi-2"),
                               (GPT2, False)),
               **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1",
                                "pixtral", "midm-2.0", "lfm2"), (GPT4, True)),
               **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"),
                               (QWEN2, False)),
               "falcon": (FALCON, False)}
NORMAL, UNKNOWN_TOKEN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens


class GgufTensor:
    def __init__(self, path, name, number, shape, start):
        self.path, self.name, self.shape, self.start = path, name, shape, start
        self.type, self.block, self.block_bytes = gguf_type(path, name, number)
        self.kind, self.number = "F32", number
        if self.type in ITEM_BYTES:
            self.kind = self.type
            self.raw_chunks = SafeTensor(path, name, self.kind, shape, start).raw_chunks

    def bytes(self):
        return math.prod(self.shape) // self.block * self.block_bytes

    def chunks(self):
        left = math.prod(self.shape)
        with open(self.path, "rb") as f:
            f.seek(self.start)
            while left:
                n = min(left, CHUNK // self.block * self.block or self.block)
                raw = read_exactly(f, n // self.block * self.block_bytes, self.path)
                left -= n
                yield self.decode(raw)

    def decode(self, raw):
        if self.type in ITEM_BYTES:
            return decode(raw, self.type)
        if self.type not in ("Q8_0", "Q4_0"):
            import gguf
            kind = gguf.GGMLQuantizationType(self.number)
            with np.errstate(all="ignore"):
                return gguf.quants.dequantize(np.frombuffer(raw, "u1"), kind).astype("<f4")
        blocks = np.frombuffer(raw, "u1").reshape(-1, self.block_bytes)
        scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype("f4")
        codes = blocks[:, 2:].view("i1")
        if self.type == "Q4_0":
            codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
            codes = codes.astype("i1") - 8
        with np.errstate(invalid="ignore"):
            return (codes * scale).reshape(-1)


def gguf_type(path, name, number):
    """(name, elements of a block, bytes of a block)"""
    if number in GGUF_TYPES:
        return GGUF_TYPES[number]
    try:
        import gguf
    except ImportError:
        raise ExportError(f"{path}: tensor {name} has type {number}, which needs the gguf package "
                          "(pip install gguf)")
    try:
        kind = gguf.GGMLQuantizationType(number)
        known = kind in gguf.quants._type_traits
    except (ValueError, AttributeError):
        kind = known = None
    if not known:
        label = kind.name if kind else f"number {number}"
        raise ExportError(f"{path}: tensor {name} has type {label}, which cannot be read")
    return (kind.name, *gguf.GGML_QUANT_SIZES[kind])


class Changed:
    """A stored tensor in another shape, and its values through a function."""

    def __init__(self, base, shape, change=None):
        self.path, self.name, self.kind, self.shape = base.path, base.name, base.kind, shape
        self.base, self.change = base, change

    def chunks(self):
        done = 0
        for x in self.base.chunks():
            yield self.change(x, self.name, done) if self.change else x
            done += len(x)


def a_to_log(x, name, first):
    check_values(x, "F32", name, first)
    if (x >= 0).any():
        i = int((x >= 0).argmax())
        raise ExportError(f"tensor {name} holds {x[i]:g} at element {first + i}; -exp(A_log) is "
                          "below zero")
    return np.log(-x.astype("f8")).astype("f4")


class GgufReader:
    """Reads numbers and strings, and never past the end of the file."""

    def __init__(self, f, path):
        self.f, self.path, self.size = f, path, os.fstat(f.fileno()).st_size

    def take(self, n):
        if n > self.size - self.f.tell():
            raise ExportError(f"{self.path} ends within its metadata; is the download complete?")
        return self.f.read(n)

    def number(self, letter):
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def text(self):
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ExportError(f"{self.path}: a string of its metadata is not UTF-8 ({raw[:40]!r})")

    def value(self, kind, key):
        if kind == GGUF_STRING:
            return self.text()
        if kind in GGUF_VALUES:
            return self.number(GGUF_VALUES[kind])
        if kind != GGUF_ARRAY:
            raise ExportError(f"{self.path}: {key[:60]} has type {kind}, which is not known")
        kind, n = self.number("I"), self.number("Q")
        if kind in GGUF_VALUES:
            item = struct.calcsize("<" + GGUF_VALUES[kind])
            raw = self.take(n * item)
            return list(struct.unpack(f"<{n}{GGUF_VALUES[kind]}", raw))
        if kind != GGUF_STRING or n > (self.size - self.f.tell()) // 8:
            raise ExportError(f"{self.path}: {key[:60]} is an array that cannot be read")
        return [self.text() for _ in range(n)]


def open_gguf(path):
    """(metadata, {name: GgufTensor})"""
    with open(path, "rb") as f:
        r = GgufReader(f, path)
        if r.take(min(4, r.size)) != b"GGUF":
            raise ExportError(f"{path} is no GGUF file")
        version = r.number("I")
        if version not in (2, 3):
            raise ExportError(f"{path} is GGUF version {version}; 2 and 3 can be read, "
                              "little-endian")
        n_tensors, n_values = r.number("Q"), r.number("Q")
        if max(n_tensors, n_values) > r.size // 12:
            raise ExportError(f"{path} has {n_tensors} tensors and {n_values} values: that is more "
                              "than its bytes can hold")
        meta = {}
        for _ in range(n_values):
            key = r.text()
            if key in meta:
                raise ExportError(f"{path}: {key[:60]} appears twice")
            meta[key] = r.value(r.number("I"), key)
        infos = [gguf_entry(r) for _ in range(n_tensors)]
        align = meta.get("general.alignment", GGUF_ALIGNMENT)
        if type(align) is not int or not 0 < align <= 1 << 20 or align & (align - 1):
            raise ExportError(f"{path}: general.alignment is {str(align)[:60]}, no power of two")
        data = -(-f.tell() // align) * align
    stored, ends = {}, []
    for name, shape, number, offset in infos:
        tensor = GgufTensor(path, name, number, shape, data + offset)
        if name in stored:
            raise ExportError(f"{path}: tensor {name} appears twice")
        if not shape or shape[-1] % tensor.block:
            raise ExportError(f"{path}: tensor {name} {shape_text(shape)} does not fill blocks of "
                              f"{tensor.block} ({tensor.type})")
        if offset % align or tensor.start + tensor.bytes() > r.size:
            raise ExportError(f"{path}: tensor {name} ends past the end of the file, or begins at "
                              "no multiple of its alignment; is the download complete?")
        stored[name] = tensor
        ends.append((tensor.start, tensor.start + tensor.bytes(), name))
    ends.sort()
    for (_, end, first), (start, _, second) in zip(ends, ends[1:]):
        if start < end:
            raise ExportError(f"{path}: tensor {second} overlaps {first}")
    return meta, stored


def gguf_entry(r):
    name, n_dims = r.text(), r.number("I")
    if n_dims > 8:
        raise ExportError(f"{r.path}: tensor {name[:60]} has {n_dims} dimensions")
    shape = tuple(r.number("Q") for _ in range(n_dims))[::-1]
    if any(n == 0 or n >= 1 << 40 for n in shape):
        raise ExportError(f"{r.path}: tensor {name[:60]} has shape {shape_text(shape)[:80]}")
    return name, shape, r.number("I"), r.number("Q")


def gguf_canonical(name):
    match = re.fullmatch(r"blk\.(\d{1,9})\.(.+)", name)
    if match and match[2] in GGUF_LAYER:
        return f"layers.{int(match[1])}.{GGUF_LAYER[match[2]]}"
    return GGUF_NAMES.get(name, name)


def gguf_checkpoint(path):
    """(config, generation, tensors by canonical name, metadata)"""
    meta, stored = open_gguf(path)
    arch = meta.get("general.architecture")
    if arch != "mamba":
        why = ELSEWHERE.get(str(arch).replace("-", "_"), "only mamba is")
        raise ExportError(f"{path}: architecture {json.dumps(arch)[:60]} is not supported: {why}")
    parts = meta.get("split.count", 0)
    if type(parts) is int and parts > 1:
        raise ExportError(f"{path} is one of {parts} parts; join them with llama.cpp's "
                          "llama-gguf-split --merge")
    own = {key[6:]: value for key, value in meta.items() if key.startswith("mamba.")}
    if GGUF_EPS not in own:
        raise ExportError(f"{path}: mamba.{GGUF_EPS} is missing")
    falcon = own.get("ssm.dt_b_c_rms", False)
    if type(falcon) is not bool:
        raise ExportError(f"{path}: mamba.ssm.dt_b_c_rms is {str(falcon)[:60]}, expected a truth "
                          "value")
    eps = own[GGUF_EPS]
    eps = float(str(np.float32(eps))) if type(eps) is float else eps  # 1e-05, not 9.99999...e-06
    table = {"model_type": "falcon_mamba" if falcon else "mamba", "layer_norm_epsilon": eps,
             "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
             "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
             "eos_token_id": [meta[key] for key in ("tokenizer.ggml.eos_token_id",
                                                    "tokenizer.ggml.eot_token_id") if key in meta]}
    table.update({key: own[name] for name, key in GGUF_SIZES.items() if name in own})
    if falcon:
        table["mixer_rms_eps"] = eps
    by_name = {}
    for name, tensor in stored.items():
        short = gguf_canonical(name)
        if short.endswith(".conv1d.weight") and len(tensor.shape) == 2:
            tensor = Changed(tensor, (tensor.shape[0], 1, tensor.shape[1]))
        elif short.endswith(".A_log"):
            tensor = Changed(tensor, tensor.shape, a_to_log)
        if short in by_name:
            raise ExportError(f"{path}: tensors {by_name[short].name} and {name} mean the same one")
        by_name[short] = tensor
    found = found_sizes(by_name)
    if "lm_head.weight" in by_name:
        found["tied"] = lambda: False
        table["tie_word_embeddings"] = False
    config = Config(table, path, found)
    if falcon:
        config.note(f"GGUF has one eps, {eps:g}; llama.cpp uses it for the norms on Δ, B and C "
                    "too")
    unknown = sorted(set(own) - GGUF_IDLE)
    if unknown:
        config.note(f"not used, because unknown here: mamba.{', mamba.'.join(unknown)[:300]}")
    return config, Fields({}, path), by_name, meta


def gguf_tokenizer(meta, path):
    """tokenizer.json of the tokenizer in the metadata."""
    get = lambda key, kind: meta.get("tokenizer.ggml." + key, kind())
    model, tokens, types, merges = (get("model", str), get("tokens", list), get("token_type", list),
                                    get("merges", list))
    if model not in ("gpt2", "llama"):
        raise ExportError(f"{path}: its tokenizer is {json.dumps(model)[:60]}, only gpt2 "
                          "(byte-level BPE) and llama (SentencePiece BPE) can be taken over; pass "
                          "--tokenizer FILE, or --tokenizer bytes")
    split = get("pre", str) if model == "gpt2" else "gpt-2"
    if not isinstance(split, str) or split not in GGUF_SPLITS:
        raise ExportError(f"{path}: its tokenizer splits text as {json.dumps(split)[:60]} does, "
                          "which is not supported; pass --tokenizer FILE")
    if not (isinstance(tokens, list) and isinstance(types, list) and isinstance(merges, list)
            and all(isinstance(token, str) for token in tokens) and tokens
            and len(types) in (0, len(tokens))):
        raise ExportError(f"{path}: its tokenizer's lists of tokens and types do not fit together")
    types = types or [NORMAL] * len(tokens)
    vocab, added = {}, []
    for i, (token, kind) in enumerate(zip(tokens, types)):
        if kind == UNUSED:
            continue
        if token in vocab:
            raise ExportError(f"{path}: token {json.dumps(token)[:60]} has two ids, "
                              f"{vocab[token]} and {i}")
        vocab[token] = i
        if kind in (CONTROL, USER_DEFINED) or kind == UNKNOWN_TOKEN and model == "llama":
            flags = {name: name == "special" and kind != USER_DEFINED for name in ADDED_FLAGS}
            added.append({"id": i, "content": token, **flags})
    if model == "llama":
        return sentencepiece_table(meta, path, vocab, types, added)
    inside = len(vocab) - len(added)  # added tokens behind a vocabulary without holes are no part
    if [token["id"] for token in added] == list(range(inside, len(vocab))):
        vocab = {token: i for token, i in vocab.items() if i < inside}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    pre_tokenizer, (step, llama) = byte_level, GGUF_SPLITS[split]
    if step in (GPT4, QWEN2):
        regex = next(regex for regex, code in REGEXES.items() if code == step)
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {**byte_level, "use_regex": False}]}
    if step == FALCON:
        steps = [{"type": name, **options} for name, options in FALCON_SEQUENCE]
        steps[1]["trim_offsets"] = True
        pre_tokenizer = {"type": "Sequence", "pretokenizers": steps}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None, "pre_tokenizer": pre_tokenizer,
            "post_processor": gguf_post_processor(meta, tokens, llama), "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": llama,
                      "vocab": vocab, "merges": merges}}


def sentencepiece_table(meta, path, vocab, types, added):
    """tokenizer.json of a SentencePiece BPE, whose merges are hidden in the scores: two symbols are
    merged to the token of the highest score."""
    scores = meta.get("tokenizer.ggml.scores")
    unknown = meta.get("tokenizer.ggml.unknown_token_id", 0)
    prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
    merged = [(token, i) for token, i in vocab.items() if types[i] == NORMAL and len(token) > 1]
    if not (isinstance(scores, list) and len(scores) == len(types) and type(unknown) is int
            and type(prefix) is bool and all(type(score) is float for score in scores)):
        raise ExportError(f"{path}: its tokenizer's scores do not fit its tokens")
    if meta.get("tokenizer.ggml.remove_extra_whitespaces"):
        raise ExportError(f"{path}: its tokenizer removes spaces; pass --tokenizer FILE")
    if len({scores[i] for _, i in merged}) != len(merged):
        raise ExportError(f"{path}: two tokens of its tokenizer have one score, so that their "
                          "order is not known; pass --tokenizer FILE")
    merged.sort(key=lambda entry: -scores[entry[1]])
    merges = [[token[:k], token[k:]] for token, _ in merged for k in range(1, len(token))
              if token[:k] in vocab and token[k:] in vocab]
    replace = lambda old, new: {"type": "Replace", "pattern": {"String": old}, "content": new}
    prepend = [{"type": "Prepend", "prepend": SPACE_SYMBOL}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    token_of = {i: token for token, i in vocab.items()}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "Sequence",
                           "normalizers": prepend + [replace(" ", SPACE_SYMBOL)]},
            "pre_tokenizer": None,
            "post_processor": gguf_post_processor(meta, meta["tokenizer.ggml.tokens"], True),
            "decoder": {"type": "Sequence", "decoders": [
                replace(SPACE_SYMBOL, " "), {"type": "ByteFallback"}, {"type": "Fuse"}] + strip},
            "model": {"type": "BPE", "dropout": None, "unk_token": token_of.get(unknown),
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": True, "byte_fallback": BYTE in types, "ignore_merges": False,
                      "vocab": vocab, "merges": merges}}


def gguf_post_processor(meta, tokens, adds_bos):
    bos = meta.get("tokenizer.ggml.bos_token_id")
    adds_bos = meta.get("tokenizer.ggml.add_bos_token", adds_bos)
    if not adds_bos or type(bos) is not int or bos >= len(tokens):
        return None
    text, special = tokens[bos], {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
    sequence = lambda name, kind: {"Sequence": {"id": name, "type_id": kind}}
    return {"type": "TemplateProcessing", "single": [special, sequence("A", 0)],
            "pair": [special, sequence("A", 0), special, sequence("B", 1)],
            "special_tokens": {text: {"id": text, "ids": [bos], "tokens": [text]}}}


def gguf_to_bin(source, target, dtype, tokenizer, adapter):
    check_output(target, [source] + tokenizer_inputs(tokenizer))
    config, generation, stored, meta = gguf_checkpoint(source)
    m = model_from_config(config, generation)
    if tokenizer:
        blob, _ = find_tokenizer(tokenizer, os.path.dirname(source))
    else:
        if meta.get("tokenizer.ggml.model") == "gpt2" and \
                meta.get("tokenizer.ggml.pre", "default") == "default":
            config.note("the file does not say how its tokenizer splits text; as GPT-2 does, "
                        "is assumed")
        blob = tokenizer_blob(gguf_tokenizer(meta, source))
    finish(target, m, config, stored, blob, adapter, dtype, source, "its metadata")


def gguf_value(value):
    """The type number and the bytes of a value."""
    text = lambda s: struct.pack("<Q", len(s.encode("utf-8"))) + s.encode("utf-8")
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", GGUF_STRING) + text(value)
    strings = not value or isinstance(value[0], str)
    items = b"".join(text(v) if strings else struct.pack("<i", v) for v in value)
    return struct.pack("<IIQ", GGUF_ARRAY, GGUF_STRING if strings else 5, len(value)) + items


def gguf_metadata(m, blob, dtype, source):
    """(the metadata, notes)"""
    if not blob:
        raise ExportError(f"{source}: it has no tokenizer, which a GGUF file needs")
    recipe, notes = unpack_header(blob)[0], []
    way = recipe.steps[-1:] if recipe.steps == [PUNCT, GPT2, FALCON] else recipe.steps
    way = tuple(way) + ("ignore_merges" in recipe.flags,)
    splits = [name for name, other in GGUF_SPLITS.items() if other == way]  # the usual name first
    if recipe.kind > BPE_BYTES or not splits or recipe.unknown != -1 or \
            recipe.flags - {"nfc", "prefix_space", "ignore_merges"}:
        raise ExportError(f"{source}: its tokenizer is of a kind that has no place in a GGUF file")
    table = tokenizer_json(blob)
    model, split = table["model"], table["pre_tokenizer"]
    if table["normalizer"]:
        notes.append("llama.cpp does not bring text to NFC, as this tokenizer does")
    if split.get("add_prefix_space"):
        notes.append("llama.cpp does not put a space in front of a text, as this tokenizer does")
    tokens, types = [f"[PAD{i}]" for i in range(m.V)], [UNUSED] * m.V
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for token in table["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    sizes = {"embedding_length": m.D, "block_count": m.n_layer, "ssm.inner_size": m.E,
             "ssm.state_size": m.N, "ssm.conv_kernel": m.K, "ssm.time_step_rank": m.R,
             "vocab_size": m.V, "context_length": 1 << 20, "feed_forward_length": 0,
             "attention.head_count": 0, GGUF_EPS: m.norm_eps, "ssm.dt_b_c_rms": m.mixer_norm}
    bos = m.bos if recipe.bos == -1 else recipe.bos
    ids = {"bos": bos, "eos": (m.eos or [-1])[0], "padding": m.pad, "eot": (m.eos + [-1] * 2)[1]}
    file_type = {"f32": 0, "f16": 1, "bf16": 32, "q8": 7, "q4": 2}[dtype]
    return {"general.architecture": "mamba", "general.file_type": file_type,
            **{"mamba." + key: value for key, value in sizes.items()},
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": splits[0],
            "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
            **({"tokenizer.ggml.add_bos_token": recipe.bos != -1}
               if recipe.bos != -1 or GGUF_SPLITS[splits[0]][1] else {}),
            **{f"tokenizer.ggml.{key}_token_id": i for key, i in ids.items() if i >= 0}}, notes


def gguf_tensors(m, dtype):
    """(name, shape, number of its type) of each tensor, in the order of the file."""
    names = {short: name for name, short in GGUF_NAMES.items()}
    layer_names = {short: name for name, short in GGUF_LAYER.items()}
    number = {kind: n for n, (kind, _, _) in GGUF_TYPES.items()}
    for want in tensor_list(m):
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", want.source)
        name = f"blk.{match[1]}.{layer_names[match[2]]}" if match else names[want.source]
        kind = dtype.upper() if want.is_w else "F32"
        shape = (m.E, m.K) if name.endswith("conv1d.weight") else want.shape
        out = {"Q8": "Q8_0", "Q4": "Q4_0"}.get(kind, kind)
        if kind in CODE_BITS and shape[-1] % TILE:
            out = "F32"
        yield name, shape, number[out]
        if name.endswith("conv1d.weight") and not m.conv_bias:  # llama.cpp has it always
            yield name.replace("weight", "bias"), (m.E,), 0


def gguf_blocks(codes, scale, kind):
    """Codes (rows, inputs) and scales (rows, inputs / 32) as Q8_0 or Q4_0."""
    codes = codes.reshape(*scale.shape, TILE)
    half = scale.astype("<f2")
    if np.isinf(half).any():
        raise ExportError("a scale of the matrices is too large for a GGUF file (float16)")
    if kind == "Q4":
        low = (codes + 8).astype("u1")
        codes = low[..., :TILE // 2] | low[..., TILE // 2:] << 4
    codes = codes.astype("i1" if kind == "Q8" else "u1").view("u1")
    return np.concatenate([half[..., None].view("u1"), codes], axis=-1).tobytes()


def to_gguf(source, target):
    check_output(target, [source])
    with open(source, "rb") as f:
        m, dtype, blob, tensors_offset = read_header(f, source)
        why = ("LayerNorm" if m.layer_norm else "biases on in_proj and out_proj" if m.proj_bias else
               f"an inner size of {m.E}, which is not twice {m.D}" if m.E != 2 * m.D else None)
        if why:
            raise ExportError(f"{source}: llama.cpp has no mamba with {why}")
        meta, notes = gguf_metadata(m, blob, dtype, source)
        if m.mixer_norm and m.mixer_eps != m.norm_eps:
            notes.append(f"llama.cpp has one eps, {m.norm_eps:g}; that of the norms on Δ, B and C "
                         f"is {m.mixer_eps:g} here")
        infos, offset, text = [], 0, lambda s: struct.pack("<Q", len(s)) + s.encode()
        for name, shape, number in gguf_tensors(m, dtype):
            infos.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1],
                                                  number, offset))
            _, block, size = GGUF_TYPES[number]
            offset += math.prod(shape) // block * size
            offset += -offset % GGUF_ALIGNMENT
        values = [struct.pack("<Q", len(key)) + key.encode() + gguf_value(value)
                  for key, value in meta.items()]
        head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(values))
        head += b"".join(values) + b"".join(infos)
        with atomic_file(target) as out:
            out.write(head + bytes(-len(head) % GGUF_ALIGNMENT))
            for data in gguf_data(m, dtype, f, source, tensors_offset):
                out.write(data)
    print(f"wrote {target}: {summary(m, dtype)}, {(len(head) + offset) / 1e6:.1f} MB",
          file=sys.stderr)
    print_notes([f"{source}: {note}" for note in notes])


def gguf_data(m, dtype, f, source, tensors_offset):
    """The data of the tensors, read from the open model.bin, each with its padding."""
    pieces = stored_pieces(m, dtype, f, source, tensors_offset)
    for name, group in itertools.groupby(pieces, key=lambda piece: piece[0].name):
        written = 0
        for want, kind, first_row, data in group:
            if kind in CODE_BITS:
                codes, scale = (x[:want.shape[0] - first_row]
                                for x in tile_codes(data, kind, want.shape[-1]))
                if want.shape[-1] % TILE:
                    data = code_values(codes, scale).tobytes()
                else:
                    data = gguf_blocks(codes, scale, kind)
            elif name.endswith(".A_log"):
                data = (-np.exp(np.frombuffer(data, "<f4").astype("f8"))).astype("<f4").tobytes()
            written += len(data)
            yield data
        yield bytes(-written % GGUF_ALIGNMENT)
        if name.endswith(".conv") and not m.conv_bias:
            yield bytes(4 * m.E + -4 * m.E % GGUF_ALIGNMENT)


# --------------------------------------------------------------------------------------------------
# 12. Chat
# A chat template is a program of jinja2. It is run on conversations whose texts are known, and what
# stands around the texts is stored after the tokenizer: files/chat.h puts it around other texts. A
# template that does more than that is left out with the reason; the model is exported without.

CHAT_TEXTS = "open_user open_system system_user user_reply reply_user template".split()
CHAT_TRIMS = 1
CHAT_FILES = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"


class NoChat(Exception):
    """Why a chat template is left out."""


def chat_settings(folder):
    """(template or None, the special tokens that it may name)"""
    path = lambda name: os.path.join(folder, name)
    tables = [read_json(path(name)) for name in CHAT_FILES[1::-1] if os.path.exists(path(name))]
    settings = {key: value for table in tables if isinstance(table, dict)
                for key, value in table.items()}
    content = lambda token: token.get("content") if isinstance(token, dict) else token
    special = {key: content(value) for key, value in settings.items() if key.endswith("_token")}
    special = {key: value for key, value in special.items() if isinstance(value, str)}
    template = settings.get("chat_template")
    if isinstance(template, list):                  # several, by name
        template = {entry.get("name"): entry.get("template") for entry in template
                    if isinstance(entry, dict)}.get("default")
    if os.path.exists(path(CHAT_FILES[2])):
        with open(path(CHAT_FILES[2]), encoding="utf-8", errors="replace") as f:
            template = f.read()
    return template if isinstance(template, str) and template else None, special


def chat_renderer(template, special):
    """A function of a conversation, as transformers runs a template."""
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise NoChat("jinja2 is missing (pip install jinja2)")

    def raise_exception(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception

    def render(texts, system=None):
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages += [{"role": role, "content": text} for role, text in zip(roles, texts)]
        try:
            return compiled.render(messages=messages, tools=None, documents=None,
                                   add_generation_prompt=True, **special)
        except Exception as e:                       # whatever a template does
            raise NoChat(f"the template fails on a conversation: {first_line(e)}")

    try:
        compiled = environment.from_string(template)
    except Exception as e:
        raise NoChat(f"the template is not jinja2: {first_line(e)}")
    return render


def cut_out(text, content, what):
    """What stands before and after a text that occurs once."""
    parts = text.split(content)
    if len(parts) != 2:
        raise NoChat(f"{what} stands {len(parts) - 1} times in the conversation, not once")
    return parts


def chat_around(parts, trims, texts, system=None):
    """The conversation as files/chat.h makes it."""
    clean = lambda text: text.strip() if trims else text
    out = [parts["open_user"]] if system is None else \
          [parts["open_system"], clean(system), parts["system_user"]]
    for i, text in enumerate(texts):
        out += [clean(text), parts["reply_user" if i % 2 else "user_reply"]]
    return "".join(out)


def chat_parts(render):
    """(what stands around the texts, whether texts are stripped), tried on more conversations."""
    first, reply, second, system = "Zq1fu", "Zq2re", "Zq3su", "Zq4sy"
    parts = dict.fromkeys(CHAT_TEXTS)
    parts["open_user"], parts["user_reply"] = cut_out(render([first]), first, "a user's text")
    before, rest = cut_out(render([first, reply, second]), reply, "a reply")
    if before != parts["open_user"] + first + parts["user_reply"]:
        raise NoChat("what stands before a reply is not what the model writes after")
    parts["reply_user"], end = cut_out(rest, second, "a user's second text")
    if end != parts["user_reply"]:
        raise NoChat("a reply begins in another way after the second text of the user")
    try:
        before, rest = cut_out(render([first], system), system, "the system text")
        parts["open_system"] = before
        parts["system_user"], end = cut_out(rest, first, "a user's text")
        if end != parts["user_reply"]:
            raise NoChat("a reply begins in another way after a system text")
    except NoChat:
        parts["open_system"] = parts["system_user"] = None
    contents = ["one", "two words", "a\nb\n\nc", "{{ 7 * 7 }} {% x %}", "\u00e9 \u65e5\u672c",
                "'q' & <b>", "1", "x" * 300, "again"]
    for trims, spaced in ((False, ["  before", "after \n"]), (True, ["  before", "after \n"])):
        tries = [(contents[i:i + n], system if with_system else None)
                 for n in (1, 3, 5) for i in range(len(contents) - n + 1)
                 for with_system in ([False, True] if parts["open_system"] is not None else [False])
                 for system in ["be brief\nand kind"]]
        tries += [(spaced + spaced[:1], None)]
        wrong = [texts for texts, system in tries
                 if render(texts, system) != chat_around(parts, trims, texts, system)]
        if not wrong:
            return parts, trims
    raise NoChat(f"the template does more than to put text around texts, as in {short(wrong[0])}")


def chat_section(folder, blob):
    """The bytes to store, or None where the folder has no chat template."""
    template, special = chat_settings(folder)
    if template is None:
        return None
    if struct.unpack_from("<I", blob, 8)[0] == 0:
        raise NoChat("a tokenizer of bytes has no special tokens")
    parts, trims = chat_parts(chat_renderer(template, special))
    ends = [token for token in tokenizer_json(blob)["added_tokens"]
            if parts["reply_user"].startswith(token["content"])]
    if not ends:
        raise NoChat("no special token ends a reply: "
                     f"{short(parts['reply_user'])} stands after it")
    if any(token["lstrip"] or token["single_word"] for token in ends):
        raise NoChat(f"{short(ends[0]['content'])}, which ends a reply, takes in what is before it")
    out = [struct.pack("<I", CHAT_TRIMS * trims)]
    for name in CHAT_TEXTS:
        raw = None if parts[name] is None else parts[name].encode("utf-8")
        raw = template.encode("utf-8") if name == "template" else raw
        out.append(struct.pack("<I", HOLE) if raw is None else struct.pack("<I", len(raw)) + raw)
    return b"".join(out)


def chat_folder(tokenizer, folder):
    """Where the tokenizer's chat template is: beside the tokenizer."""
    if tokenizer in (None, "", "bytes", "none"):
        return folder
    return tokenizer if os.path.isdir(tokenizer) else os.path.dirname(tokenizer) or "."


def with_chat(blob, folder, notes):
    """The blob with the folder's chat template at its end, where it has one that can be stored."""
    try:
        section = chat_section(folder, blob) if blob else None
    except (NoChat, ExportError, UnicodeEncodeError, OSError) as why:
        notes.append(f"chat: left out: {why}")
        return blob
    if section is None:
        return blob
    fields = list(struct.unpack_from("<7I", blob, 4))
    if fields[0] == 1:                               # version 2 has room for more
        steps = {1: [GPT2], 2: [PUNCT, GPT2, FALCON]}[fields[3]]
        fields[0], fields[3] = 2, sum(step << 8 * i for i, step in enumerate(steps))
        blob = struct.pack("<4s7I2iI20x", b"mtok", *fields, -1, -1, 0) + blob[32:]
    unread, = struct.unpack_from("<I", blob, 40)
    unread += len(section) + 8
    return (blob[:40] + struct.pack("<I", unread) + blob[44:] + section +
            struct.pack("<I4s", len(section), b"chat"))


def stored_template(blob):
    """The chat template that a blob was made with, or None."""
    if len(blob) < 72 or struct.unpack_from("<I", blob, 4)[0] != 2 or blob[-4:] != b"chat" or \
            struct.unpack_from("<I", blob, 40)[0] < 8:
        return None
    length, = struct.unpack_from("<I", blob, len(blob) - 8)
    section, at = blob[len(blob) - 8 - length:len(blob) - 8], 4
    for name in CHAT_TEXTS:
        n, = struct.unpack_from("<I", section, at)
        n = n if n != HOLE else 0
        raw, at = section[at + 4:at + 4 + n], at + 4 + n
    return raw.decode("utf-8")


# --------------------------------------------------------------------------------------------------
# 13. Command line

EXAMPLES = """examples:
  python export.py mamba-130m-hf model.bin                  a directory in the transformers layout
  python export.py state-spaces/mamba-130m-hf model.bin     the same from the hub
  python export.py mamba-2.8b model.bin --dtype bf16 --tokenizer gpt-neox-20b/tokenizer.json
                                                            a state-spaces release, which brings
                                                            no tokenizer
  python export.py mamba-2.8b-hf model.bin --dtype q8       8.5 bits a weight (q4: 4.5), as
                                                            `mamba quantize` writes
  python export.py my-byte-model model.bin --tokenizer bytes
                                                            a model whose first 256 ids are bytes
  python export.py mamba-130m-hf model.bin --adapter lora   with a LoRA adapter of peft merged in
  python export.py tokenizer.json tokenizer.bin             the tokenizer alone
  python export.py model.gguf model.bin                     from llama.cpp's format
  python export.py --to-hf model.bin DIRECTORY              back to transformers
  python export.py --to-gguf model.bin model.gguf           back to llama.cpp"""


def fetch(name):
    """A local directory as it is; org/name from the hub."""
    if os.path.isdir(name):
        return name
    if os.path.exists(name):
        raise ExportError(
            f"{name} is a file; give the directory that holds config.json and the weights")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ExportError(f"{name} does not exist")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ExportError(
            f"{name} is no directory here; to fetch it from the hub, pip install huggingface_hub, "
            "or download its files by hand and give their directory")
    try:
        patterns = ["config.json", "generation_config.json", "tokenizer.json", "vocab.txt",
                    *CHAT_FILES, "model.safetensors*", "model-*-of-*.safetensors"]
        folder = snapshot_download(name, allow_patterns=patterns)
        if not any("model.safetensors" in file for file in os.listdir(folder)):
            # older ones have pickles only
            folder = snapshot_download(
                name, allow_patterns=["pytorch_model*.bin", "pytorch_model.bin.index.json"])
        return folder
    except Exception as e:
        raise ExportError(f"{name} cannot be fetched from the hub: {first_line(e)}")


# files of a checkpoint: none of them may become the output, read or not
CHECKPOINT_FILE = re.compile(r"(config|generation_config|tokenizer|tokenizer_config|"
                             r"special_tokens_map|.*\.index)\.json$|"
                             r"chat_template\.jinja$|vocab\.txt$|"
                             r".*\.safetensors$|pytorch_model.*\.bin$")


def is_gguf(path):
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as f:
        return path.endswith(".gguf") or f.read(4) == b"GGUF"


def refuse_adapter(folder):
    path = os.path.join(folder, "adapter_config.json")
    if os.path.exists(path) and not os.path.exists(os.path.join(folder, "config.json")):
        base = read_json(path).get("base_model_name_or_path")
        base = base if isinstance(base, str) and base else "BASE"
        raise ExportError(f"{folder} is an adapter of peft, not a model; name its base model, and "
                          f"add it: export.py {base[:200]} model.bin --adapter {folder}")


def to_bin(source, target, dtype, tokenizer, adapter):
    check_output(target, [])                          # before a download
    folder = fetch(source)
    refuse_adapter(folder)
    config_path, generation_path = (os.path.join(folder, name)
                                    for name in ("config.json", "generation_config.json"))
    inputs = [os.path.join(folder, name) for name in os.listdir(folder)
              if CHECKPOINT_FILE.match(name)]
    check_output(target, inputs + tokenizer_inputs(tokenizer))
    table = read_json(config_path)
    refuse_what_is_not_mamba(Config(table, config_path))  # before the weights are opened
    stored, left_out = by_canonical_name(open_checkpoint(folder), folder)
    config = Config(table, config_path, found_sizes(stored))
    generation = Fields(
        read_json(generation_path) if os.path.exists(generation_path) else {}, generation_path)
    blob, end_of_text = find_tokenizer(tokenizer, folder, config.notes)
    blob = with_chat(blob, chat_folder(tokenizer, folder), config.notes)
    m = model_from_config(config, generation, end_of_text)
    m = without_head(m, config, stored, left_out)
    finish(target, m, config, stored, blob, adapter, dtype, folder, "config.json")


def finish(target, m, config, stored, blob, adapter, dtype, folder, says):
    """Writes the model whose sizes and tensors are known, with the adapter in the folder."""
    if tokenizer_ids(blob) > m.V:
        raise ExportError(
            f"the tokenizer's ids go up to {tokenizer_ids(blob) - 1}, but the model's vocabulary "
            f"is {m.V}: it belongs to another model")
    if adapter:
        adapter = Adapter(adapter)
        check_output(target, adapter.paths)
        m, stored = adapter.apply(m, stored, config)
    pairs = match_tensors(m, stored, folder, says)
    check_output(target, {tensor.path for _, tensor in pairs})  # shards, whatever their names
    write_model(target, m, pairs, blob, dtype or stored_dtype(pairs))
    print_notes(config.notes)


def tokenizer_inputs(tokenizer):
    """What --tokenizer names: a file, or its folder."""
    if tokenizer in (None, "", "bytes", "none"):
        return []
    return [tokenizer, *(os.path.join(tokenizer, name) for name in TOKENIZER_FILES)]


def without_head(m, config, stored, left_out):
    """A model that classifies, or a bare backbone: the embedding stands in for the head."""
    names = config.table.get("architectures")
    bare = isinstance(names, list) and bool(names) and str(names[0]).endswith("MambaModel")
    if left_out:
        config.note(f"left out, because mamba.c predicts tokens: {', '.join(sorted(left_out))}")
    if (left_out or bare) and "lm_head.weight" not in stored and not m.tied:
        config.note("there is no lm_head.weight; the embedding takes its place, so the logits "
                    "mean nothing")
        return m._replace(tied=True)
    return m


def print_notes(notes):
    for text in dict.fromkeys(notes):
        print(f"export.py: note: {printable(text)}", file=sys.stderr)


def run(arguments):
    parser = argparse.ArgumentParser(
        prog="export.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
        description=
        "Converts a Mamba or Falcon-Mamba checkpoint to the one file that mamba.c runs, and back.")
    parser.add_argument("source",
                        metavar="SRC",
                        help="checkpoint directory, hub id org/name, model.gguf, or "
                        "tokenizer.json; with --to-hf and --to-gguf a model.bin")
    parser.add_argument("target",
                        metavar="DST",
                        help="model.bin or tokenizer.bin to write; with --to-hf a directory")
    parser.add_argument("--dtype",
                        choices=DTYPES,
                        help="format of the weight matrices (default: as they are stored, "
                        "so that nothing is lost)")
    parser.add_argument("--tokenizer",
                        metavar="PATH",
                        help="a tokenizer.json or a vocab.txt, or the word bytes, or none for a "
                        "model that reads and writes ids (default: what SRC has)")
    parser.add_argument("--to-hf",
                        action="store_true",
                        help="read a model.bin, write a transformers directory")
    parser.add_argument("--force",
                        action="store_true",
                        help="with --to-hf: write into a directory that is not empty")
    parser.add_argument("--to-gguf", action="store_true",
                        help="read a model.bin, write a GGUF file for llama.cpp")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA directory of peft, which is added "
                        "to the weights")
    a = parser.parse_args(arguments)
    back = a.to_hf or a.to_gguf
    if a.to_hf and a.to_gguf or back and (a.dtype or a.tokenizer or a.adapter):
        parser.error("--to-hf and --to-gguf take no --dtype, --tokenizer or --adapter")
    if a.force and not a.to_hf:
        parser.error("--force goes with --to-hf only")
    if np is None:
        raise ExportError("numpy is missing (pip install numpy)")
    if a.to_hf:
        to_transformers(a.source, a.target, a.force)
    elif a.to_gguf:
        to_gguf(a.source, a.target)
    elif is_gguf(a.source):
        gguf_to_bin(a.source, a.target, a.dtype, a.tokenizer, a.adapter)
    elif os.path.isfile(a.source) and a.source.endswith((".json", "vocab.txt")):
        check_output(a.target, [a.source])
        notes = []
        blob, _ = find_tokenizer(a.source, a.source, notes)
        blob = with_chat(blob, os.path.dirname(a.source) or ".", notes)
        with atomic_file(a.target) as f:
            f.write(blob)
        print(f"wrote {a.target}: {tokenizer_ids(blob)} ids, {len(blob)} bytes", file=sys.stderr)
        print_notes(notes)
    else:
        to_bin(a.source, a.target, a.dtype, a.tokenizer, a.adapter)


def main():
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGHUP"):                # as Ctrl-C: no temporary file stays
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        run(sys.argv[1:])
    except ExportError as e:
        sys.exit(f"export.py: {printable(str(e))}")
    except OSError as e:
        sys.exit(f"export.py: {e.filename or 'a file'}: {e.strerror or first_line(e)}")
    except MemoryError:
        sys.exit("export.py: out of memory")
    except KeyboardInterrupt:
        sys.exit("export.py: interrupted")


if __name__ == "__main__":
    main()
