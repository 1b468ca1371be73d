"""Trains one tiny model: python train_tiny.py {tiny-llama|tiny-mistral|tiny-mpt} MODELS_DIR SHAKESPEARE.txt

Needs its tokenizer in MODELS_DIR/NAME (make_tokenizers.py). One CPU thread; data and initial weights come from fixed
seeds. The models in tests/models had two stages, timed by the clock:

    train_tiny.py NAME ... --minutes 22 --lr 4e-3 --turns
    train_tiny.py NAME ... --stage 2 --minutes 7.5 --lr 2.5e-3 --turns         (tiny-llama)
    train_tiny.py NAME ... --stage 2 --minutes 4.6 --lr 2e-3                   (the other two)

--steps N in place of --minutes repeats a run of N optimizer steps (the numbers are in each train_log.json); the learning
rate then follows steps in place of time, so that weights come out alike, not bit-equal.
"""

import argparse
import json
import os
import random
import time

import torch
import torch.nn.functional as F
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
)
from transformers.models.mpt import modeling_mpt

import corpus

# The settings as mosaicml writes them; transformers leaves them out of config.json where they are its defaults.
MPT_ATTENTION = dict(
    alibi=True,
    alibi_bias_max=8,
    attn_impl="torch",
    attn_pdrop=0,
    attn_type="multihead_attention",
    attn_uses_sequence_id=False,
    clip_qkv=None,
    prefix_lm=False,
    qk_ln=False,
    softmax_scale=None,
)
QUESTIONS = [
    "What is Apache Spark?",
    "What is the capital of France?",
    "Reverse the list: red, apple, king.",
    "What is 7 plus 5?",
    "Tell a story about a brave owl named Rose and a castle.",
]
LOG_EVERY_STEPS = 50


def main():
    a = arguments()
    torch.set_num_threads(1)
    torch.manual_seed(1234)
    folder = os.path.join(a.out, a.name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = untrained(a.name)
    if a.stage > 1:
        model = type(model).from_pretrained(folder, torch_dtype=torch.float32)
    print(a.name, parameters(model), "parameters")
    with open(a.text) as file:
        chunks = corpus.play_chunks(file.read())
    began = time.time()
    with fused_mpt_attention():
        losses, steps, tokens = train(model, batches(tokenizer, chunks, a), a)
    record = dict(
        stage=a.stage,
        parameters=parameters(model),
        steps=steps,
        tokens=tokens,
        seconds=round(time.time() - began),
        seq=a.seq,
        batch=a.batch,
        lr=a.lr,
        loss=losses,
    )
    save(model, tokenizer, folder, record)
    show(model, tokenizer)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["tiny-llama", "tiny-mistral", "tiny-mpt"])
    parser.add_argument("out", metavar="MODELS_DIR")
    parser.add_argument("text", metavar="SHAKESPEARE.txt")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps, in place of minutes")
    parser.add_argument("--seq", type=int, default=256, help="tokens in a row")
    parser.add_argument("--batch", type=int, default=12, help="rows in a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--stage", type=int, default=1, help="2: goes on from the saved weights, on fresh data")
    parser.add_argument("--turns", action="store_true", help="the text with turns, see corpus.doc")
    return parser.parse_args()


