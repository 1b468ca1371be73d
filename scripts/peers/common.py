"""What the peers' scripts share: the verbs, virtual environments, and a server's life.

A peer is another program that serves the same weights on the same processors, for comparison. Each has a script here:

    NAME.py setup                        fetches and builds it, once (minutes, and gigabytes of disk)
    NAME.py start --model DIR            starts its server; prints "URL PID SECONDS" as the last line when it answers
            [--form bf16|q8_0|q4_0] [--threads 2] [--port P]
    NAME.py stop                         stops it
    NAME.py bench --model DIR            "prefill_512 X" and "decode_1 Y": tokens per second without a server, or through
            [--form ...] [--threads 2]   one that runs already or is started for it

Everything is kept in var/peers: delete that folder and nothing is left. A server is the leader of its own process group,
with PID as the group's number, and runs on as many processors as it has threads.
"""

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PEERS = os.path.join(ROOT, "var", "peers")
INSIDE = os.path.join(ROOT, "scripts", "peers", "inside")
CUDA_STUBS = os.path.join(ROOT, "scripts", "models", "cuda_stubs.py")
# transformers, mlflow and torch: the environment of tests/clients has them, pinned and without CUDA's gigabytes.
CLIENTS = os.environ.get("TANDEM_CLIENTS_VENV", os.path.join(ROOT, "target", "clients-venv"))
FORMS = ("bf16", "q8_0", "q4_0")
# The largest model is read from a slow disk and compiled for (vLLM).
START_LIMIT_S = 600
STOP_LIMIT_S = 20
LOOK_EVERY_S = 0.2


class Peer:
    """One of them. Subclasses say how it is set up, served and measured."""

    name = ""
    forms = ("bf16",)
    verbs = ("setup", "start", "stop", "bench")

    def __init__(self):
        self.folder = os.path.join(PEERS, self.name)

    def setup(self):
        raise NotImplementedError

    def server(self, asked):
        """Command, further environment, and the path that answers once the server is ready."""
        sys.exit(f"{self.name} has no server of its own")

    def bench(self, asked):
        """Figures by name. None for a peer that its server alone shows."""
        return {}

    def run(self):
        asked = arguments(self)
        os.makedirs(self.folder, exist_ok=True)
        if asked.verb == "setup":
            self.setup()
        elif asked.verb == "start":
            print(*self.start(asked), flush=True)
        elif asked.verb == "stop":
            stop(self.folder)
        elif asked.verb == "bench":
            for figure, tokens_per_s in self.bench(asked).items():
                print(f"{figure} {tokens_per_s:.2f}")
        else:
            getattr(self, asked.verb)(asked)

    def start(self, asked):
        """Starts the server, and gives its URL, its process and the seconds it took until it answered."""
        stop(self.folder)
        asked.port = asked.port or free_port()
        command, environment, ready = self.server(asked)
        url = f"http://127.0.0.1:{asked.port}"
        log_path = os.path.join(self.folder, "server.log")
        began = time.monotonic()
        with open(log_path, "wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                cwd=self.folder,
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, processors(asked.threads)),
            )
        with open(record(self.folder), "w") as file:
            json.dump({"pid": process.pid, "born": born(process.pid), "url": url, "serves": served(asked)}, file)
        deadline = began + START_LIMIT_S
        while not answers(url + ready):
            if process.poll() is not None or time.monotonic() > deadline:
                how = "ended" if process.poll() is not None else f"did not answer within {START_LIMIT_S} s"
                stop(self.folder)
                sys.exit(f"{self.name}'s server {how}: see {log_path}")
            time.sleep(LOOK_EVERY_S)
        return url, process.pid, f"{time.monotonic() - began:.1f}"

    def running(self, asked):
        """The URL of its server, if that runs and serves what is asked for."""
        server = recorded(self.folder)
        return server["url"] if server and server["serves"] == served(asked) else None


def served(asked):
    return [asked.model, asked.form, asked.threads]


def arguments(peer):
    parser = argparse.ArgumentParser(prog=f"{peer.name}.py", description=f"{peer.name} as a peer; see common.py")
    parser.add_argument("verb", choices=peer.verbs)
    parser.add_argument("--model", help="a folder in Hugging Face's layout, or a GGUF file for llama.cpp")
    parser.add_argument("--form", choices=FORMS, default="bf16", help="how its weights are kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--port", type=int, help="of its server; a free one where it is left out")
    asked = parser.parse_args()
    if asked.verb not in ("setup", "stop"):
        if not asked.model or not os.path.exists(asked.model):
            parser.error(f"--model: there is no {asked.model}")
        if asked.form not in peer.forms:
            parser.error(f"--form: {peer.name} keeps weights as {', '.join(peer.forms)} here")
        asked.model = os.path.abspath(asked.model)
    return asked


