"""This system and a peer under the same load, in turn, on the same weights: A B A B, then ratios of the medians.

All servers run all the while; those that are not asked wait for requests. scripts/peers sets a peer up. The table, reports
and pictures are in var/bench.
"""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass

from cluster import CODE, Cluster, Endpoint, Failed, built, output_of, run

OUT = os.path.join(CODE, "var", "bench")
ENDPOINT = "bench"
# Each load takes a peer of some ten tokens a second a minute or two.
SHORT = ("--prompt", "128", "--output", "32")
ONE = ("1 client", *SHORT, "--clients", "1", "--requests", "3")
EIGHT = ("8 clients", *SHORT, "--clients", "8", "--requests", "16")
MANY = ("32 clients", *SHORT, "--clients", "32", "--requests", "32")
LONG_ANSWERS = ("16 clients, 64 in, 128 out", "--prompt", "64", "--output", "128", "--clients", "16", "--requests", "16")
LONG_PROMPTS = ("16 clients, 128 in, 32 out", *SHORT, "--clients", "16", "--requests", "16")
# What a peer's `bench` calls what it measures, and what the table calls it.
STREAMS = {
    "prefill_512": "prefill 512, tokens/s",
    "decode_1": "decode, 1 stream, tokens/s",
    "decode_8": "decode, batch of 8, tokens/s",
}
# Prompts that only measure a stream's beginning and its end.
STREAM = ("--prompt", "512", "--batch", "1,8", "--context", "64")


@dataclass
class Kind:
    """A peer: its file in scripts/peers, its route and how it is asked, the loads it is compared under."""

    file: str
    route: str = ""
    api: str = ""
    loads: tuple = ()
    # Whether its `bench` measures prompts and streams by themselves.
    streams: bool = True


PEERS = {
    "llama.cpp": Kind("llama_cpp", "/v1/completions", "openai", (ONE, EIGHT)),
    "vllm": Kind("vllm", "/v1/completions", "openai", (ONE, EIGHT, MANY)),
    "mlflow": Kind("mlflow", "/invocations", "mlflow", (LONG_ANSWERS, LONG_PROMPTS), streams=False),
    "transformers": Kind("transformers"),
}


def main(options, model, load):
    """1 when something could not be measured, which is then missing in the table."""
    kind = PEERS[options.against]
    peer = Peer(kind, model, options)
    peer.call("setup")
    loads = kind.loads
    if any(word.startswith(("--clients", "--rate")) for word in load):
        loads = (("load",),)
    tables = [Table(ours, options) for ours in variants(options, peer, model)]
    failed = []

    def part(what, measure, *arguments):
        try:
            measure(*arguments)
        except Failed as error:
            failed.append(f"{what}: {error}")
            print(f"{what} could not be measured: {error}", flush=True)

    try:
        with contextlib.ExitStack() as stack:
            if loads:
                start(stack, options, peer, tables)
            if kind.streams:
                part("without HTTP", streams, options, peer, tables)
            for number, (label, *words) in enumerate(loads):
                part(label, compare, options, peer, tables, label, [*words, *load], 1000 * (1 + number))
    finally:
        for table in tables:
            table.show()
    return 1 if failed else 0


@dataclass
class Ours:
    """One way of serving the model here."""

    model: str
    quantization: str
    # What its weights are called.
    form: str
    endpoint: Endpoint = None


def variants(options, peer, model):
    for quantization in options.quantization:
        if quantization != "none":
            yield Ours(model, quantization, quantization)
        elif options.form == "bf16":
            yield Ours(model, "none", "bf16")
        else:
            # The very same quantised weights.
            yield Ours(peer.call("gguf").strip().splitlines()[-1], "none", f"{options.form} (the same file)")


class Table:
    """What is compared with one way of serving here, in Markdown."""

    def __init__(self, ours, options):
        self.ours, self.rounds = ours, options.rounds
        self.name = f"{options.against}-{options.form}-{ours.form.split()[0]}"
        self.title = (f"tandem {ours.form} against {options.against} {options.form}: {options.threads} threads, medians of "
                      f"{options.rounds} rounds")
        self.rows = []

    def add(self, name, ours, theirs):
        self.rows.append(f"| {name} | {ours:.2f} | {theirs:.2f} | {f'{ours / theirs:.3g}' if theirs else '-'} |")

    def show(self):
        lines = [f"| {self.title} | tandem | peer | ratio |", "|---|---|---|---|", *self.rows]
        with open(os.path.join(OUT, f"{self.name}.md"), "w") as file:
            file.write("\n".join(lines) + "\n")
        print("\n" + "\n".join(lines), flush=True)


