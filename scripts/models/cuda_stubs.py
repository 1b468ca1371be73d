"""Makes do-nothing stand-ins for the CUDA libraries that PyPI's torch links, so that it imports on a machine without them.

    pip install --no-deps torch
    python cuda_stubs.py .../site-packages/torch/lib

For making goldens on a CPU with 0.5 GB of torch in place of several GB of CUDA. Needs gcc, readelf and nm. Every stand-in
function answers with an error; nothing that uses a GPU works.
"""

import collections
import glob
import os
import re
import subprocess
import sys
import tempfile

SYSTEM = re.compile(r"^(lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s|z|gomp|quadmath)\.so|ld-linux)")
CUDA_SYMBOL = re.compile(r"^_*(cu|nccl|nvrtc|nvshmem|nvtx|nvJit|cudnn|cupti)")


def main(folder):
    libraries = glob.glob(folder + "/*.so*")
    missing = missing_libraries(libraries)
    versions = symbol_versions(libraries)
    homes = place_symbols(undefined_symbols(libraries), missing, versions)
    for soname in sorted(missing):
        build(folder, soname, homes[soname], versions[soname])
        print(soname, sum(map(len, homes[soname].values())), "functions")


def output(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout


def missing_libraries(libraries):
    """What the libraries need and neither the system nor the folder has."""
    present = {os.path.basename(path) for path in libraries}
    needed = {n for path in libraries for n in re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", path))}
    return {name for name in needed if not SYSTEM.match(name) and name not in present}


def undefined_symbols(libraries):
    """CUDA's functions that no library of the folder defines, each with the versions asked for."""
    wanted, defined = collections.defaultdict(set), set()
    for path in libraries:
        for line in output("nm", "-D", path).splitlines():
            fields = line.split()
            name, _, version = fields[-1].partition("@")
            if len(fields) == 2 and fields[0] in ("U", "w"):
                wanted[name].add(version)
            elif len(fields) == 3:
                defined.add(name)
    return {name: v for name, v in wanted.items() if name not in defined and CUDA_SYMBOL.match(name)}


def symbol_versions(libraries):
    """The symbol versions that are asked of each needed library."""
    versions = collections.defaultdict(set)
    for path in libraries:
        library = None
        for line in output("readelf", "-V", "-W", path).splitlines():
            if found := re.search(r"File: (\S+)", line):
                library = found.group(1)
            if library and (found := re.search(r"Name: (\S+)\s+Flags", line)):
                versions[library].add(found.group(1))
    return versions


def place_symbols(symbols, missing, versions):
    """Library -> version -> functions. What asks for no version goes to the run-time library."""
    runtime = next((name for name in sorted(missing) if name.startswith("libcudart")), min(missing, default=None))
    homes = collections.defaultdict(lambda: collections.defaultdict(list))
    for name, wanted in symbols.items():
        for version in wanted:
            home = next((library for library in missing if version and version in versions[library]), None)
            homes[home or runtime][version if home else ""].append(name)
    return homes


def build(folder, soname, functions, versions):
    code = "".join(stand_in(name) for names in functions.values() for name in names) or "int nothing;"
    script = "".join(f"{v} {{ global: {''.join(n + '; ' for n in functions.get(v, []))}}};\n" for v in sorted(versions))
    with tempfile.TemporaryDirectory() as work:
        source, version_script = os.path.join(work, "stub.c"), os.path.join(work, "stub.map")
        for path, text in ((source, code), (version_script, script)):
            with open(path, "w") as file:
                file.write(text)
        command = ["gcc", "-w", "-fno-builtin", "-shared", "-fPIC", "-o", os.path.join(folder, soname), source]
        command.append(f"-Wl,-soname,{soname}")
        if script:
            command.append(f"-Wl,--version-script={version_script}")
        subprocess.run(command, check=True)


def stand_in(name):
    if "String" in name or "GetErrorName" in name:
        return f'const char *{name}(void) {{ return "not CUDA"; }}\n'
    if name in ("cudaGetLastError", "cudaPeekAtLastError"):
        return f"int {name}(void) {{ return 0; }}\n"
    if name.startswith("__cudaRegister"):
        return f"void *{name}(void) {{ static long x[64]; return x; }}\n"
    return f"int {name}(void) {{ return 100; /* cudaErrorNoDevice */ }}\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
