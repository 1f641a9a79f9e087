"""The changes without which Horovod 0.28.1 does not build on current versions of what it needs."""

from __future__ import annotations

import re
from collections.abc import Mapping

Edit = tuple[str, str, str]  # file, old text, new text


def version_tuple(version: str) -> tuple[int, ...]:
    """'2.13.0+cpu' → (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def edits(frameworks: Mapping[str, str], python: tuple[int, ...], cuda: bool = False) -> list[Edit]:
    """The changes without which Horovod does not build on these versions."""
    torch_cmake = "horovod/torch/CMakeLists.txt"
    standard = "set(CMAKE_CXX_STANDARD {})".format
    flatbuffers = "third_party/flatbuffers/include/flatbuffers/stl_emulation.h"
    changes = [
        ("CMakeLists.txt", standard(14), standard(17)),
        (flatbuffers, "const size_type count_;", "size_type count_;"),  # it is assigned to
    ]
    if "torch" in frameworks:  # whose headers ask for it
        newer = version_tuple(frameworks["torch"]) >= (2, 14)
        changes.append((torch_cmake, standard(14), standard(20 if newer else 17)))
    if "tensorflow" in frameworks:  # serves GPUs only; TensorFlow >= 2.19 lacks headers for it
        xla = 'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")'
        changes.append(("horovod/tensorflow/CMakeLists.txt", xla, ""))
    if python >= (3, 12):  # which has no distutils
        include = "from distutils.sysconfig import get_python_inc; print(get_python_inc())"
        changes.append(
            (torch_cmake, include, "import sysconfig; print(sysconfig.get_path('include'))")
        )
        find = "from distutils.spawn import find_executable"
        changes.append(
            ("horovod/runner/js_run.py", find, "from shutil import which as find_executable")
        )
    if cuda:
        changes += cuda_edits()
    return changes


def cuda_edits() -> list[Edit]:
    kernels = "horovod/common/ops/cuda/CMakeLists.txt"
    shared, other_abi = 'set(NCCL_LIBNAME "nccl")', "add_library(compatible_horovod_cuda_kernels"
    return [
        # pip's NCCL has the library's versioned name alone, without a link for the linker.
        ("cmake/Modules/FindNCCL.cmake", shared, "set(NCCL_LIBNAME nccl libnccl.so.2)"),
        # CUDA 13 takes no standard below 17.
        (kernels, "set(CMAKE_CUDA_STANDARD 11)", "set(CMAKE_CUDA_STANDARD 17)"),
        # The kernels once more, for torch of before 2023: compiled only where something links them.
        (kernels, f"{other_abi} cuda_kernels.cu", f"{other_abi} EXCLUDE_FROM_ALL cuda_kernels.cu"),
    ]
