"""Turns a GGUF file of a Llama-family model into a Hugging Face folder: python gguf_to_hf.py IN.gguf OUT_DIR

Dequantises the weights into one bf16 safetensors file, and writes config.json and a byte-level BPE tokenizer. Needs
gguf, numpy, ml_dtypes, safetensors and tokenizers from PyPI.

llama.cpp stores the query and key rows in its own rotary order (pairs next to each other); Hugging Face keeps the two
halves apart, so those rows are put back.
"""

import json
import os
import sys

import ml_dtypes
import numpy as np
from gguf import GGUFReader, quants
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # llama.cpp's token type of marks such as <|im_end|>


def main(source, out):
    reader = GGUFReader(source)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    if facts["general.architecture"] != "llama" or facts["tokenizer.ggml.model"] != "gpt2":
        sys.exit("only llama models with a byte-level BPE tokenizer are converted")
    os.makedirs(out, exist_ok=True)
    tensors = dict(weights(reader, facts))
    save_file(tensors, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})
    configuration(facts, tied="lm_head.weight" not in tensors, out=out)
    tokenizer(facts, out)
    print(f"{out}: {len(tensors)} tensors, {sum(w.size for w in tensors.values()):,} parameters")


def weights(reader, facts):
    """Hugging Face names with bf16 arrays."""
    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    for tensor in reader.tensors:
        array = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        stem, kind = tensor.name.rsplit(".", 1)
        if stem.startswith("blk."):
            _, layer, part = stem.split(".")
            if part in heads:
                array = halves_apart(array, heads[part])
            name = f"model.layers.{layer}.{LAYER_NAMES[part]}"
        elif stem in TOP_NAMES:
            name = TOP_NAMES[stem]
        else:
            print("left out:", tensor.name)
            continue
        yield f"{name}.{kind}", array.astype(ml_dtypes.bfloat16)


def halves_apart(rows, heads):
    """Per head: pairs next to each other become two halves."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def configuration(facts, tied, out):
    llama = {key[len("llama.") :]: value for key, value in facts.items() if key.startswith("llama.")}
    special = {
        "bos_token_id": facts.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts.get("tokenizer.ggml.padding_token_id"),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "max_position_embeddings": llama["context_length"],
        "rms_norm_eps": round(float(llama["attention.layer_norm_rms_epsilon"]), 9),
        "rope_theta": float(llama.get("rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **special,
    }
    write_json(out, "config.json", config)
    write_json(out, "generation_config.json", special)


def tokenizer(facts, out):
    tokens, types = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    bytes_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if facts.get("tokenizer.ggml.pre") in ("smollm", None):
        digits = pre_tokenizers.Digits(individual_digits=True)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_level])
    else:
        bpe.pre_tokenizer = bytes_level
    bpe.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types) if kind == CONTROL_TOKEN]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    bpe.save(os.path.join(out, "tokenizer.json"))
    marks = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        id = facts.get(f"tokenizer.ggml.{theirs}_token_id")
        if id is not None:
            marks[ours + "_token"] = tokens[id]
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": facts["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **marks,
    }
    if facts.get("tokenizer.chat_template"):
        settings["chat_template"] = facts["tokenizer.chat_template"]
    write_json(out, "tokenizer_config.json", settings)
    write_json(out, "special_tokens_map.json", marks)


def write_json(out, name, value):
    with open(os.path.join(out, name), "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