def untrained(name):
    """The model's shape with random weights."""
    rope = dict(
        vocab_size=2048,
        hidden_size=128,
        num_attention_heads=8,
        num_hidden_layers=4,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        tie_word_embeddings=False,
        use_cache=True,
        initializer_range=0.02,
    )
    if name == "tiny-llama":
        return LlamaForCausalLM(LlamaConfig(**rope, intermediate_size=352, num_key_value_heads=4))
    if name == "tiny-mistral":
        return MistralForCausalLM(
            MistralConfig(**rope, intermediate_size=384, num_key_value_heads=2, sliding_window=64)
        )
    return MptForCausalLM(
        MptConfig(
            d_model=128,
            n_heads=8,
            n_layers=4,
            expansion_ratio=4,
            max_seq_len=1024,
            vocab_size=2048,
            resid_pdrop=0,
            emb_pdrop=0,
            learned_pos_emb=True,
            no_bias=True,
            norm_type="low_precision_layernorm",
            layer_norm_epsilon=1e-5,
            logit_scale=None,
            embedding_fraction=1.0,
            verbose=0,
            use_cache=False,
            attn_config=dict(MPT_ATTENTION),
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
            tie_word_embeddings=True,
        )
    )


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def batches(tokenizer, chunks, a):
    """Rows of token ids, one more than a row's length: inputs and, one further, what they should give.

    Every row starts at the start of a document and is filled with whole documents, the last one cut. One step in five
    of tiny-llama uses half as many rows of twice the length, so that it learns positions up to 512.
    """
    rng = random.Random(98 + a.stage)
    begin = [] if a.name == "tiny-mpt" else [tokenizer.bos_token_id]
    documents, step = [], 0
    while True:
        long_step = a.name == "tiny-llama" and step % 5 == 4
        length, count = (2 * a.seq, a.batch // 2) if long_step else (a.seq, a.batch)
        rows = []
        while len(rows) < count:
            row = []
            while len(row) < length + 1:
                if not documents:
                    texts = [corpus.doc(rng, chunks, a.turns) for _ in range(256)]
                    documents = tokenizer(texts, add_special_tokens=False).input_ids
                row += begin + documents.pop() + [tokenizer.eos_token_id]
            rows.append(row[: length + 1])
        step += 1
        yield torch.tensor(rows)


def train(model, rows, a):
    """AdamW with a warm-up, a plateau and a linear fall. Gives losses, steps and tokens."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=decayed, weight_decay=0.05), dict(params=plain, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=a.lr, betas=(0.9, 0.97), eps=1e-9, fused=True)
    model.train()
    began, step, losses = time.time(), 0, []
    for x in rows:
        progress = step / a.steps if a.steps else (time.time() - began) / (60 * a.minutes)
        if progress >= 1:
            break
        fall = 1.0 if progress < 0.35 else (1 - progress) / 0.65 + 0.003
        for group in optimizer.param_groups:
            group["lr"] = a.lr * min(1, (step + 1) / 60) * fall
        logits = model(x[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), x[:, 1:].reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % LOG_EVERY_STEPS == 0 or step == 1:
            losses.append((step, round(loss.item(), 4)))
            print(f"step {step}: loss {loss.item():.4f}, {time.time() - began:.0f} s", flush=True)
    return losses, step, step * a.seq * a.batch


class fused_mpt_attention:
    """While training only: MPT's attention by torch's fused kernel, the same sums but faster."""

    def __enter__(self):
        self.plain = modeling_mpt.MptAttention.forward
        biases = {}

        def forward(attention, hidden_states, position_bias, past_key_value=None, attention_mask=None):
            b, s, _ = hidden_states.shape
            heads, width = attention.n_heads, attention.head_dim
            q, k, v = (x.reshape(b, s, heads, width).transpose(1, 2) for x in attention.Wqkv(hidden_states).chunk(3, dim=2))
            if s not in biases:
                causal = torch.full((s, s), float("-inf")).triu(1)
                biases[s] = (position_bias[:, :, -s:] + causal)[None].contiguous()
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=biases[s])
            return attention.out_proj(out.transpose(1, 2).reshape(b, s, -1)), None, None

        modeling_mpt.MptAttention.forward = forward

    def __exit__(self, *_):
        modeling_mpt.MptAttention.forward = self.plain


def save(model, tokenizer, folder, record):
    """bf16 weights, the configuration and the log."""
    model.eval().to(torch.bfloat16)
    model.config.torch_dtype = torch.bfloat16
    model.config._name_or_path = ""
    is_mpt = isinstance(model, MptForCausalLM)
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=0 if is_mpt else 1, eos_token_id=end, max_length=1024)
    model.save_pretrained(folder, safe_serialization=True)
    os.chmod(os.path.join(folder, "model.safetensors"), 0o644)
    if is_mpt:
        path = os.path.join(folder, "config.json")
        with open(path) as file:
            config = json.load(file)
        config.update(architectures=["MPTForCausalLM"], attn_config=MPT_ATTENTION)
        with open(path, "w") as file:
            json.dump(config, file, indent=2)
    log = os.path.join(folder, "train_log.json")
    records = []
    if record["stage"] > 1:
        with open(log) as file:
            records = json.load(file)
    with open(log, "w") as file:
        json.dump(records + [record], file)


def show(model, tokenizer):
    for question in QUESTIONS:
        ids = tokenizer(corpus.alpaca(question), return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=64, do_sample=False)
        print(repr(question), "->", repr(tokenizer.decode(out[0, ids.shape[1] :])))


if __name__ == "__main__":
    main()
