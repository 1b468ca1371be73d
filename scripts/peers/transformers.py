"""transformers as a peer: `generate` in one process, in bf16. It has no server; see mlflow.py.

    transformers.py setup|bench ...    see common.py; bench also prints decode_8, the sum of a batch of 8
"""

import os
import subprocess
import sys

import common


class Transformers(common.Peer):
    name = "transformers"

    def setup(self):
        common.clients()

    def bench(self, asked):
        python = os.path.join(common.CLIENTS, "bin", "python")
        script = os.path.join(common.INSIDE, "generate.py")
        told = subprocess.run(
            [python, script, asked.model, str(asked.threads)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(asked.threads), "HF_HUB_OFFLINE": "1"},
        )
        if told.returncode != 0:
            sys.exit("transformers failed: see above")
        return {figure: float(value) for figure, value in map(str.split, told.stdout.splitlines())}


if __name__ == "__main__":
    Transformers().run()
