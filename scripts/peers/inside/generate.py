"""Runs inside an environment with transformers: generate.py MODEL_DIR THREADS. See ../transformers.py."""

import sys
import time

import torch
from transformers import AutoModelForCausalLM

PROMPT, OUTPUT, TRIES = 512, 32, 3


def main():
    folder, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16).eval()
    ids = lambda batch, length: torch.randint(3, model.config.vocab_size, (batch, length))
    with torch.inference_mode():
        model(ids(1, 16))
        print("prefill_512", PROMPT / best(lambda: model(ids(1, PROMPT))))
        for batch in (1, 8):
            first = best(lambda: generate(model, ids(batch, 16), 1))
            whole = best(lambda: generate(model, ids(batch, 16), 1 + OUTPUT))
            print(f"decode_{batch}", batch * OUTPUT / (whole - first))


def generate(model, ids, tokens):
    mask = torch.ones_like(ids)
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **length)


def best(work):
    seconds = []
    for _ in range(TRIES):
        began = time.monotonic()
        work()
        seconds.append(time.monotonic() - began)
    return min(seconds)


if __name__ == "__main__":
    main()
