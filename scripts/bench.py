"""Tokens per second over HTTP: streams of greedy text from one endpoint, 1, 8 and 32 at a time.

All streams ask for the same number of tokens and go on past the model's end token, so that every run does the same work.
Times include HTTP, JSON, tokenizing, scheduling, and this client, which runs on the same cores. Prints a table; say which
machine it was when you quote it.
"""

import threading
import time

from client import stream
from demo import create, wait_ready

ENDPOINT, MODEL = "bench", "ml.demo.tiny-llama"
STREAMS = (1, 8, 32)
TOKENS = 256
PROMPT = "Once upon a time there was a kind fox named Leo who lived near the river."


def main():
    create(ENDPOINT, MODEL, workload_type="CPU", workload_size="Large")
    wait_ready(ENDPOINT)
    one_stream([], 0)  # the first request pays for what later ones find ready
    cpu = processor()
    print(f"\n$ python3 scripts/bench.py    # {MODEL}, {TOKENS} tokens a stream, on {cpu}")
    print("streams  tokens/s  first token, median  between tokens, median")
    for count in STREAMS:
        print(f"{count:7}  {row(count)}", flush=True)


def row(count):
    times = []
    threads = [threading.Thread(target=one_stream, args=(times, n)) for n in range(count)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - started
    assert len(times) == count, "a stream failed"
    first = median([moments[0] - start for start, moments in times])
    between = median([(moments[-1] - moments[0]) / (TOKENS - 1) for _, moments in times])
    return f"{count * TOKENS / seconds:8.0f}  {1000 * first:16.1f} ms  {1000 * between:19.2f} ms"


def one_stream(times, number):
    body = {
        "prompt": f"{number}. {PROMPT}",
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, moments, tokens = time.monotonic(), [], 0
    for event in stream(f"/serving-endpoints/{ENDPOINT}/invocations", body):
        if any(choice["text"] for choice in event["choices"]):
            moments.append(time.monotonic())
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    assert tokens == TOKENS, f"{tokens} tokens came, not {TOKENS}"
    times.append((started, moments))


def median(values):
    return sorted(values)[len(values) // 2]


def processor():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else "an unknown processor"


if __name__ == "__main__":
    main()
