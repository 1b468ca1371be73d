"""What scripts/bench does once everything is built: one load, a load against a peer, or all figures.

Options that are not known here go to the load generator (`tandem-bench load --help`).
"""

import argparse
import os
import signal
import sys

import against
import figures
import roof
from cluster import CODE, Cluster, Endpoint, Failed, built, random_model, run

OUT = os.path.join(CODE, "var", "bench")
ENDPOINT = "bench"


def main():
    # As with Ctrl-C, servers that were started are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        measure()
    except Failed as failed:
        sys.exit(f"bench: {failed}")


def measure():
    if sys.argv[1:2] == ["figures"]:
        sys.exit(figures.main(sys.argv[2:]))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # A model's folder, left out: 1.1 billion random parameters, made once. With --url: its name there.
    parser.add_argument("--model")
    # Against a peer also several, by commas: each is compared.
    parser.add_argument("--quantization", default=["none"], type=quantizations)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--limits", action="store_true")
    parser.add_argument("--against", choices=sorted(against.PEERS))
    parser.add_argument("--form", default="bf16", choices=["bf16", "q8_0", "q4_0"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--url")
    known, load = parser.parse_known_args()
    os.makedirs(OUT, exist_ok=True)
    if known.url:
        name = ["--model", known.model] if known.model else []
        run(built("tandem-bench"), "load", "--url", known.url, *name, *files("load"), *load)
        return
    model = known.model or random_model("1.1b")
    if known.against:
        sys.exit(against.main(known, model, load))
    (quantization,) = known.quantization if len(known.quantization) == 1 else parser.error("--quantization: one at a time")
    limits = roof.Limits.measure(known.threads) if known.limits else None
    with Cluster({ENDPOINT: model}, known.threads, quantization) as cluster:
        endpoint = Endpoint(cluster, ENDPOINT)
        endpoint.create()
        seconds = endpoint.wait_ready()
        print(f"{model}: READY after {seconds:.1f} s, weights in {quantization.replace('none', 'their own form')}")
        report = endpoint.load("load", *files("load"), *load)
    print(f"report and plot: {OUT}/load.json, load.svg")
    if limits:
        limits.show()
        limits.compare(model, quantization, report, clients(load))


def quantizations(text):
    words = text.split(",")
    if not set(words) <= {"none", "int8", "int4"}:
        raise argparse.ArgumentTypeError(f"{text}: none, int8 or int4")
    return words


def files(name):
    return "--json", os.path.join(OUT, f"{name}.json"), "--svg", os.path.join(OUT, f"{name}.svg")


def clients(load):
    """How many clients a load has; none in an open loop."""
    if any(word.startswith("--rate") for word in load):
        return None
    for word, value in zip(load, [*load[1:], ""]):
        if word == "--clients":
            return int(value)
        if word.startswith("--clients="):
            return int(word.partition("=")[2])
    return 8


if __name__ == "__main__":
    main()
