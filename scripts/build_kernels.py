"""Compiles the CUDA kernels to cubins with NVRTC and checks what the compiler made of them. Run by scripts/build-kernels.

Every `.cu` of worker/engine/src/backend/cuda/kernels becomes one cubin an architecture; `cubins/MANIFEST` tells from
which sources, by which compiler, and what each kernel takes. The checks: no spills; registers within the launch bounds,
or within the kernel's own limit; and the widths of the loads in the PTX, as the comment before a kernel says:

    // lint: wide >= 2, narrow <= 0, registers <= 64

wide: loads of 16 bytes from global memory, at least; narrow: loads of under 4 bytes, at most; all as written in the code
(a loop counts once). Every part may be left out.
"""

import ctypes
import hashlib
import importlib.metadata
import multiprocessing
import re
import sys
import sysconfig
import time
from pathlib import Path

CUDA = Path("worker/engine/src/backend/cuda")
SOURCES, CUBINS = CUDA / "kernels", CUDA / "cubins"
ARCHITECTURES = ("sm_80", "sm_90")
# Fused multiply-add is the compiler's default (--fmad=true); kernels that must not fuse say so with __fmul_rn and so on.
# No line information: it would write paths into the cubins.
OPTIONS = ("--std=c++17", "--device-as-default-execution-space", "--ptxas-options=-v")
REGISTERS = 65536  # of a multiprocessor, which one block may have to itself
PROCESSES = 2


def main():
    check = sys.argv[1:] == ["--check"]
    sources = {path.name: path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".cu", ".cuh")}
    units = [name for name in sources if name.endswith(".cu")]
    kernels = {name: declared(name, sources[name].decode()) for name in units}
    jobs = [(architecture, name, sources) for name in units for architecture in ARCHITECTURES]
    started, faults, files, lines = time.monotonic(), [], {}, {}
    with multiprocessing.Pool(PROCESSES) as pool:
        for architecture, name, cubin, ptx, log, seconds in pool.imap(compile_unit, jobs):
            if cubin is None:
                faults.append(f"{name} does not compile for {architecture}:\n{log}")
                continue
            if "warning" in log:
                faults.append(f"{name} for {architecture}: warnings are errors:\n{log}")
            found = usage(log)
            faults += [f"{name} for {architecture}: {fault}" for fault in judge(kernels[name], found, loads(ptx))]
            place = f"{architecture}/{name.removesuffix('.cu')}.cubin"
            files[place] = cubin
            lines[place] = [
                f"kernel {architecture} {kernel} registers {use['registers']} spills {use['spills']} shared {use['shared']}"
                for kernel, use in sorted(found.items())
            ]
            most = max((use["registers"] for use in found.values()), default=0)
            print(f"{place}: {len(found)} kernels, {most} registers at most, {len(cubin)} bytes, {seconds:.1f} s", flush=True)
    if faults:
        sys.exit("build-kernels: " + "\nbuild-kernels: ".join(faults))
    files["MANIFEST"] = manifest(sources, files, lines).encode()
    (compare if check else write)(files)
    done = "the committed cubins are equal to a rebuild" if check else f"written to {CUBINS}"
    print(f"{len(units)} sources, {sum(map(len, kernels.values()))} kernels: {done}, {time.monotonic() - started:.0f} s")


def declared(name, text):
    """The entries of a source: name -> threads_max and limits."""
    pattern = r"((?:^[ ]*//.*\n)*)^[ ]*KERNEL\(\s*(\w+)\s*,\s*(\w+)\s*,"
    found = {}
    for comments, threads, kernel in re.findall(pattern, text, re.MULTILINE):
        limits = {}
        for line in re.findall(r"// lint:(.*)", comments):
            for part in line.split(","):
                limit = re.fullmatch(r"\s*(wide >=|narrow <=|registers <=) (\d+)\s*", part)
                if not limit:
                    sys.exit(f"build-kernels: {name}: {kernel}: cannot read '{part.strip()}' of its lint comment")
                limits[limit[1].split()[0]] = int(limit[2])
        if not threads.isdigit():
            constant = re.search(rf"constexpr int {threads} = (\d+);", text)
            if not constant:
                sys.exit(f"build-kernels: {name}: {kernel}: {threads} is no `constexpr int` of the file")
            threads = constant[1]
        limits["threads"] = int(threads)
        found[kernel] = limits
    if not found:
        sys.exit(f"build-kernels: {name} holds no KERNEL")
    return found


class Broken(Exception):
    """The compiler cannot be used. No SystemExit: a pool of processes would wait for its worker for ever."""


