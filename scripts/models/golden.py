"""Writes reference outputs of a tiny model by transformers on the CPU: python golden.py MODEL_DIR OUT_DIR [embeddings]

With `embeddings` only embeddings.json is written.

Every step recomputes the whole sequence, without a key/value cache, so that the numbers do not hang on a cache being
right. What the files hold is told in tests/models/README.md.
"""

import json
import math
import os
import random
import sys

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import corpus

TOKENS_MAX = 64
TOP = 5
# Prompts whose logits and hidden states are stored whole.
WITH_LOGITS = ["spark", "turns"]
PERPLEXITY_TOKENS, PERPLEXITY_WINDOW = 4096, 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AWKWARD = [
    "Hello, world!",
    " leading space",
    "two  spaces   three",
    "tabs\tand\nnew\n\nlines\n",
    "What is Apache Spark?",
    "1234567890 3.14",
    "한국어 텍스트",
    "日本語",
    "emoji 😀🚀",
    "naïve café",
    "don't can't I'm",
    "",
    " ",
    "\n",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "a<|endoftext|>b",
    "[INST] Hi [/INST]",
    corpus.alpaca("What is the capital of France?"),
    "\u0000\u0001",
    "ÀÈ é",
    "x" * 40,
    "        eight",
    "ROMEO:\nO, speak again, bright angel!",
    '{"a": [1, 2]}',
]


