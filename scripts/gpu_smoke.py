"""Runs the CUDA suite on a GPU and writes what happened into a report. See scripts/gpu-smoke, which starts it.

Owns the order of things and the report. What is tested is in the test programs; each runs as a process of its own, with a
time limit, and one that fails does not keep the next from running.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / "target" / "gpu-smoke"
# Tests look for the coordinator and the worker one folder above their own.
DEPS = BUNDLE / "deps"

# Name in the bundle, cargo's arguments, name of the target that gives the program.
PROGRAMS = [
    ("engine-unit", ["test", "--no-run", "-p", "engine", "--features", "cuda", "--lib"], "engine"),
    ("engine-models", ["test", "--no-run", "-p", "engine", "--features", "cuda", "--test", "cuda"], "cuda"),
    ("engine-groups", ["test", "--no-run", "-p", "engine", "--features", "cuda", "--test", "nccl"], "nccl"),
    ("cluster", ["test", "--no-run", "-p", "cluster-tests", "--test", "it"], "it"),
    ("gpu_times", ["build", "--release", "-p", "engine", "--features", "cuda", "--example", "gpu_times"], "gpu_times"),
]

# What a machine with a GPU cannot show: a worker and a doctor without one.
ABSENT = ["--skip", "a_worker_whose_gpu_cannot_be_had", "--skip", "the_doctor_tells"]

# Name of the step, program, arguments, whether two GPUs are needed, seconds at most.
TESTS = [
    ("ops against the reference, alone", "engine-unit", ["backend::cuda", "--test-threads=1"], False, 600),
    ("whole models", "engine-models", ["--test-threads=1"], False, 600),
    ("groups of two cards", "engine-groups", ["--test-threads=1"], True, 600),
    ("the cluster on one card", "cluster", ["cuda::", "--skip", "gpu_and_two", "--test-threads=1"], False, 1200),
    ("the cluster on two cards", "cluster", ["gpu_and_two", "cuda_faults::", *ABSENT, "--test-threads=1"], True, 1200),
]

# compute-sanitizer's tools. Without the padding, memcheck misses what lands in a neighbouring allocation.
SANITIZERS = [
    ("memcheck", ["--padding", "512"]),
    ("racecheck", []),
    ("synccheck", []),
    ("initcheck", []),
]


def main():
    parser = argparse.ArgumentParser(prog="gpu-smoke", add_help=False)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--report", type=Path, default=ROOT / "var" / "gpu-report.md")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rig", action="store_true")
    asked = parser.parse_args()
    if not asked.run:
        build()
    if asked.build:
        print(f"built into {BUNDLE}; now: scripts/gpu-smoke --run, on the machine with the GPU")
        return 0
    missing = [name for name, _, _ in PROGRAMS if not (DEPS / name).exists()]
    if missing:
        sys.exit(f"gpu-smoke: {BUNDLE} lacks {', '.join(missing)}: run scripts/gpu-smoke --build first, and bring the folder here")
    report = Report(asked.report)
    if asked.rig:
        devices, environment = 2, rig_environment()
    else:
        devices, environment = count_gpus(report), dict(os.environ, TANDEM_GPU="1")
    describe(report, environment, asked.rig)
    for name, program, arguments, pair, limit in TESTS:
        if pair and devices < 2:
            report.skip(name, f"needs two GPUs, and there is {devices}" if devices == 1 else "there is no GPU")
            continue
        # NVRTC asks the driver for more than the emulation has.
        left_out = ["--skip", "nvrtc"] if asked.rig else []
        report.run(name, [str(DEPS / program), *arguments, *left_out], environment, limit)
    if not (asked.quick or asked.rig):
        sanitize(report, environment)
    tiny = ["--tiny"] if asked.rig else []
    report.run("times of the ops", [str(DEPS / "gpu_times"), *tiny], environment, 900)
    return report.end()


def build():
    """Builds the programs and copies them, without their debug information, to one folder."""
    DEPS.mkdir(parents=True, exist_ok=True)
    for name, arguments, target in PROGRAMS:
        print(f"building {name}: cargo {' '.join(arguments)}", flush=True)
        copy(built_by(arguments, target), DEPS / name)
    for name in ["coordinator", "worker"]:
        copy(built_by(["build", "-p", name, "--bin", name], name), BUNDLE / name)


def built_by(arguments, target):
    """The program that cargo makes, wherever it puts it."""
    command = ["cargo", *arguments, "--message-format=json-render-diagnostics"]
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if built.returncode:
        sys.exit(f"gpu-smoke: {target} does not build")
    messages = [json.loads(line) for line in built.stdout.splitlines() if line.startswith("{")]
    programs = [m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == target]
    if not programs:
        sys.exit(f"gpu-smoke: cargo built no program {target}")
    return Path(programs[-1])


def copy(program, to):
    to.unlink(missing_ok=True)
    if not shutil.which("strip") or subprocess.run(["strip", "--strip-debug", "-o", to, program]).returncode:
        shutil.copy2(program, to)


def rig_environment():
    """The folder of emulated libraries that the tests have built, before all others."""
    folders = sorted((ROOT / "target" / "cuda-rig").glob("product-libraries-*"), key=lambda path: path.stat().st_mtime)
    if not folders:
        sys.exit("gpu-smoke: the emulated libraries are not built: cargo nextest run -p cuda-rig")
    old = os.environ.get("LD_LIBRARY_PATH", "")
    return dict(os.environ, LD_LIBRARY_PATH=f"{folders[-1]}:{old}" if old else str(folders[-1]))


def count_gpus(report):
    tool = shutil.which("nvidia-smi")
    if not tool:
        sys.exit("gpu-smoke: nvidia-smi is not on the PATH: this machine has no NVIDIA driver (or try --rig)")
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True)
    report.text("nvidia-smi -L", listed.stdout + listed.stderr)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def describe(report, environment, rig):
    facts = [f"machine: {platform.node()}, {platform.platform()}", f"commit: {commit()}"]
    if rig:
        facts.append("THE EMULATED DEVICES OF tests/cuda-rig, NOT A GPU")
    report.text("facts", "\n".join(facts))
    report.run("worker doctor", [str(BUNDLE / "worker"), "doctor"], environment, 60)


def commit():
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "not known"
    return done.stdout.strip() or "not known"


def sanitize(report, environment):
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        report.skip("compute-sanitizer", "it is not installed: it comes with the CUDA toolkit")
        return
    for name, options in SANITIZERS:
        command = [tool, "--tool", name, *options, "--error-exitcode", "9", str(DEPS / "engine-unit")]
        report.run(f"compute-sanitizer {name}", [*command, "backend::cuda", "--test-threads=1"], environment, 900)


def finish(command, environment, limit):
    """Runs a program with all that it starts: none of it stays on the card. Gives its output and how it ended."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
    except OSError as error:
        return str(error).encode(), "FAILED to start"
    try:
        output, _ = process.communicate(timeout=limit)
        return output, "ok" if process.returncode == 0 else f"FAILED with {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return output, f"FAILED: not done after {limit} s"


