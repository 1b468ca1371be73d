"""A real cluster of this machine's programs: a coordinator and workers on free ports, in a folder of their own."""

import hashlib
import os
import pathlib
import re
import secrets
import shutil

import requests

from golden import MODELS
from processes import Process, until

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
START_LIMIT_S = 60
DEPLOY_LIMIT_S = 120
WORKERS = 3
USERS = ("ann", "bob")

HEAD = """
[coordinator]
listen = "127.0.0.1:0"
worker_listen = "127.0.0.1:0"

[auth]
worker_secret_file = "var/worker.secret"

[[auth.tokens]]
user = "admin"
file = "var/admin.token"

[[nodes]]
name = "local"
"""

TYPES = """
[[workload_types]]
name = "CPU"
device = "cpu"
shards = 1

[[workload_types]]
name = "GPU_LARGE"
device = "cpu"
shards = 1
stands_in_for = "1 x A100 80 GB"

[[workload_types]]
name = "GPU_LARGE_2"
device = "cpu"
shards = 2
stands_in_for = "2 x A100 80 GB"
"""

EMBEDDINGS = """
flavors:
  transformers:
    task: feature-extraction
    model_binary: model
    components: [tokenizer]
metadata:
  task: llm/v1/embeddings
"""


class Cluster:
    """The running cluster: `url`, `token` of the administrator, and `tokens` of other users."""

    def __init__(self, folder):
        self.folder, self.logs = folder, folder / "logs"
        self.tokens = {user: secrets.token_hex(16) for user in USERS}
        self.processes = []
        self.logs.mkdir(parents=True)

    def start(self, extra=""):
        (self.folder / "cluster.toml").write_text(self.toml() + extra)
        coordinator = self.run("coordinator")
        line = until("the coordinator's ports", START_LIMIT_S, lambda: self.ready_line(coordinator))
        http, links = (re.search(rf"\b{key}=\"?([\d.:]+)", line).group(1) for key in ("http", "workers"))
        # Workers learn the port that the coordinator was given.
        (self.folder / "cluster.local.toml").write_text(f'[coordinator]\nworker_listen = "{links}"\n')
        self.url = f"http://{http}"
        self.token = (self.folder / "var/admin.token").read_text().strip()
        for index in range(WORKERS):
            self.run("worker", "--device", f"local/cpu{index}")
        until(f"{WORKERS} workers", START_LIMIT_S, lambda: self.health().get("workers") == WORKERS)

    def ready_line(self, coordinator):
        coordinator.check_alive()
        return next((line for line in coordinator.text().splitlines() if "coordinator ready" in line), None)

    def run(self, program, *arguments):
        programs = pathlib.Path(os.environ.get("TANDEM_PROGRAMS", ROOT / "target/debug")).resolve()
        name = "-".join([program, *arguments[1:]])
        command = [programs / program, "--config", self.folder / "cluster.toml", *arguments]
        # Colours and the caller's own settings would change what is read here.
        process = Process(name, command, self.logs, {"NO_COLOR": "1", "TANDEM_LOG": "info"})
        self.processes.append(process)
        return process

    def stop(self):
        for process in reversed(self.processes):
            process.stop()

    def toml(self):
        lines = [HEAD]
        for index in range(WORKERS):
            lines.append(f'[[nodes.devices]]\nname = "cpu{index}"\nkind = "cpu"\nmemory = "1GiB"\nthreads = 1\n')
        lines.append(TYPES)
        for user, token in self.tokens.items():
            digest = hashlib.sha256(token.encode()).hexdigest()
            lines.append(f'[[auth.tokens]]\nuser = "{user}"\nsha256 = "{digest}"\n')
        for name in ("tiny-llama", "tiny-mistral", "tiny-mpt"):
            lines.append(model(f"ml.demo.{name}", MODELS / name))
        lines.append(model("ml.demo.tiny-llama-f32", MODELS / "tiny-llama", kv_dtype="f32"))
        lines.append(model("ml.demo.tiny-llama-embeddings", self.embedding_model()))
        return "\n".join(lines)

    def embedding_model(self):
        """A folder as MLflow logs a model whose task is embeddings."""
        folder = self.folder / "embeddings"
        for part in ("model", "components/tokenizer"):
            shutil.copytree(MODELS / "tiny-llama", folder / part)
        (folder / "MLmodel").write_text(EMBEDDINGS)
        return folder

    def health(self):
        for process in self.processes:
            process.check_alive()
        return requests.get(f"{self.url}/health", timeout=10).json()

    # The API, as a program of one's own would call it.

    def call(self, method, path, body=None, token=None):
        headers = {"Authorization": f"Bearer {token or self.token}"}
        return requests.request(method, self.url + path, json=body, headers=headers, timeout=120)

    def create(self, name, model, version=1, **entity):
        """Creates an endpoint of one served entity and waits until it is ready."""
        served = {
            "entity_name": model,
            "entity_version": version,
            "workload_size": "Medium",
            "workload_type": "CPU",
            "scale_to_zero_enabled": False,
            **entity,
        }
        answer = self.call("POST", "/api/2.0/serving-endpoints", {"name": name, "config": {"served_entities": [served]}})
        assert answer.status_code == 200, answer.text
        return self.wait_ready(name)

    def wait_ready(self, name):
        def look():
            view = self.call("GET", f"/api/2.0/serving-endpoints/{name}").json()
            assert view["state"]["config_update"] != "UPDATE_FAILED", view
            return view if view["state"] == {"ready": "READY", "config_update": "NOT_UPDATING"} else None

        return until(f"endpoint {name} to be ready", DEPLOY_LIMIT_S, look)

    def invoke(self, name, body, **named):
        return self.call("POST", f"/serving-endpoints/{name}/invocations", body, **named)


def model(name, path, **settings):
    lines = ["[[models]]", f'name = "{name}"', "version = 1", f'path = "{path}"']
    return "\n".join(lines + [f'{key} = "{value}"' for key, value in settings.items()]) + "\n"
