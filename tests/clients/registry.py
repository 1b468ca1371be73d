"""A real MLflow tracking server of this machine, with the tiny models logged and registered as the documentation shows."""

import os
import socket
import sys

import requests

from golden import MODELS
from processes import Process, until

START_LIMIT_S = 120
# What the documentation gives as input; the names it registers models under.
INPUT_EXAMPLE = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nWhat is Apache Spark?\n\n### Response:\n"
]
CATALOG = "ml.llm-catalog"
# The page's model name and version.
PAGE_MODEL, PAGE_VERSION = f"{CATALOG}.llama-13b", 3
TASK = "llm/v1/completions"


class Registry:
    """The running server at `url`."""

    def __init__(self, folder):
        folder.mkdir(parents=True)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
            *("--artifacts-destination", folder / "artifacts", "--serve-artifacts"),
        ]
        self.process = Process("mlflow", command, folder, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})

    def wait(self):
        until("the MLflow server", START_LIMIT_S, self.answers)
        os.environ["MLFLOW_TRACKING_URI"] = os.environ["MLFLOW_REGISTRY_URI"] = self.url

    def answers(self):
        self.process.check_alive()
        try:
            return requests.get(f"{self.url}/health", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    def stop(self):
        self.process.stop()


def log_models():
    """Logs the tiny models as the documentation shows, and gives their versions by the last part of their names."""
    import mlflow

    versions = {}
    for name in ("tiny-llama", "tiny-mistral", "tiny-mpt"):
        versions[name] = log_model(name, f"{CATALOG}.{name}", task=TASK, metadata={"task": TASK})
    # As somebody logs it who has not read that the task matters.
    versions["no-task"] = log_model("tiny-llama", f"{CATALOG}.no-task", task="text-generation")
    # The page's model has three versions.
    versions["page"] = log_model("tiny-llama", PAGE_MODEL, task=TASK, metadata={"task": TASK})
    source = mlflow.MlflowClient().get_model_version(PAGE_MODEL, str(versions["page"])).source
    while versions["page"] < PAGE_VERSION:
        versions["page"] = int(mlflow.register_model(source, PAGE_MODEL).version)
    return versions


def log_model(folder, registered_name, **described):
    """The documentation's own call, with a model of ours; gives the registered version.

    Today's MLflow wants the task as an argument beside the metadata. Without `pip_requirements` it would run the model in
    another environment, to see what it imports.
    """
    import mlflow
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODELS / folder, torch_dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / folder)
    with mlflow.start_run():
        components = {"model": model, "tokenizer": tokenizer}
        info = mlflow.transformers.log_model(
            artifact_path="model",
            transformers_model=components,
            input_example=INPUT_EXAMPLE,
            registered_model_name=registered_name,
            pip_requirements=["torch", "transformers"],
            **described,
        )
    return int(info.registered_model_version)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