class Report:
    """Says on the terminal what runs, and keeps everything in a file, which is whole after each step."""

    LINES_MAX = 400

    def __init__(self, path):
        self.path, self.failed = path, []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# The CUDA suite, {time.strftime('%Y-%m-%d %H:%M:%S %Z')}\n")

    def write(self, text):
        with self.path.open("a") as file:
            file.write(text)

    def text(self, title, text):
        self.write(f"\n## {title}\n\n```\n{text.strip()}\n```\n")

    def skip(self, name, why):
        print(f"{name}: left out, {why}", flush=True)
        self.write(f"\n## {name}: left out\n\n{why}\n")

    def run(self, name, command, environment, limit):
        print(f"{name} ... ", end="", flush=True)
        begun = time.monotonic()
        output, ending = finish(command, environment, limit)
        if ending != "ok":
            self.failed.append(name)
        print(f"{ending}, {time.monotonic() - begun:.0f} s", flush=True)
        lines = output.decode(errors="replace").strip().splitlines()
        left_out = len(lines) - self.LINES_MAX
        if left_out > 0:
            half = self.LINES_MAX // 2
            lines = [*lines[:half], f"... {left_out} lines ...", *lines[-half:]]
        shown = " ".join(Path(part).name if part.startswith(str(BUNDLE)) else part for part in command)
        self.text(f"{name}: {ending}", f"$ {shown}\n" + "\n".join(lines))

    def end(self):
        verdict = f"failed: {', '.join(self.failed)}" if self.failed else "all passed"
        self.write(f"\n## In all\n\n{verdict}\n")
        print(f"{verdict}; the report is {self.path}")
        return 1 if self.failed else 0


sys.exit(main())
