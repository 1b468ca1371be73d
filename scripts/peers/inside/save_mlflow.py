"""Runs inside an environment with mlflow: save_mlflow.py MODEL_DIR OUT_DIR. See ../mlflow.py."""

import sys

import mlflow.transformers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TASK = "llm/v1/completions"

folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16)
parts = {"model": model, "tokenizer": AutoTokenizer.from_pretrained(folder)}
# Named, since what it would find by itself wants torchvision.
needs = ["torch", "transformers"]
mlflow.transformers.save_model(parts, out, task=TASK, metadata={"task": TASK}, pip_requirements=needs)
