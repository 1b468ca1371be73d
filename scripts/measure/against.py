"""This system and a peer under the same load, in turn, on the same weights: A B A B, then ratios of the medians.

Both servers run all the while; the one that is not asked waits for requests. scripts/peers sets a peer up.
"""

import os
import subprocess
import sys

from cluster import CODE, Cluster, Endpoint, Failed, built, output_of, run

# The peer's file in scripts/peers, its route, how it is asked, and the clients that it is compared at.
PEERS = {
    "llama.cpp": ("llama_cpp", "/v1/completions", "openai", (1, 8)),
    "vllm": ("vllm", "/v1/completions", "openai", (1, 8, 32)),
    "mlflow": ("mlflow", "/invocations", "mlflow", (16,)),
    "transformers": ("transformers", None, None, ()),
}
ENDPOINT = "bench"
OUT = os.path.join(CODE, "var", "bench")
# Prompts that only measure a stream's beginning and its end.
STREAM = ("--prompt", "512", "--batch", "1", "--context", "64")


def main(options, model, load):
    file, route, api, clients = PEERS[options.against]
    peer = Peer(os.path.join(CODE, "scripts", "peers", f"{file}.py"), model, options)
    peer.call("setup")
    ours, weights = model, options.quantization
    if options.form != "bf16" and options.quantization == "none":
        # The very same quantised weights.
        ours = peer.call("gguf").strip().splitlines()[-1]
        weights = "none"
    if api != "mlflow":
        streams(options, peer, ours, weights)
    if route is None:
        return
    with Cluster({ENDPOINT: ours}, options.threads, weights) as cluster, peer:
        endpoint = Endpoint(cluster, ENDPOINT)
        endpoint.create()
        endpoint.wait_ready()
        if any(word.startswith(("--clients", "--rate")) for word in load):
            compare(options, endpoint, peer, route, api, "load", load)
            return
        for count in clients:
            compare(options, endpoint, peer, route, api, f"{count} clients", ["--clients", str(count), *load])


class Peer:
    """A peer's server while its `with` lasts."""

    def __init__(self, script, model, options):
        self.script, self.form = script, options.form
        self.arguments = ["--model", model, "--form", options.form, "--threads", str(options.threads)]

    def call(self, verb):
        """What the peer's script prints; what it says on the way is shown."""
        sys.stdout.flush()
        command = [sys.executable, self.script, verb, *self.arguments]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if ended.returncode != 0:
            raise Failed(f"failed with {ended.returncode}: {' '.join(command)}")
        return ended.stdout

    def __enter__(self):
        self.url, self.pid = self.call("start").strip().splitlines()[-1].split()
        return self

    def __exit__(self, *_):
        self.call("stop")


def streams(options, peer, ours, weights):
    """A prompt of 512 tokens and one stream of decodes, without HTTP, where the peer has a program for that."""
    theirs, mine = [], []
    for _ in range(options.rounds):
        theirs.append(dict(line.split() for line in peer.call("bench").strip().splitlines() if len(line.split()) == 2))
        form = weights.replace("none", "bf16")
        lines = output_of(built("examples/steps"), ours, "--weights", form, "--threads", str(options.threads), *STREAM)
        values = [dict(pair.split("=", 1) for pair in line.split()[1:]) for line in lines.splitlines()
                  if line.startswith(("prefill", "decode"))]
        mine.append({"prefill_512": values[0]["tokens_per_s"], "decode_1": values[1]["tokens_per_s"]})
    print(f"\ntandem against {options.against} {options.form}, without HTTP: tokens/s, medians of {options.rounds} rounds")
    for name in ("prefill_512", "decode_1"):
        a, b = (median([float(values[name]) for values in rounds if name in values]) for rounds in (mine, theirs))
        print(f"{name:<28} {a:12.2f} {b:12.2f} {a / b if b else 0:8.2f}", flush=True)


def median(values):
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2 if values else 0.0


def compare(options, endpoint, peer, route, api, label, load):
    """A B A B, each round with prompts of its own: what a server has seen before it may have kept."""
    ours, theirs = [], []
    # Texts where the peer takes no token ids, for both.
    prompts = ["--prompts", "text"] if api == "mlflow" else []
    for number in range(options.rounds):
        seed = ["--seed", str(1000 + number), *prompts]
        name = f"{options.against}-{options.form}-{label.replace(' ', '-')}-{number}"
        ours.append(os.path.join(OUT, f"{name}-ours.json"))
        endpoint.load(f"tandem, {label}", *load, *seed, "--json", ours[-1])
        theirs.append(os.path.join(OUT, f"{name}-theirs.json"))
        run(built("tandem-bench"), "load", "--url", peer.url + route, "--api", api, "--model", "model", "--pid",
            peer.pid, "--label",
            f"{options.against}, {label}", *load, *seed, "--json", theirs[-1])
    print(f"\ntandem against {options.against} {options.form}, {label}")
    run(built("tandem-bench"), "compare", "--ours", *ours, "--theirs", *theirs)
    picture = os.path.join(OUT, f"{options.against}-{options.form}-{label.replace(' ', '-')}.svg")
    run(built("tandem-bench"), "plot", picture, *ours, *theirs)
