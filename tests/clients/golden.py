"""What transformers answers to the prompts of tests/models/golden: the truth that clients' answers are compared with."""

import json
import pathlib

MODELS = pathlib.Path(__file__).resolve().parent.parent / "models"
# As many as the goldens were made with.
TOKENS_MAX = 64


class Golden:
    """A prompt, its tokens, and the greedy continuation."""

    def __init__(self, record):
        self.prompt, self.text = record["prompt"], record["text"]
        self.input_ids, self.output_ids = record["input_ids"], record["output_ids"]


def golden(model, name):
    records = json.loads((MODELS / "golden" / model / "golden.json").read_text())["bfloat16"]
    return Golden(next(record for record in records if record["name"] == name))


# Questions of the chat form that the tiny models were taught; see scripts/models/corpus.py.
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
