"""Creates two endpoints with the request that Databricks' documentation shows, and asks them in every input format.

Ends with an error when an answer is wrong: the tiny models know what they were taught.
"""

import sys
import time

from client import Refused, call, stream

# What the tiny models were taught; see tests/models/README.md.
INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instructions:\n{}\n\n### Response:\n"
)
QUESTION, ANSWER = (
    "What is Apache Spark?",
    "Apache Spark is an open source engine for processing large amounts of data across many machines.",
)
STORY = "Tell a story about a brave owl named Rose and a castle."
DEPLOY_LIMIT_S = 120


def main():
    # One shard on one device, as 7B to 34B models get; two shards that sum their halves, as 70B models do.
    create("llama-one-shard", "ml.demo.tiny-llama", workload_type="GPU_LARGE")
    create("mistral-two-shards", "ml.demo.tiny-mistral", workload_type="GPU_LARGE_2")
    for endpoint in ("llama-one-shard", "mistral-two-shards"):
        wait_ready(endpoint)
    for endpoint in ("llama-one-shard", "mistral-two-shards"):
        print(f"\n{endpoint}: \"{QUESTION}\"")
        for name, body in input_formats(INSTRUCTION.format(QUESTION)).items():
            ask(endpoint, name, body)
        chat(endpoint)


def create(endpoint, model, workload_type, workload_size="Small"):
    """POST /api/2.0/serving-endpoints, with the body that Databricks' documentation shows."""
    data = {
        "name": endpoint,
        "config": {
            "served_models": [
                {
                    "model_name": model,
                    "model_version": 1,
                    "workload_size": workload_size,
                    "scale_to_zero_enabled": False,
                    "workload_type": workload_type,
                }
            ]
        },
    }
    try:
        call("POST", "/api/2.0/serving-endpoints", data)
        print(f"created {endpoint}: {model} version 1 on {workload_type}")
    except Refused as refused:
        if refused.code != "RESOURCE_ALREADY_EXISTS":
            raise
        print(f"{endpoint} is there already")


def wait_ready(endpoint):
    """Polls the endpoint's state, with a line that shows what is going on."""
    started = time.monotonic()
    while True:
        view = call("GET", f"/api/2.0/serving-endpoints/{endpoint}")
        state = view["state"]
        config = view.get("pending_config") or view["config"]
        message = config["served_entities"][0]["state"]["deployment_state_message"]
        seconds = time.monotonic() - started
        progress(f"{endpoint}: {state['ready']} after {seconds:.1f} s. {message}")
        if state["ready"] == "READY" and state["config_update"] == "NOT_UPDATING":
            return print()
        if state["config_update"] == "UPDATE_FAILED":
            sys.exit(f"\n{endpoint} could not be deployed: {message}")
        if seconds > DEPLOY_LIMIT_S:
            sys.exit(f"\n{endpoint} is not ready after {DEPLOY_LIMIT_S} s; see var/logs/")
        time.sleep(0.2)


def input_formats(prompt):
    """The four input formats, each with one prompt."""
    params = {"temperature": 0.0, "max_tokens": 100, "stop": ["word1", "word2"], "candidate_count": 1}
    return {
        "dataframe_split": {"dataframe_split": {"columns": ["prompt"], "index": [0], "data": [[prompt]]}, "params": params},
        "dataframe_records": {"dataframe_records": [{"prompt": prompt}], "params": params},
        "instances": {"instances": [{"prompt": prompt}], "params": params},
        "inputs": {"inputs": {"prompt": prompt}, "params": params},
    }


def ask(endpoint, name, body):
    """POST /serving-endpoints/NAME/invocations, in the legacy format: a whole answer."""
    started = time.monotonic()
    answer = call("POST", f"/serving-endpoints/{endpoint}/invocations", body)
    seconds = time.monotonic() - started
    prediction = answer["predictions"][0]
    text, tokens = prediction["candidates"][0]["text"], prediction["metadata"]["output_tokens"]
    print(f"  {name:18} {text}  [{tokens} tokens, {tokens / seconds:.0f} tokens/s]")
    if text != ANSWER:
        sys.exit(f"this is not the right answer; expected: {ANSWER}")


def chat(endpoint):
    """The OpenAI form, streamed: tokens are shown as they come."""
    body = {
        "messages": [{"role": "user", "content": STORY}],
        "temperature": 0,
        "max_tokens": 200,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    print(f"  chat, streamed     \"{STORY}\"\n   ", end="")
    started, first, tokens, text = time.monotonic(), None, 0, ""
    for event in stream(f"/serving-endpoints/{endpoint}/invocations", body):
        for choice in event["choices"]:
            piece = choice["delta"].get("content") or ""
            first = first or (piece and time.monotonic() - started)
            text += piece
            print(piece, end="", flush=True)
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    seconds = time.monotonic() - started
    print(f"\n    [{tokens} tokens, first after {1000 * (first or 0):.0f} ms, {tokens / seconds:.0f} tokens/s]")
    if "brave owl named Rose" not in text:
        sys.exit("this is not the story that was asked for")


def progress(line):
    """Shows a line in place on a terminal, and only its changes elsewhere."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="", flush=True)
    elif "READY after" in line and "NOT_READY" not in line:
        print(line, end="")


if __name__ == "__main__":
    main()
