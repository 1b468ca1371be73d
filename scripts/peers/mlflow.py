"""`mlflow models serve` with the transformers flavour as a peer: how models are served today without a cluster for it.

    mlflow.py setup|start|stop ...    see common.py

It answers POST URL/invocations with {"prompt": "...", "max_tokens": 32}, one request at a time.
"""

import os

import common


class Mlflow(common.Peer):
    name = "mlflow"

    def setup(self):
        common.clients()

    def server(self, asked):
        programs = os.path.join(common.CLIENTS, "bin")
        environment = {
            # It starts uvicorn by name.
            "PATH": programs + os.pathsep + os.environ["PATH"],
            "OMP_NUM_THREADS": str(asked.threads),
            "HF_HUB_OFFLINE": "1",
            "MLFLOW_ALLOW_FILE_STORE": "true",
        }
        saved = common.made_from(self.folder, asked.model, "")
        if not os.path.exists(saved):
            script = os.path.join(common.INSIDE, "save_mlflow.py")
            part = saved + ".part"
            common.run("rm", "-rf", part)
            common.run(os.path.join(programs, "python"), script, asked.model, part, env={**os.environ, **environment})
            os.rename(part, saved)
        command = [os.path.join(programs, "mlflow"), "models", "serve", "--model-uri", saved, "--env-manager", "local"]
        command += ["--host", "127.0.0.1", "--port", str(asked.port), "--workers", "1"]
        return command, environment, "/ping"


if __name__ == "__main__":
    Mlflow().run()
