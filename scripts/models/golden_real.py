"""Writes reference outputs of a real chat model by transformers on the CPU: python golden_real.py MODEL_DIR OUT_DIR

The files are as those of golden.py, with fewer prompts, and the margin of each step beside its token.
"""

import json
import os
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import corpus

TOP = 5
WITH_LOGPROBS = ["capital_chat", "spark"]
# Type, and how many tokens are made.
RUNS = [("float32", torch.float32, 40), ("bfloat16", torch.bfloat16, 16)]


def main(model_dir, out):
    torch.set_num_threads(1)
    os.makedirs(out, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    golden = {"model": os.path.basename(model_dir.rstrip("/"))}
    for name, dtype, tokens_max in RUNS:
        model = AutoModelForCausalLM.from_pretrained(model_dir, torch_dtype=dtype).eval()
        golden[name] = []
        for case, prompt in prompts(tokenizer):
            record, logprobs = greedy(model, tokenizer, prompt, tokens_max)
            golden[name].append({"name": case, **record})
            if name == "float32" and case in WITH_LOGPROBS:
                np.save(os.path.join(out, f"{case}.last_logprobs.npy"), logprobs.numpy())
            print(name, case, record["min_margin"], repr(record["text"][:120]), flush=True)
    with open(os.path.join(out, "golden.json"), "w") as file:
        json.dump(golden, file, separators=(",", ":"), ensure_ascii=False)


def prompts(tokenizer):
    def chat(question):
        messages = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    return [
        ("capital_chat", chat("What is the capital of France? Answer in one sentence.")),
        ("spark", corpus.alpaca("What is Apache Spark?")),
        ("hello", "Hello, I'm a language model,"),
        ("count", "one, two, three, four,"),
        ("story", "Once upon a time there was a little fox who lived near the river."),
        ("water_chat", chat("What is water made of?")),
    ]


def greedy(model, tokenizer, prompt, tokens_max):
    """The greedy continuation, scored in one pass over the whole; and the log-probabilities after the prompt."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    mask = torch.ones_like(ids)
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=tokens_max, do_sample=False, pad_token_id=2)[0]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(whole[None], use_cache=False).logits[0].float(), -1)
    start, steps = ids.shape[1], []
    for place in range(start, len(whole)):
        values, best = logprobs[place - 1].topk(TOP)
        top = [[int(i), round(float(v), 4)] for i, v in zip(best, values)]
        steps.append(dict(id=int(whole[place]), margin=round(float(values[0] - values[1]), 4), top5=top))
    record = dict(
        prompt=prompt,
        input_ids=ids[0].tolist(),
        output_ids=whole[start:].tolist(),
        text=tokenizer.decode(whole[start:]),
        argmax_agrees=all(step["id"] == step["top5"][0][0] for step in steps),
        min_margin=min(step["margin"] for step in steps),
        steps=steps,
    )
    return record, logprobs[start - 1]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
