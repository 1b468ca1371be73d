"""Every figure of docs/performance.md that needs no peer, a line each: FIGURE name value goal pass|short.

    scripts/bench figures                   all groups, some ten minutes
    scripts/bench figures steps batching    some of them: kernels, attention, steps, batching, start, quality

A figure that falls short is no failure of the run; one that could not be measured is.
"""

import os
import re
import sys

from cluster import CODE, Cluster, Endpoint, Failed, built, output_of, random_model

# Fractions of the roof that whole steps must reach, by the form of the weights.
STEPS = {
    "bf16": {"prefill": 0.6, "decode1": 0.8, "decode32": 0.55},
    "int8": {"prefill": 0.5, "decode1": 0.8, "decode32": 0.45},
    "int4": {"decode1": 0.8},
}
BATCHING_RATIO = 8
# Short questions, long answers: company gains answers all that it can, and prompts nothing.
BATCHED = ("--prompt", "16", "--output", "128")
READY_S = 3
RESIDENT_RATIO = 1.1
# How much worse a text may be foretold, as a share of the perplexity it is compared with.
INT8_LOSS, INT4_LOSS = 0.01, 0.001


def main(names):
    groups = {"kernels": kernels, "attention": attention, "steps": steps, "batching": batching, "start": start,
              "quality": quality}
    unknown = [name for name in names if name not in groups]
    if unknown:
        print(__doc__ if unknown[0] in ("-h", "--help") else f"no such figures: {', '.join(unknown)}; known: {', '.join(groups)}")
        return 0 if unknown[0] in ("-h", "--help") else 2
    failed = 0
    for name in names or groups:
        try:
            groups[name]()
        except Failed as error:
            failed = 1
            print(f"{name} could not be measured: {error}", flush=True)
    return failed


def figure(name, value, goal, at_most=False):
    """A figure must be at least its goal, or at most."""
    good = value <= goal if at_most else value >= goal
    print(f"FIGURE {name} {value:.4g} {goal} {'pass' if good else 'short'}", flush=True)


def kernels():
    engine_bench("kernels")


def attention():
    engine_bench("attention")


def engine_bench(name):
    """The engine's benches print their figures themselves."""
    lines = output_of("cargo", "bench", "--quiet", "--package", "engine", "--bench", name,
                      TANDEM_BENCH_FIGURES="1").splitlines()
    found = [line for line in lines if line.startswith("FIGURE ")]
    if not found:
        raise Failed(f"the bench {name} printed no figures")
    print("\n".join(found), flush=True)


def steps():
    """Whole steps of the 1.1B shape, beside the roof."""
    for weights, goals in STEPS.items():
        for line in step_lines("--weights", weights):
            kind, values = parse(line)
            if kind not in ("prefill", "decode"):
                continue
            name = kind + values.get("batch", "")
            print(f"{name} {weights}: {values['tokens_per_s']} tokens/s, roof {values['roof_tokens_per_s']}", flush=True)
            if name in goals:
                figure(f"steps.{weights}.{name}", float(values["fraction"]), goals[name])


def step_lines(*arguments):
    return output_of(built("examples/steps"), random_model("1.1b"), *arguments).splitlines()


def parse(line):
    kind, *pairs = line.split()
    return kind, dict(pair.split("=", 1) for pair in pairs)


def batching():
    """Tokens per second with 32 clients against those with 1, int8."""
    with served("int8") as cluster:
        endpoint = Endpoint(cluster, "llama")
        endpoint.create()
        endpoint.wait_ready()
        one = endpoint.load("1 client", *BATCHED, "--clients", "1", "--requests", "4", "--seed", "1")
        many = endpoint.load("32 clients", *BATCHED, "--clients", "32", "--requests", "64", "--seed", "2")
        one, many = one["output_tokens_per_s"], many["output_tokens_per_s"]
    figure("batching.int8", many / one, BATCHING_RATIO)


def start():
    """The second deployment of a version, from its request to READY, and what its worker then holds."""
    for weights in ("bf16", "int8"):
        with served(weights.replace("bf16", "none")) as cluster:
            endpoint = Endpoint(cluster, "llama")
            endpoint.create()
            first = endpoint.wait_ready()
            seconds = endpoint.start_again()
            # What was loaded is looked at once by a step.
            endpoint.load("fill", "--clients", "4", "--requests", "4", "--output", "4")
            resident = resident_bytes(cluster.pid)
            blocks = int(re.findall(r"(\d+) KV blocks", endpoint.build_log())[-1])
        loaded = next(parse(line)[1] for line in step_lines("--weights", weights, "--prompt", "0", "--seconds", "0")
                      if line.startswith("loaded "))
        planned = int(loaded["weight_bytes"]) + blocks * int(loaded["kv_block_bytes"])
        print(f"{weights}: first READY after {first:.2f} s; {resident / 1e9:.2f} GB resident, weights and KV pool are "
              f"{planned / 1e9:.2f} GB", flush=True)
        figure(f"start.{weights}.second_ready_s", seconds, READY_S, at_most=True)
        figure(f"start.{weights}.resident_ratio", resident / planned, RESIDENT_RATIO, at_most=True)


def served(quantization):
    return Cluster({"llama": random_model("1.1b")}, len(os.sched_getaffinity(0)), quantization)


def resident_bytes(pid):
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Rss:"))


def quality():
    """How well a text is foretold by the real 135M model: int8 against bf16, int4 against its own dequantised weights."""
    sys.path.insert(0, os.path.join(CODE, "scripts"))
    import real_model

    real_model.fetch()
    ids = os.path.join(CODE, "tests", "models", "golden", "smollm2-135m", "perplexity.json")

    def perplexity(*arguments):
        line = output_of(built("examples/perplexity"), real_model.MODEL, ids, *arguments).splitlines()[-1]
        _, value, *_ = line.split()
        print(f"perplexity {' '.join(arguments)}: {value}", flush=True)
        return float(value)

    # The file's own numbers, taken for a checkpoint in bf16.
    bf16, int8, int4 = (perplexity("--floats", "--weights", form) for form in ("bf16", "int8", "int4"))
    dequantised = perplexity("--floats", "--weights", "int4", "--dequantised")
    perplexity("--weights", "bf16")
    figure("quality.int8-bf16", int8 / bf16 - 1, INT8_LOSS, at_most=True)
    figure("quality.int4-dequantised", abs(int4 / dequantised - 1), INT4_LOSS, at_most=True)
    print(f"int4 against bf16: {100 * (int4 / bf16 - 1):.1f} % worse", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
