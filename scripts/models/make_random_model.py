"""Writes a checkpoint with random, seeded weights and a realistic shape, in Hugging Face form, for tests of load, memory
and speed:

    python make_random_model.py --size 1.1b --family llama --out DIR [--seed 0] [--shard-mb 2000] [--tokenizer DIR]

Needs numpy and ml_dtypes only. The safetensors files are written straight to disk, a slab of a tensor at a time, so that
memory stays at about 100 MB whatever the size. Weights are bf16, normal with standard deviation 0.02 (projections back
into the residual stream scaled by 1/sqrt(2 * layers)); norm weights are 1. A tensor's numbers depend on the seed and its
name alone, so that the size of a shard does not change them.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import struct
import sys

import ml_dtypes
import numpy as np

# hidden, intermediate, layers, heads, key/value heads of the llama shape, vocabulary
SIZES = {
    "15m": (288, 768, 6, 6, 6, 32000),
    "160m": (768, 3072, 12, 12, 12, 32000),
    "1.1b": (2048, 5632, 22, 32, 4, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "30b": (6656, 17920, 60, 52, 52, 32000),
    "34b": (8192, 22016, 48, 64, 8, 32000),
    "70b": (8192, 28672, 80, 64, 8, 32000),
}
DEVIATION = 0.02
BYTES = 2
# Kinds of tensor: norms are ones, projections back into the residual stream are scaled down.
NORM, WEIGHT, RESIDUAL = "norm", "weight", "residual"
SLAB = 1 << 22  # numbers made at a time


def main():
    a = arguments()
    layers = a.layers or SIZES[a.size][2]
    if a.family == "mpt":
        tensors, config = mpt(a.size, layers)
    else:
        tensors, config = llama(a.family, a.size, layers)
    os.makedirs(a.out, exist_ok=True)
    total = sum(size_of(shape) for _, shape, _ in tensors)
    free = shutil.disk_usage(a.out).free
    if total > free * 0.95:
        sys.exit(f"needs {total / 1e9:.1f} GB, only {free / 1e9:.1f} GB are free in {a.out}")
    write_weights(a.out, shards(tensors, a.shard_mb * 1_000_000), layers, a.seed)
    write_json(a.out, "config.json", config)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(a.out, "generation_config.json", special)
    if a.tokenizer:
        for name in os.listdir(a.tokenizer):
            if name.startswith(("tokenizer", "special_tokens")):
                shutil.copy(os.path.join(a.tokenizer, name), a.out)
    print(f"{a.family} {a.size}: {total // BYTES:,} parameters, {total / 1e9:.2f} GB")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--family", choices=["llama", "mistral", "mpt"], default="llama")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-mb", type=int, default=2000)
    parser.add_argument("--layers", type=int, help="fewer (or more) layers than the shape has")
    parser.add_argument("--tokenizer", help="folder whose tokenizer files are copied")
    return parser.parse_args()


# Shapes


def llama(family, size, layers):
    hidden, inner, _, heads, kv_heads, vocabulary = SIZES[size]
    context = 4096 if size in ("7b", "13b") else 2048
    if family == "mistral":
        context = 32768
        if size == "7b":
            inner, kv_heads = 14336, 8
        else:
            kv_heads = heads // 4 if heads % 4 == 0 else heads // 3
    head = hidden // heads
    tied = size == "15m"  # as small checkpoints often have it
    tensors = [("model.embed_tokens.weight", (vocabulary, hidden), WEIGHT)]
    for i in range(layers):
        at = f"model.layers.{i}."
        tensors += [
            (at + "input_layernorm.weight", (hidden,), NORM),
            (at + "self_attn.q_proj.weight", (heads * head, hidden), WEIGHT),
            (at + "self_attn.k_proj.weight", (kv_heads * head, hidden), WEIGHT),
            (at + "self_attn.v_proj.weight", (kv_heads * head, hidden), WEIGHT),
            (at + "self_attn.o_proj.weight", (hidden, heads * head), RESIDUAL),
            (at + "post_attention_layernorm.weight", (hidden,), NORM),
            (at + "mlp.gate_proj.weight", (inner, hidden), WEIGHT),
            (at + "mlp.up_proj.weight", (inner, hidden), WEIGHT),
            (at + "mlp.down_proj.weight", (hidden, inner), RESIDUAL),
        ]
    tensors.append(("model.norm.weight", (hidden,), NORM))
    if not tied:
        tensors.append(("lm_head.weight", (vocabulary, hidden), WEIGHT))
    config = {
        "architectures": ["MistralForCausalLM" if family == "mistral" else "LlamaForCausalLM"],
        "model_type": family,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "initializer_range": DEVIATION,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }
    if family == "mistral":
        config["sliding_window"] = 4096
    else:
        config.update(rope_scaling=None, attention_bias=False, pretraining_tp=1)
    return tensors, config


def mpt(size, layers):
    hidden, _, llama_layers, heads, _, _ = SIZES[size]
    vocabulary = 50432
    if size == "30b":  # mpt-30b has a shape of its own
        hidden, heads = 7168, 64
        layers = 48 if layers == llama_layers else layers
    tensors = [("transformer.wte.weight", (vocabulary, hidden), WEIGHT)]
    for i in range(layers):
        at = f"transformer.blocks.{i}."
        tensors += [
            (at + "norm_1.weight", (hidden,), NORM),
            (at + "attn.Wqkv.weight", (3 * hidden, hidden), WEIGHT),
            (at + "attn.out_proj.weight", (hidden, hidden), RESIDUAL),
            (at + "norm_2.weight", (hidden,), NORM),
            (at + "ffn.up_proj.weight", (4 * hidden, hidden), WEIGHT),
            (at + "ffn.down_proj.weight", (hidden, 4 * hidden), RESIDUAL),
        ]
    tensors.append(("transformer.norm_f.weight", (hidden,), NORM))
    config = {
        "architectures": ["MPTForCausalLM"],
        "model_type": "mpt",
        "d_model": hidden,
        "n_heads": heads,
        "n_layers": layers,
        "expansion_ratio": 4,
        "max_seq_len": 2048,
        "vocab_size": vocabulary,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
        "learned_pos_emb": True,
        "logit_scale": None,
        "emb_pdrop": 0,
        "resid_pdrop": 0,
        "embedding_fraction": 1.0,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": 8,
            "attn_impl": "torch",
            "attn_pdrop": 0,
            "attn_type": "multihead_attention",
            "attn_uses_sequence_id": False,
            "clip_qkv": None,
            "prefix_lm": False,
            "qk_ln": False,
            "softmax_scale": None,
        },
        "use_cache": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    return tensors, config


# Files


def size_of(shape):
    return BYTES * math.prod(shape)


def shards(tensors, bytes_max):
    """The tensors in order, cut into files of at most bytes_max (a larger tensor has a file of its own)."""
    files, size = [[]], 0
    for tensor in tensors:
        if files[-1] and size + size_of(tensor[1]) > bytes_max:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += size_of(tensor[1])
    return files


def write_weights(out, files, layers, seed):
    table, weight_map, total = normal_table(), {}, 0
    for number, tensors in enumerate(files, 1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for tensor, shape, _ in tensors:
            end = offset + size_of(shape)
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            offset, weight_map[tensor] = end, name
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        path = os.path.join(out, name)
        with open(path + ".tmp", "wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for tensor in tensors:
                write_tensor(file, *tensor, seed, layers, table)
        os.replace(path + ".tmp", path)
        total += offset
        print(f"{name}: {offset / 1e9:.2f} GB", flush=True)
    if len(files) > 1:
        write_json(out, "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_tensor(file, name, shape, kind, seed, layers, table):
    count = math.prod(shape)
    if kind == NORM:
        file.write(np.ones(count, ml_dtypes.bfloat16).tobytes())
        return
    deviation = DEVIATION / math.sqrt(2 * layers) if kind == RESIDUAL else DEVIATION
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
    random = np.random.Generator(np.random.SFC64(key))
    scaled = (table * deviation).astype(ml_dtypes.bfloat16).view(np.uint16)
    for start in range(0, count, SLAB):
        n = min(SLAB, count - start)
        # Sixteen random bits choose one of the table's values.
        index = random.integers(0, 1 << 64, (n + 3) // 4, dtype=np.uint64).view(np.uint16)[:n]
        file.write(scaled[index].tobytes())


def normal_table():
    """65,536 equally likely values of a standard normal distribution, cut at about 4.2."""
    grid = np.linspace(-6, 6, 24001)
    below = np.array([0.5 * (1 + math.erf(z / math.sqrt(2))) for z in grid])
    return np.interp((np.arange(65536) + 0.5) / 65536, below, grid).astype(np.float32)


def write_json(out, name, value):
    with open(os.path.join(out, name), "w") as file:
        json.dump(value, file, indent=2)


if __name__ == "__main__":
    main()