class Nvrtc:
    """The few calls of libnvrtc that compile a program."""

    def __init__(self):
        folder = Path(sysconfig.get_path("purelib")) / "nvidia/cuda_nvrtc/lib"
        try:
            self.library = ctypes.CDLL(str(folder / "libnvrtc.so.12"))
        except OSError as error:
            raise Broken(f"cannot load NVRTC: {error}; remove target/kernels-venv and run again") from error

    def compile(self, name, source, headers, architecture):
        """Gives cubin, PTX and log; no cubin when it does not compile."""
        strings = lambda texts: (ctypes.c_char_p * len(texts))(*texts)
        program = ctypes.c_void_p()
        rc = self.library.nvrtcCreateProgram(
            ctypes.byref(program),
            ctypes.c_char_p(source),
            ctypes.c_char_p(name.encode()),
            len(headers),
            strings(list(headers.values())),
            strings([header.encode() for header in headers]),
        )
        if rc:
            return None, "", f"nvrtcCreateProgram: error {rc}"
        options = [option.encode() for option in (f"--gpu-architecture={architecture}", *OPTIONS)]
        rc = self.library.nvrtcCompileProgram(program, len(options), strings(options))
        log = self.text(program, "ProgramLog")
        if rc:
            return None, "", log
        return self.get(program, "CUBIN"), self.text(program, "PTX"), log

    def get(self, program, what):
        size = ctypes.c_size_t()
        self.library[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        if self.library[f"nvrtcGet{what}"](program, buffer):
            raise Broken(f"NVRTC gives no {what}")
        return buffer.raw

    def text(self, program, what):
        return self.get(program, what).rstrip(b"\0").decode()


def compile_unit(job):
    architecture, name, sources = job
    started = time.monotonic()
    headers = {header: text for header, text in sources.items() if header.endswith(".cuh")}
    cubin, ptx, log = Nvrtc().compile(name, sources[name], headers, architecture)
    return architecture, name, cubin, ptx, log, time.monotonic() - started


def usage(log):
    """What the assembler said of each kernel (--ptxas-options=-v)."""
    found, kernel = {}, None
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = found.setdefault(entry[1], {"registers": 0, "spills": 0, "shared": 0})
        elif spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernel["spills"] += int(spills[1]) + int(spills[2])
        elif used := re.search(r"Used (\d+) registers", line):
            kernel["registers"] = int(used[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                kernel["shared"] = int(shared[1])
    return found


def loads(ptx):
    """Loads from global memory in each kernel's PTX, by their width: name -> (wide, narrow)."""
    counts = {}
    for kernel, body in re.findall(r"\.entry (\w+)\((.*?)^}", ptx, re.MULTILINE | re.DOTALL):
        wide = narrow = 0
        # An address space that is not named is any, global memory among them.
        for load in re.findall(r"^\s*(?:@!?%p\d+\s+)?(ld\.\S+)", body, re.MULTILINE):
            parts = load.split(".")
            if {"param", "shared", "local", "const"} & {part.split("::")[0] for part in parts}:
                continue
            count = int(next((part[1:] for part in parts if re.fullmatch(r"v\d", part)), 1))
            size = count * int(re.search(r"\d+$", parts[-1])[0]) // 8
            wide += size >= 16
            narrow += size < 4
        counts[kernel] = wide, narrow
    return counts


def judge(kernels, found, widths):
    """What is wrong with a unit's kernels."""
    if set(kernels) != set(found):
        yield f"KERNEL names {sorted(kernels)}, the compiler {sorted(found)}"
        return
    for kernel, limits in kernels.items():
        use, (wide, narrow) = found[kernel], widths[kernel]
        registers = limits.get("registers", min(255, REGISTERS // limits["threads"] // 8 * 8))
        if use["spills"]:
            yield f"{kernel} spills {use['spills']} bytes of registers"
        if use["registers"] > registers:
            yield f"{kernel} takes {use['registers']} registers; {registers} are allowed"
        if wide < limits.get("wide", 0):
            yield f"{kernel} has {wide} loads of 16 bytes; its lint comment wants {limits['wide']}"
        if narrow > limits.get("narrow", narrow):
            yield f"{kernel} has {narrow} loads of under 4 bytes; its lint comment allows {limits['narrow']}"


def manifest(sources, files, lines):
    sha = lambda data: hashlib.sha256(data).hexdigest()
    rows = [f"nvrtc {importlib.metadata.version('nvidia-cuda-nvrtc-cu12')}", f"options {' '.join(OPTIONS)}"]
    rows += [f"source {name} {sha(data)}" for name, data in sources.items()]
    for place in sorted(files):
        rows += [f"cubin {place} {sha(files[place])}", *lines[place]]
    return "\n".join(rows) + "\n"


def on_disk():
    return {str(path.relative_to(CUBINS)): path for path in CUBINS.rglob("*") if path.is_file()}


def write(files):
    for place, path in on_disk().items():
        if place not in files:
            path.unlink()
    for place, data in files.items():
        (CUBINS / place).parent.mkdir(parents=True, exist_ok=True)
        (CUBINS / place).write_bytes(data)


def compare(files):
    have = on_disk()
    differences = [f"{place} is missing" for place in sorted(files.keys() - have.keys())]
    differences += [f"{place} has no source" for place in sorted(have.keys() - files.keys())]
    differences += [
        f"{place} differs" for place in sorted(files.keys() & have.keys()) if have[place].read_bytes() != files[place]
    ]
    if differences:
        listed = "\n  ".join(differences)
        sys.exit(f"build-kernels: the committed cubins are not what the sources give; run scripts/build-kernels and commit:\n  {listed}")


if __name__ == "__main__":
    try:
        main()
    except Broken as error:
        sys.exit(f"build-kernels: {error}")
