"""Starts and stops the processes of cluster.toml on this machine; scripts/up and scripts/down call it.

    cluster.py up       the coordinator and one worker per device of this machine; returns when all have met
    cluster.py down     asks them to stop, and waits until they have

Process ids and times of birth are in var/run/NAME.pid, logs in var/logs/NAME.log.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

from client import ENV_FILE, ROOT

PROGRAMS = os.path.join(ROOT, "target", "release")
CONFIG = os.path.join(ROOT, os.environ.get("TANDEM_CONFIG", "cluster.toml"))
RUN, LOGS = os.path.join(ROOT, "var", "run"), os.path.join(ROOT, "var", "logs")
STARTED = "=== started"
START_LIMIT_S = 60
STOP_LIMIT_S = 30
LOOK_EVERY_S = 0.1


def main():
    os.chdir(ROOT)
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb == "up":
        up()
    elif verb == "down":
        down()
    else:
        sys.exit(__doc__)


# Up


def up():
    facts = Facts.read()
    for folder in (RUN, LOGS):
        os.makedirs(folder, exist_ok=True)
    started = []
    try:
        if not alive("coordinator"):
            check_ports(facts)
            started.append("coordinator")
            start("coordinator", [program("coordinator"), "--config", CONFIG])
            wait("the coordinator to answer", ["coordinator"], lambda: health(facts.http))
        for worker in facts.workers_here:
            if not alive(worker):
                started.append(worker)
                start(worker, [program("worker"), "--config", CONFIG, "--device", worker])
        here = len(facts.workers_here)
        wait(f"{here} workers to join", ["coordinator", *facts.workers_here],
             lambda: health(facts.http).get("workers", 0) >= here)
    except Failed as failed:
        for name in reversed(started):
            stop(name)
        sys.exit(f"up: {failed}")
    write_env(facts)
    print(f"{'started' if started else 'already running'}: coordinator and {here} workers")
    print(f"  API      http://{facts.http}   (user {facts.user}, token in {facts.token_file})")
    print("  shell    set -a; . var/cluster.env; set +a; curl -H \"Authorization: Bearer $TANDEM_TOKEN\" "
          "$TANDEM_URL/api/2.0/serving-endpoints")
    print("  logs     var/logs/")
    print("  stop     scripts/down")


class Facts:
    """What cluster.toml says, with its layers, in the words of `coordinator facts`."""

    def __init__(self, lines):
        self.http = self.links = self.user = self.token_file = None
        self.workers_here = []
        for kind, *values in (line.split("\t") for line in lines):
            if kind == "http":
                (self.http,) = values
            elif kind == "links":
                (self.links,) = values
            elif kind == "token" and self.token_file is None:
                self.user, self.token_file = values
            elif kind == "worker" and is_here(values[1]):
                self.workers_here.append(values[0])

    @staticmethod
    def read():
        checked = subprocess.run([program("coordinator"), "--config", CONFIG, "facts"], capture_output=True, text=True)
        if checked.returncode != 0:
            sys.exit(checked.stderr.strip())
        return Facts(checked.stdout.splitlines())


def is_here(address):
    """Whether a node's address is one of this machine's: only those can be bound."""
    try:
        family, _, _, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(place)
        return True
    except OSError:
        return False


def check_ports(facts):
    """A clear word before anything starts, where a port is taken."""
    for address, key in ((facts.http, "listen"), (facts.links, "worker_listen")):
        host, port = address.rsplit(":", 1)
        host = host.strip("[]")
        try:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, int(port)))
        except OSError as error:
            raise Failed(
                f"{address} cannot be used ({error.strerror}): stop what listens there (ss -ltnp 'sport = :{port}'), or "
                f"set another port as coordinator.{key} in cluster.local.toml or TANDEM__COORDINATOR__{key.upper()}"
            ) from None


def start(name, command):
    with open(log_file(name), "ab") as log:
        log.write(f"{STARTED} {time.strftime('%Y-%m-%d %H:%M:%S')}: {' '.join(command)}\n".encode())
        log.flush()
        # A session of its own: Ctrl-C in this terminal is not for it.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    with open(pid_file(name), "w") as file:
        file.write(f"{process.pid} {birth(process.pid) or 0}\n")


class Failed(Exception):
    """Why the cluster is not up."""


def wait(what, names, ready):
    deadline = time.monotonic() + START_LIMIT_S
    while not ready():
        for name in names:
            if not alive(name):
                raise Failed(f"{name} ended while starting; the end of {log_file(name)}:\n{tail(name)}")
        if time.monotonic() > deadline:
            raise Failed(f"waited {START_LIMIT_S} s for {what}; see var/logs/")
        time.sleep(LOOK_EVERY_S)


def health(address):
    """What /health says; empty when nothing answers."""
    try:
        with urllib.request.urlopen(f"http://{address}/health", timeout=2) as response:
            return json.load(response)
    except (OSError, ValueError):
        return {}


def write_env(facts):
    token = ""
    if facts.token_file:
        with open(facts.token_file) as file:
            token = file.read().strip()
    descriptor = os.open(ENV_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"TANDEM_URL=http://{facts.http}\nTANDEM_TOKEN={token}\n")


# Down


def down():
    names = sorted(os.listdir(RUN)) if os.path.isdir(RUN) else []
    names = [name[: -len(".pid")].replace("+", "/") for name in names if name.endswith(".pid")]
    # Workers first: the coordinator then sees them leave, not die.
    names.sort(key=lambda name: name == "coordinator")
    stopped = [name for name in names if stop(name)]
    if os.path.exists(ENV_FILE):
        os.remove(ENV_FILE)
    print(f"stopped: {', '.join(stopped)}" if stopped else "nothing was running")


def stop(name):
    """Asks a process to stop and waits; insists after a while. Whether it was running."""
    running = alive(name)
    deadline = time.monotonic() + STOP_LIMIT_S
    if running:
        os.kill(running, signal.SIGTERM)
    while alive(name):
        if time.monotonic() > deadline:
            print(f"{name} did not stop within {STOP_LIMIT_S} s: killed", file=sys.stderr)
            os.kill(running, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(LOOK_EVERY_S)
    if os.path.exists(pid_file(name)):
        os.remove(pid_file(name))
    return bool(running)


# Both


def alive(name):
    """The process's id while it lives, else 0. Another process that got its id later is not taken for it."""
    try:
        with open(pid_file(name)) as file:
            pid, born = (int(word) for word in file.read().split())
    except (OSError, ValueError):
        return 0
    try:
        os.waitpid(pid, os.WNOHANG)  # takes the status of an ended child of ours, so that it is not seen as living
    except ChildProcessError:
        pass
    return pid if birth(pid) == born else 0


def birth(pid):
    """When a process was started, in clock ticks since the machine was; None when it is over."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, *fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(fields[18])


def program(name):
    return os.path.join(PROGRAMS, name)


def pid_file(name):
    return os.path.join(RUN, name.replace("/", "+") + ".pid")


def log_file(name):
    return os.path.join(LOGS, name.replace("/", "-") + ".log")


def tail(name, lines=20):
    """The last lines of a log, none from before the last start."""
    with open(log_file(name), errors="replace") as file:
        log = file.read()
    return "\n".join(log[log.rfind(STARTED) :].splitlines()[-lines:])


if __name__ == "__main__":
    main()