class Peer:
    """A peer's server while its `with` lasts."""

    def __init__(self, kind, model, options):
        self.script = os.path.join(CODE, "scripts", "peers", f"{kind.file}.py")
        self.kind = kind
        self.arguments = ["--model", model, "--form", options.form, "--threads", str(options.threads)]
        # Whether it may still be busy with requests that nobody waits for.
        self.busy = False

    def call(self, verb):
        """What the peer's script prints; what it says on the way is shown."""
        sys.stdout.flush()
        command = [sys.executable, self.script, verb, *self.arguments]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if ended.returncode != 0:
            raise Failed(f"failed with {ended.returncode}: {' '.join(command)}")
        return ended.stdout

    def __enter__(self):
        self.url, self.pid, self.start_s = self.call("start").strip().splitlines()[-1].split()
        return self

    def __exit__(self, *_):
        self.call("stop")

    def load(self, label, *words):
        """Sends a load; that none of its requests is answered is a result too."""
        if self.busy:
            self.call("stop")
            self.__enter__()
        path = words[words.index("--json") + 1]
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        try:
            run(built("tandem-bench"), "load", "--url", self.url + self.kind.route, "--api", self.kind.api, "--model",
                "model", "--pid", self.pid, "--label", label, *words)
        except Failed:
            self.busy = True
            if not os.path.exists(path):
                raise
        with open(path) as file:
            self.busy = bool(json.load(file)["failures"])


def start(stack, options, peer, tables):
    """Starts everything, and compares how long that takes: here once weights are packed, there from the page cache."""
    seconds = []
    for table in tables:
        ours = table.ours
        cluster = stack.enter_context(Cluster({ENDPOINT: ours.model}, options.threads, ours.quantization))
        ours.endpoint = Endpoint(cluster, ENDPOINT)
        ours.endpoint.create()
        first = ours.endpoint.wait_ready()
        seconds.append(ours.endpoint.start_again())
        print(f"tandem {ours.form}: READY after {first:.2f} s, at its second deployment after {seconds[-1]:.2f} s", flush=True)
    stack.enter_context(peer)
    print(f"{options.against} {options.form}: answers after {peer.start_s} s", flush=True)
    for table, mine in zip(tables, seconds):
        table.add("start, once, s", mine, float(peer.start_s))


def streams(options, peer, tables):
    """A prompt of 512 tokens and streams of decodes, without HTTP where the peer has a program for that."""
    mine, theirs = [[] for _ in tables], []
    for _ in range(options.rounds):
        for table, values in zip(tables, mine):
            values.append(steps(table.ours, options.threads))
            print(f"tandem {table.ours.form}: {values[-1]}", flush=True)
        lines = map(str.split, peer.call("bench").splitlines())
        theirs.append({line[0]: float(line[1]) for line in lines if len(line) == 2 and line[0] in STREAMS})
        print(f"{options.against} {options.form}: {theirs[-1]}", flush=True)
    for table, values in zip(tables, mine):
        for key, name in STREAMS.items():
            if all(key in values for values in theirs):
                table.add(name, *(median([values[key] for values in rounds]) for rounds in (values, theirs)))


def steps(ours, threads):
    form = ours.quantization.replace("none", "bf16")
    told = output_of(built("examples/steps"), ours.model, "--weights", form, "--threads", str(threads), *STREAM)
    found = {}
    for line in told.splitlines():
        kind, *pairs = line.split()
        values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        if kind == "prefill":
            found["prefill_512"] = float(values["tokens_per_s"])
        elif kind == "decode":
            found[f"decode_{values['batch']}"] = float(values["tokens_per_s"])
    return found


def median(values):
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def compare(options, peer, tables, label, words, seed):
    """Each round has prompts of its own: what a server has seen before it may have kept."""
    reports, theirs = [[] for _ in tables], []
    # Texts where the peer takes no token ids, for both.
    prompts = ["--prompts", "text"] if peer.kind.api == "mlflow" else []
    slug = label.replace(",", "").replace(" ", "-")
    for number in range(options.rounds):
        drawn = ["--seed", str(seed + number), *prompts]
        for table, paths in zip(tables, reports):
            paths.append(os.path.join(OUT, f"{table.name}-{slug}-{number}-ours.json"))
            table.ours.endpoint.load(f"tandem {table.ours.form}, {label}", *words, *drawn, "--json", paths[-1])
        theirs.append(os.path.join(OUT, f"{options.against}-{options.form}-{slug}-{number}-theirs.json"))
        peer.load(f"{options.against} {options.form}, {label}", *words, *drawn, "--json", theirs[-1])
    for table, paths in zip(tables, reports):
        told = output_of(built("tandem-bench"), "compare", "--label", label, "--ours", *paths, "--theirs", *theirs)
        # But for the head.
        table.rows += told.splitlines()[2:]
        run(built("tandem-bench"), "plot", os.path.join(OUT, f"{table.name}-{slug}.svg"), *paths, *theirs)