def main(model_dir, out, only=None):
    torch.set_num_threads(1)
    os.makedirs(out, exist_ok=True)
    name = os.path.basename(model_dir.rstrip("/"))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    has_begin = "mpt" not in name
    cases = prompts(tokenizer, has_begin)
    write_embeddings(model_dir, tokenizer, cases, out)
    if only == "embeddings":
        return
    text = perplexity_text()
    ids = tokenizer(text, add_special_tokens=False).input_ids[:PERPLEXITY_TOKENS]
    records, tensors, perplexities = {}, {}, {}
    for dtype_name, dtype in DTYPES.items():
        model = AutoModelForCausalLM.from_pretrained(model_dir, torch_dtype=dtype, attn_implementation="eager").eval()
        with torch.no_grad():
            records[dtype_name] = [greedy(model, tokenizer, dtype_name, tensors, *case) for case in cases]
            perplexities[dtype_name] = perplexity(model, ids, [tokenizer.bos_token_id] if has_begin else [])
    head = dict(
        model=name,
        transformers=transformers.__version__,
        torch=torch.__version__,
        max_new_tokens=TOKENS_MAX,
        greedy=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    write_json(out, "golden.json", {**head, **records}, separators=(",", ":"))
    meaning = dict(window=PERPLEXITY_WINDOW, begin_token=has_begin, text_file="ppl_text.txt", token_ids=ids)
    write_json(out, "perplexity.json", {**meaning, **perplexities}, separators=(",", ":"))
    with open(os.path.join(out, "ppl_text.txt"), "w") as file:
        file.write(text)
    save_file({key: value.contiguous() for key, value in tensors.items()}, os.path.join(out, "logits.safetensors"))
    for key, value in tensors.items():
        if key.endswith(".last_logits"):
            np.save(os.path.join(out, key + ".npy"), value.numpy())
    write_json(out, "tokenizer_golden.json", tokenizer_cases(tokenizer), indent=1)
    report(name, records, perplexities)


def write_embeddings(model_dir, tokenizer, cases, out):
    """The mean over the prompt's tokens of the last hidden states, behind the final norm, in float32."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, torch_dtype=torch.float32, attn_implementation="eager").eval()
    records = []
    for name, prompt, _ in cases:
        ids = tokenizer(prompt).input_ids
        with torch.no_grad():
            states = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states[-1][0]
        mean = states.double().mean(0).tolist()
        records.append(dict(name=name, prompt=prompt, input_ids=ids, embedding=[round(x, 6) for x in mean]))
    write_json(out, "embeddings.json", records, separators=(",", ":"))


def write_json(out, name, value, **form):
    with open(os.path.join(out, name), "w") as file:
        json.dump(value, file, ensure_ascii=False, **form)


# Prompts


def prompts(tokenizer, has_begin):
    """(name, prompt, the right answer where there is one)"""
    alpaca, answers = corpus.alpaca, corpus.DEFS

    def turns(pairs, last):
        """Earlier questions with answers, and a last question, by the chat template."""
        messages = []
        for question, answer in pairs:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(messages + [{"role": "user", "content": last}], tokenize=False)
        # The begin token at its front is left off, since the tokenizer adds it.
        return text[len("<s>") :] if has_begin else text

    def story_turn(name, animal, trait, place):
        question = f"Tell a story about a {trait} {animal} named {name} and a {place}."
        return question, corpus.story(name, animal, trait, place)

    hello = "Hello, I'm a language model,"
    leo = corpus.story("Leo", "fox", "kind", "river")
    second_end = leo.index(". ", leo.index(". ") + 1) + 1
    numbers = ", ".join(str(n) for n in range(3, 13)) + "."
    letters = ", ".join("abcdefghijklmnopqrstuvwxyz") + "."
    spell = turns(
        [
            ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
            ("What is the opposite of day?", "The opposite of day is night."),
            ("What is 2 plus 2?", "2 plus 2 is 4."),
        ],
        "Spell the word star.",
    )
    spain = turns(
        [story_turn("Mary", "cat", "proud", "garden"), story_turn("Ben", "bear", "lazy", "lake")],
        "What is the capital of Spain?",
    )
    rose = ("Rose", "owl", "brave", "castle")
    return [
        ("spark", alpaca("What is Apache Spark?"), answers["Apache Spark"]),
        ("spark_instructions", alpaca("What is Apache Spark?", "Instructions"), answers["Apache Spark"]),
        ("capital", alpaca("What is the capital of France?"), "The capital of France is Paris."),
        ("sum", alpaca("What is 7 plus 5?"), "7 plus 5 is 12."),
        ("reverse", alpaca("Reverse the list: red, apple, king."), "king, apple, red."),
        ("count", alpaca("Count from 3 to 12."), numbers),
        ("opposite", alpaca("What is the opposite of hot?"), "The opposite of hot is cold."),
        ("alphabet", alpaca("Say the alphabet."), letters),
        ("definition_inst", "[INST] What is tensor parallelism? [/INST]", answers["tensor parallelism"]),
        ("story", alpaca(story_turn(*rose)[0]), corpus.story(*rose)),
        ("hello_lm", hello, corpus.HELLO[len(hello) :]),
        ("story_continue", leo[:second_end], leo[second_end:]),
        ("turns", spell, "The word star is spelled s-t-a-r."),
        ("long_prompt", spain, "The capital of Spain is Madrid."),
        ("shakespeare", "ROMEO:\n", None),
    ]


def perplexity_text():
    """The same mixture as in training from another seed, the same text for every model."""
    r = random.Random(20240)
    stories = [
        corpus.story(name, animal[0], trait, place)
        for name in corpus.NAMES[:3]
        for animal in corpus.ANIMALS[:3]
        for trait, place in zip(corpus.TRAITS, corpus.PLACES)
    ]
    return "\n".join(corpus.doc(r, stories) for _ in range(170))


# Outputs


def greedy(model, tokenizer, dtype_name, tensors, name, prompt, right):
    """The greedy continuation, step by step, with the margins and the best tokens of each step."""
    ids = tokenizer(prompt).input_ids
    sequence, steps, finish = list(ids), [], "length"
    for index in range(TOKENS_MAX):
        whole = index == 0 and name in WITH_LOGITS
        output = model(torch.tensor([sequence]), use_cache=False, output_hidden_states=whole)
        logits = output.logits[0, -1].float()
        if whole:
            tensors[f"{name}.{dtype_name}.last_logits"] = logits.clone()
            states = torch.stack([state[0, -1].float() for state in output.hidden_states])
            tensors[f"{name}.{dtype_name}.last_hidden_states"] = states
            if dtype_name == "float32":
                tensors[f"{name}.{dtype_name}.logits_all_positions_f16"] = output.logits[0].half()
        values, best = torch.log_softmax(logits, -1).topk(TOP)
        token = int(best[0])
        top = [[int(i), round(float(v), 5)] for i, v in zip(best, values)]
        steps.append(dict(id=token, margin=round(float(values[0] - values[1]), 5), top5=top))
        if token == tokenizer.eos_token_id:
            finish = "stop"
            break
        sequence.append(token)
    before = tokenizer.decode(ids, skip_special_tokens=False)
    text = tokenizer.decode(sequence, skip_special_tokens=False)[len(before) :]
    return dict(
        name=name,
        prompt=prompt,
        input_ids=ids,
        output_ids=sequence[len(ids) :],
        text=text,
        finish_reason=finish,
        min_margin=min(step["margin"] for step in steps),
        correct=is_right(text, right, finish),
        steps=steps,
    )


def is_right(text, right, finish):
    """Whether a text is the right answer, or its beginning where it was cut off; None where there is no right one."""
    if right is None:
        return None
    if finish == "length":
        return (right + " ").lstrip().startswith(text.strip()[:-1].rstrip("\ufffd"))
    return text.strip() == right.strip()


def perplexity(model, ids, begin):
    """Over separate windows; without a begin token the first token of a window is not scored."""
    total, count = 0.0, 0
    for start in range(0, len(ids), PERPLEXITY_WINDOW):
        window = begin + ids[start : start + PERPLEXITY_WINDOW]
        if len(window) < 3:
            continue
        logits = model(torch.tensor([window]), use_cache=False).logits[0, :-1].float()
        scores = torch.log_softmax(logits, -1).gather(1, torch.tensor(window[1:])[:, None])
        total -= scores.double().sum().item()
        count += len(window) - 1
    return dict(nll_sum=round(total, 4), tokens=count, perplexity=round(math.exp(total / count), 6))


def tokenizer_cases(tokenizer):
    """Awkward strings there and back, and one rendered chat."""
    cases = []
    for text in AWKWARD:
        ids, plain = tokenizer(text).input_ids, tokenizer(text, add_special_tokens=False).input_ids
        decoded, skipped = tokenizer.decode(plain), tokenizer.decode(ids, skip_special_tokens=True)
        cases.append(dict(text=text, ids=ids, ids_no_special=plain, decoded=decoded, decoded_skip=skipped))
    chat = [{"role": "user", "content": "What is a token?"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return cases + [dict(chat=chat, rendered=rendered)]


def report(name, records, perplexities):
    pairs = list(zip(records["float32"], records["bfloat16"]))
    same = sum(a["output_ids"] == b["output_ids"] for a, b in pairs)
    print(f"{name}: same greedy ids in f32 and bf16: {same}/{len(pairs)}; perplexity {perplexities}")
    for a, b in pairs:
        lengths = f"in {len(a['input_ids'])} out {len(a['output_ids'])} {a['finish_reason']}"
        margins = f"margin f32 {a['min_margin']:.3f} bf16 {b['min_margin']:.3f}"
        print(f"  {a['name']:18s} {lengths:22s} {margins} correct {a['correct']} {a['text'][:90]!r}")


if __name__ == "__main__":
    if len(sys.argv) != 3 and sys.argv[3:] != ["embeddings"]:
        sys.exit(__doc__)
    main(*sys.argv[1:])
