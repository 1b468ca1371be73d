"""A cluster of its own for a measurement: one coordinator, one worker with all threads, in a folder that goes with it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

CODE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
START_LIMIT_S = 60
READY_LIMIT_S = 600
STOP_LIMIT_S = 30
LOOK_EVERY_S = 0.02
REQUEST_LIMIT_S = 300
PACKED_LIMIT_S = 120


def built(name):
    return os.path.join(CODE, "target", "release", name)


def run(*command, **environment):
    """Runs a program that must end well; what it prints is shown."""
    sys.stdout.flush()
    # What a program says of its failure is enough.
    ended = subprocess.run(command, cwd=CODE, env={**os.environ, "RUST_BACKTRACE": "0", **environment})
    if ended.returncode != 0:
        raise Failed(f"failed with {ended.returncode}: {' '.join(command)}")


def output_of(*command, **environment):
    """What a program that must end well prints."""
    ended = subprocess.run(command, cwd=CODE, capture_output=True, text=True, env={**os.environ, **environment})
    if ended.returncode != 0:
        raise Failed(f"failed with {ended.returncode}: {' '.join(command)}\n{ended.stderr.strip()}")
    return ended.stdout


def random_model(size, family="llama"):
    """A random checkpoint's folder, made where it is missing."""
    folder = os.path.join(CODE, "var", "models", f"{family}-{size}")
    if not os.path.exists(os.path.join(folder, "tokenizer.json")):
        print(f"making a {family} of {size} random parameters in {folder}", flush=True)
        run(sys.executable, os.path.join(CODE, "scripts", "make_random_model"), "--size", size, "--family", family,
            "--out", folder)
    # Peers keep what they make of a model under its path: a folder that is linked is the same one.
    return os.path.realpath(folder)


class Failed(Exception):
    """A measurement that could not be made."""


class Cluster:
    """Models by name, all served by one worker; ends with its `with`."""

    def __init__(self, models, threads, quantization="none"):
        self.models, self.threads, self.quantization = models, threads, quantization
        self.folder, self.processes = None, {}

    def __enter__(self):
        self.folder = tempfile.mkdtemp(prefix="tandem-bench-")
        try:
            self.write_config()
            config = os.path.join(self.folder, "cluster.toml")
            ready = self.start("coordinator", [built("coordinator"), "--config", config], "coordinator ready")
            http, workers = (re.search(rf"{key}=(\S+)", ready).group(1) for key in ("http", "workers"))
            with open(os.path.join(self.folder, "cluster.local.toml"), "w") as file:
                file.write(f'[coordinator]\nlisten = "{http}"\nworker_listen = "{workers}"\n')
            self.start("worker", [built("worker"), "--config", config, "--device", "local/cpu0"], "worker ready")
            self.url = f"http://{http}"
            with open(os.path.join(self.folder, "admin.token")) as file:
                self.token = file.read().strip()
            self.wait("the worker to join", lambda: self.call("GET", "/health").get("workers") == 1, START_LIMIT_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in reversed(list(self.processes.values())):
            process.terminate()
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def write_config(self):
        lines = ['[coordinator]', 'listen = "127.0.0.1:0"', 'worker_listen = "127.0.0.1:0"', 'data_dir = "data"',
                 '[auth]', 'worker_secret_file = "worker.secret"',
                 '[[auth.tokens]]', 'user = "bench"', 'file = "admin.token"',
                 '[[nodes]]', 'name = "local"',
                 '[[nodes.devices]]', 'name = "cpu0"', 'kind = "cpu"', f'threads = {self.threads}',
                 '[[workload_types]]', 'name = "CPU"', 'device = "cpu"', 'shards = 1']
        for name, path in self.models.items():
            lines += ['[[models]]', f'name = "ml.bench.{name}"', 'version = 1', f'path = {json.dumps(os.path.abspath(path))}']
            if self.quantization != "none":
                lines.append(f'quantization = "{self.quantization}"')
        with open(os.path.join(self.folder, "cluster.toml"), "w") as file:
            file.write("\n".join(lines) + "\n")

    def start(self, name, command, mark):
        """Starts a program and gives the line of its output that begins with `mark`."""
        out, err = (os.path.join(self.folder, f"{name}.{kind}") for kind in ("out", "err"))
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            # All on as many processors as the engine has threads, as peers are.
            cores = sorted(os.sched_getaffinity(0))[: self.threads]
            self.processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                                                    preexec_fn=lambda: os.sched_setaffinity(0, cores))
        found = []

        def ready():
            if self.processes[name].poll() is not None:
                with open(err, errors="replace") as file:
                    raise Failed(f"{name} ended:\n{file.read()[-2000:]}")
            with open(out, errors="replace") as file:
                found[:] = [line for line in file if line.startswith(mark) and line.endswith("\n")]
            return found

        self.wait(f"{name} to start", ready, START_LIMIT_S)
        return found[0]

    def wait(self, what, ready, limit_s):
        started = time.monotonic()
        while not ready():
            if time.monotonic() - started > limit_s:
                raise Failed(f"waited {limit_s} s for {what}")
            time.sleep(LOOK_EVERY_S)
        return time.monotonic() - started

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_LIMIT_S) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise Failed(f"{method} {path}: {error.code} {error.read().decode(errors='replace')}") from None

    def last_words(self):
        """The end of what each process logged."""
        told = []
        for name in self.processes:
            with open(os.path.join(self.folder, f"{name}.err"), errors="replace") as file:
                told.append(f"{name}:\n{file.read()[-2000:]}")
        return "\n".join(told)

    @property
    def pid(self):
        """The worker's: where the work is done."""
        return self.processes["worker"].pid

    @property
    def pids(self):
        return [process.pid for process in self.processes.values()]


