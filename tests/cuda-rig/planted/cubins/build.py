"""Compiles the cubins that the scenarios load, once, to be committed: build.py FOLDER_OF_LIBNVRTC.

The NVRTC is that of scripts/build-kernels (target/kernels-venv/lib/python3*/site-packages/nvidia/cuda_nvrtc/lib).
"""

import ctypes
import sys
from pathlib import Path

HERE = Path(__file__).parent
JOBS = [
    ("scenario_80.cubin", HERE.parent / "scenario.cu", "sm_80"),
    ("scenario_90.cubin", HERE.parent / "scenario.cu", "sm_90"),
    ("signature.cubin", HERE / "sources/signature.cu", "sm_80"),
    ("stale.cubin", HERE / "sources/stale.cu", "sm_80"),
    ("bound.cubin", HERE / "sources/bound.cu", "sm_80"),
]


def compile_one(nvrtc, source, architecture):
    program = ctypes.c_void_p()
    header, name = (HERE.parent / "device.cuh").read_bytes(), b"device.cuh"
    headers, names = (ctypes.c_char_p * 1)(header), (ctypes.c_char_p * 1)(name)
    text = source.read_bytes()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.name.encode(), 1, headers, names) == 0
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert result == 0, log.value.decode()
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    return cubin.raw


def main():
    nvrtc = ctypes.CDLL(str(Path(sys.argv[1]) / "libnvrtc.so.12"))
    for name, source, architecture in JOBS:
        (HERE / name).write_bytes(compile_one(nvrtc, source, architecture))
        print(name)


main()