# Environments


def run(*command, **options):
    if subprocess.run(command, **options).returncode != 0:
        sys.exit(f"failed: {' '.join(command)}")


def environment(folder):
    """A virtual environment without pip: pip installs into it from outside, and Debian's python3 has no ensurepip."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode != 0:
        sys.exit("python3 has no pip (Debian: apt install python3-pip)")
    python = os.path.join(folder, "bin", "python")
    if not os.path.exists(python):
        run(sys.executable, "-m", "venv", "--without-pip", folder)
    return python


def install(python, *what):
    quiet = ("--quiet", "--disable-pip-version-check", "--progress-bar", "off")
    run(sys.executable, "-m", "pip", "--python", python, "install", *quiet, *what)


def resolve(python, *what):
    """What pip would install, as exact requirements."""
    quiet = ("--quiet", "--disable-pip-version-check", "--dry-run", "--report", "-")
    command = [sys.executable, "-m", "pip", "--python", python, "install", *quiet, *what]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if told.returncode != 0:
        sys.exit(f"pip cannot resolve {' '.join(what)}")
    found = [one["metadata"] for one in json.loads(told.stdout)["install"]]
    return [f"{one['name']}=={one['version']}" for one in found]


def stub_cuda(python):
    """Lets PyPI's torch import without the CUDA libraries that it links."""
    code = 'import sysconfig; print(sysconfig.get_path("purelib"))'
    packages = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    run(sys.executable, CUDA_STUBS, os.path.join(packages, "torch", "lib"), stdout=subprocess.DEVNULL)


def clients():
    """The Python of the environment that has transformers, mlflow and torch."""
    run(os.path.join(ROOT, "scripts", "clients"), "--setup")
    return os.path.join(CLIENTS, "bin", "python")


def made_from(folder, model, suffix):
    """Where something made from a model is kept: under its name, its folder's and its files' mark."""
    mark = hashlib.sha256(model.encode())
    for name in sorted(os.listdir(model)):
        state = os.stat(os.path.join(model, name))
        mark.update(f"{name} {state.st_size} {state.st_mtime_ns}\n".encode())
    models = os.path.join(folder, "models")
    os.makedirs(models, exist_ok=True)
    return os.path.join(models, f"{os.path.basename(model)}-{mark.hexdigest()[:8]}{suffix}")


# Servers


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def processors(count):
    """The first processors that this process may use, one for each thread."""
    return set(sorted(os.sched_getaffinity(0))[:count])


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError):
        return False


def record(folder):
    return os.path.join(folder, "server.json")


def born(pid):
    """When a process was started, by the kernel's clock: a number that comes again later is another process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        return None


def recorded(folder):
    """What is known of the server that runs; none where none does."""
    try:
        with open(record(folder)) as file:
            server = json.load(file)
    except FileNotFoundError:
        return None
    return server if born(server["pid"]) == server["born"] else None


def stop(folder):
    """Ends the server and all that it started. None is fine."""
    server = recorded(folder)
    if os.path.exists(record(folder)):
        os.remove(record(folder))
    if not server:
        return
    pid = server["pid"]
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(pid, sent)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + STOP_LIMIT_S
        while group_lives(pid) and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)


def group_lives(group):
    """Whether a process of a group is there that is more than an unread exit status."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as file:
                state, _parent, its_group = file.read().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


def timed_over_http(url, model, prompt_tokens=512, output_tokens=64, tries=3):
    """Prefill and decode of one stream, from a server of OpenAI's completions that takes token ids."""

    def seconds(prompt, tokens):
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        made = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        began = time.monotonic()
        with urllib.request.urlopen(made, timeout=START_LIMIT_S) as response:
            usage = json.load(response)["usage"]
        assert usage["completion_tokens"] == tokens, usage
        return time.monotonic() - began

    # Other ids at each try and each time: nothing of them is in a prefix cache, not even of an earlier round.
    begin = int(time.time())

    def prompt(number, length):
        return [3 + (begin * 104729 + number * 7919 + 31 * place) % 30000 for place in range(length)]

    seconds(prompt(99, 16), 4)
    prefill = min(seconds(prompt(number, prompt_tokens), 1) for number in range(tries))
    decode = []
    for number in range(tries):
        first = seconds(prompt(10 + number, 16), 1)
        decode.append(seconds(prompt(20 + number, 16), 1 + output_tokens) - first)
    return {"prefill_512": prompt_tokens / prefill, "decode_1": output_tokens / min(decode)}
