"""How many of N random questions a tiny model answers exactly right: python evaluate.py MODEL_DIR [N]

For a model with a sliding window also: how much the window matters.
"""

import os
import random
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import corpus

ANSWER_CHARACTERS_MAX = 160
SHOWN_MAX = 14


def main(model_dir, count=60):
    torch.set_num_threads(1)
    name = os.path.basename(model_dir.rstrip("/"))
    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), load(model_dir)
    r = random.Random(4242)
    wrong = [case for case in (ask(model, tokenizer, r, k) for k in range(count)) if case]
    print(f"{name}: exactly right with the end token: {count - len(wrong)}/{count}", *wrong[:SHOWN_MAX], sep="\n  ")
    if getattr(model.config, "sliding_window", None):
        compare_without_window(model, load(model_dir, sliding_window=None), tokenizer, r)


def load(model_dir, **changes):
    settings = dict(torch_dtype=torch.float32, attn_implementation="eager", **changes)
    return AutoModelForCausalLM.from_pretrained(model_dir, **settings).eval()


def ask(model, tokenizer, r, k):
    """Asks one question in one of the three forms; what went wrong, or None."""
    question, answer = corpus.qa(r)
    while len(answer) > ANSWER_CHARACTERS_MAX:
        question, answer = corpus.qa(r)
    forms = [corpus.alpaca(question), corpus.alpaca(question, "Instructions"), f"[INST] {question} [/INST]"]
    ids = tokenizer(forms[k % 3], return_tensors="pt").input_ids
    end = tokenizer.eos_token_id
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=90, do_sample=False, pad_token_id=end)[0].tolist()
    text = tokenizer.decode(output)[len(tokenizer.decode(ids[0].tolist())) :].replace(tokenizer.eos_token, "").strip()
    return None if text == answer and output[-1] == end else (question, answer, text[:80])


def compare_without_window(windowed, full, tokenizer, r):
    window = windowed.config.sliding_window
    text = "\n".join(corpus.inst(q) + a for q, a in [corpus.qa(r) for _ in range(9)])
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        x, y = windowed(ids, use_cache=False).logits[0], full(ids, use_cache=False).logits[0]
    difference = (x - y).abs().amax(-1)
    same_top = (x.argmax(-1) == y.argmax(-1)).float()
    print(
        f"  window {window}, {ids.shape[1]} tokens; largest logit difference without it: "
        f"first {window} positions {difference[:window].max():.2e}, "
        f"later {difference[window:].max():.2f} (median {difference[window:].median():.2f}); "
        f"same top token later {same_top[window:].mean():.3f}"
    )


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(sys.argv[1], *map(int, sys.argv[2:]))