class Endpoint:
    """A model that is served under its name."""

    def __init__(self, cluster, name):
        self.cluster, self.name = cluster, name
        self.path = f"/api/2.0/serving-endpoints/{name}"

    def create(self):
        entity = {"name": "served", "entity_name": f"ml.bench.{self.name}", "entity_version": "1", "workload_type": "CPU",
                  "workload_size": "Large", "scale_to_zero_enabled": False}
        body = {"name": self.name, "config": {"served_entities": [entity]}}
        self.posted = time.monotonic()
        self.cluster.call("POST", "/api/2.0/serving-endpoints", body)

    def wait_ready(self):
        """Seconds from the request that created it."""
        def ready():
            view = self.cluster.call("GET", self.path)
            if view["state"]["config_update"] == "UPDATE_FAILED":
                config = view.get("pending_config") or view["config"]
                raise Failed(config["served_entities"][0]["state"]["deployment_state_message"])
            return view["state"]["ready"] == "READY" and view["state"]["config_update"] == "NOT_UPDATING"

        self.cluster.wait(f"{self.name} to be READY", ready, READY_LIMIT_S)
        return time.monotonic() - self.posted

    def delete(self):
        self.cluster.call("DELETE", self.path)

    def start_again(self):
        """Seconds that a second deployment of the same version takes, from its request to READY."""
        # It finds packed weights once they are written.
        written = "packed weights written"
        self.cluster.wait("packed weights to be written", lambda: written in self.build_log(), PACKED_LIMIT_S)
        self.delete()
        self.create()
        return self.wait_ready()

    def build_log(self):
        return self.cluster.call("GET", f"{self.path}/served-models/served/build-logs")["logs"]

    def load(self, label, *arguments):
        """Sends a load; gives its report."""
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "report.json")
            words = list(arguments)
            for at, word in enumerate(words):
                if word == "--json":
                    file = words[at + 1]
                elif word.startswith("--json="):
                    file = word.removeprefix("--json=")
            words += ["--json", file]
            pids = [word for pid in self.cluster.pids for word in ("--pid", str(pid))]
            url = f"{self.cluster.url}/serving-endpoints/completions"
            try:
                run(built("tandem-bench"), "load", "--url", url, "--model", self.name, "--label", label, *pids, *words,
                    TANDEM_TOKEN=self.cluster.token)
            except Failed as failed:
                raise Failed(f"{failed}\n{self.cluster.last_words()}") from None
            with open(file) as report:
                return json.load(report)
