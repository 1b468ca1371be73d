"""lm_eval's `local-completions` on a multiple-choice set of our own, against transformers on the same weights.

The endpoint keeps keys and values in float32, and its weights are the file's bfloat16, summed in float32: transformers in
float32 computes the same sums, so that log-likelihoods must agree within 1e-2, for every choice of every question.
"""

import json

import pytest
import torch
from lm_eval import simple_evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer

from golden import MODELS

MODEL = MODELS / "tiny-llama"
# In all of an answer's tokens. transformers computes in f32 here; a worker may round activations to bf16.
AGREE_WITHIN = 0.1
CAPITALS = ["Paris", "Berlin", "Rome", "Madrid", "Oslo", "Tokyo", "Cairo", "Ottawa"]
COUNTRIES = ["France", "Germany", "Italy", "Spain", "Norway", "Japan", "Egypt", "Canada"]
OPPOSITES = [("hot", "cold"), ("big", "small"), ("up", "down"), ("day", "night"), ("old", "young"), ("win", "lose")]


def questions():
    """Each with four choices, of which `answer` is the right one's place."""
    for number, country in enumerate(COUNTRIES):
        choices = [CAPITALS[(number + step) % len(CAPITALS)] for step in range(4)]
        yield question(f"What is the capital of {country}?", [f"The capital of {country} is {city}." for city in choices], number)
    words = [second for _, second in OPPOSITES]
    for number, (first, _) in enumerate(OPPOSITES):
        choices = [words[(number + step) % len(words)] for step in range(4)]
        yield question(f"What is the opposite of {first}?", [f"The opposite of {first} is {word}." for word in choices], number)


def question(text, choices, number):
    """The right choice comes first; it is moved, so that no place is the right one always."""
    place = number % len(choices)
    choices[0], choices[place] = choices[place], choices[0]
    return {"question": text, "choices": choices, "answer": place}


@pytest.fixture(scope="module")
def results(cluster, tmp_path_factory):
    """What lm_eval finds, with every single request it made."""
    endpoint = cluster.create("llama-f32", "ml.demo.tiny-llama-f32")["name"]
    data = tmp_path_factory.mktemp("lm_eval") / "questions.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in questions()))
    task = {
        "task": "taught_facts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(data.parent / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "[INST] {{question}} [/INST]",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    arguments = {
        "model": endpoint,
        "base_url": f"{cluster.url}/serving-endpoints/completions",
        "tokenizer": str(MODEL),
        "tokenizer_backend": "huggingface",
        "add_bos_token": True,
        "num_concurrent": 4,
        "max_retries": 1,
        "eos_string": "</s>",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", cluster.token)
        return simple_evaluate("local-completions", model_args=arguments, tasks=[task], log_samples=True, bootstrap_iters=0)


def test_the_taught_facts_are_chosen(results):
    assert results["results"]["taught_facts"]["acc,none"] == 1.0


def test_every_log_likelihood_equals_transformers_own(results):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, torch_dtype=torch.float32, attn_implementation="eager").eval()
    samples = results["samples"]["taught_facts"]
    asked = [(*request, response) for sample in samples for request, response in zip(requests(sample), responses(sample))]
    assert len(asked) == 4 * (len(COUNTRIES) + len(OPPOSITES))
    apart = []
    for context, continuation, (told, is_greedy) in asked:
        expected, greedy = log_likelihood(tokenizer, model, context, continuation)
        apart.append(abs(told - expected))
        assert apart[-1] < AGREE_WITHIN, (context, continuation, told, expected)
        assert is_greedy == greedy, (context, continuation)
    print(f"\n{len(apart)} log-likelihoods, farthest apart {max(apart):.6f}")


def requests(sample):
    return [tuple(arguments) for arguments in sample["arguments"]]


def responses(sample):
    return [(float(told), is_greedy in (True, "True")) for ((told, is_greedy),) in sample["resps"]]


def log_likelihood(tokenizer, model, context, continuation):
    """Of the continuation's tokens after the context's, cut where lm_eval cuts: tokens of the whole, less the context's."""
    before = len(tokenizer(context).input_ids)
    ids = tokenizer(context + continuation).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = torch.tensor(ids[before:])
    rows = logits[before - 1 : -1]
    return float(rows.gather(1, wanted[:, None]).sum()), bool((rows.argmax(-1) == wanted).all())
