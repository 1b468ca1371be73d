"""What this machine could do at best, and what a load reaches of it: docs/performance.md says how the roof is reckoned."""

import json
import os

from cluster import Failed, built, output_of

# Bytes of a weight, with its share of a group's scale.
WEIGHT_BYTES = {"none": 2.0, "int8": 1 + 2 / 128, "int4": 0.5 + 2 / 128}
# Bytes of a number in the cache of keys and values.
KV_BYTES = 2


class Limits:
    """The machine's, as the engine's example `limits` measures them."""

    def __init__(self, values):
        self.values = values
        self.read = float(values["read"][0]) * 1e9
        self.bf16 = float(values["bf16"][0]) * 1e9
        self.int8 = float(values["int8"][0]) * 1e9

    @staticmethod
    def measure(threads):
        lines = output_of(built("examples/limits"), TANDEM_BENCH_THREADS=str(threads)).splitlines()
        return Limits({name: rest for name, *rest in (line.split() for line in lines)})

    def show(self):
        print("limits of this machine, measured in the same run:")
        for name, value in self.values.items():
            print(f"  {name:<20} {' '.join(value)}")

    def compare(self, model, quantization, report, clients):
        """Prints which fraction of the roof the report's output tokens per second are."""
        if clients is None:
            print("an open loop is as fast as its requests come: no fraction of the roof")
            return
        prompt, output = (report[key] / report["answered"] for key in ("prompt_tokens", "output_tokens"))
        try:
            roof = Shape.read(model).roof(self, quantization, clients, prompt, output)
        except Failed as failed:
            print(f"no roof: {failed}")
            return
        reached = report["output_tokens_per_s"] / roof
        print(f"roof for this load: {roof:.1f} output tokens/s; reached: {reached:.2f} of it")


class Shape:
    """A llama's or a mistral's sizes."""

    def __init__(self, layer_weights, head_weights, kv_width):
        self.layer_weights, self.head_weights, self.kv_width = layer_weights, head_weights, kv_width

    @staticmethod
    def read(folder):
        try:
            with open(os.path.join(folder, "config.json")) as file:
                config = json.load(file)
            hidden, layers = config["hidden_size"], config["num_hidden_layers"]
            head = config.get("head_dim") or hidden // config["num_attention_heads"]
            q, kv = (config[key] * head for key in ("num_attention_heads", "num_key_value_heads"))
            layer = hidden * (2 * q + 2 * kv + 3 * config["intermediate_size"])
            return Shape(layers * layer, config["vocab_size"] * hidden, 2 * layers * kv)
        except (OSError, KeyError, ValueError) as error:
            raise Failed(f"{folder}: no config of a llama or a mistral: {error!r}") from None

    def roof(self, limits, quantization, clients, prompt, output):
        """Output tokens per second with everything at its limit: prompts at the arithmetic's, decodes at that or at the
        bandwidth's, whichever is slower, all clients in one batch."""
        peak = limits.bf16 if quantization == "none" else limits.int8
        weights = self.layer_weights + self.head_weights
        prefill_s = 2 * self.layer_weights * prompt / peak
        cached = KV_BYTES * self.kv_width * (prompt + output / 2)
        read_s = (WEIGHT_BYTES[quantization] * weights / clients + cached) / limits.read
        decode_s = max(read_s, 2 * weights / peak)
        return output / (prefill_s + output * decode_s)
