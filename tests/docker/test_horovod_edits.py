"""The changes to Horovod's sources: each finds its text, and only what needs it is changed."""

import pytest

from tests.docker.scripts import load

wheel_script = load("horovod_wheel")
edits = load("horovod_edits")

FRAMEWORKS = {"torch": "2.13.0+cpu", "tensorflow": "2.21.0"}


def sources(root):
    """The lines of Horovod's files that the edits are about."""
    files = {
        "CMakeLists.txt": "project(horovod CXX)\nset(CMAKE_CXX_STANDARD 14)\n",
        "horovod/torch/CMakeLists.txt": "set(CMAKE_CXX_STANDARD 14)\nCOMMAND python -c "
        '"from distutils.sysconfig import get_python_inc; print(get_python_inc())"\n',
        "horovod/tensorflow/CMakeLists.txt": "list(APPEND TF_SOURCES "
        '"${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")\nset_output_dir()\n',
        "third_party/flatbuffers/include/flatbuffers/stl_emulation.h": "const size_type count_;\n",
        "horovod/common/ops/cuda/CMakeLists.txt": "set(CMAKE_CUDA_STANDARD 11)\n"
        "add_library(horovod_cuda_kernels cuda_kernels.cu)\n"
        "add_library(compatible_horovod_cuda_kernels cuda_kernels.cu)\n",
        "cmake/Modules/FindNCCL.cmake": '    set(NCCL_LIBNAME "nccl")\n',
        "horovod/runner/js_run.py": "from distutils.spawn import find_executable\n",
    }
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.mark.parametrize(
    ("torch", "standard"), [("2.13.0+cpu", 17), ("2.9.1", 17), ("2.14.0", 20), ("3.0.0a0", 20)]
)
def test_edits_on_python_3_11(tmp_path, torch, standard):
    changes = edits.edits({"torch": torch, "tensorflow": "2.21.0"}, (3, 11))
    wheel_script.apply_edits(sources(tmp_path), changes)
    assert "CXX_STANDARD 17" in (tmp_path / "CMakeLists.txt").read_text()
    edited = (tmp_path / "horovod/torch/CMakeLists.txt").read_text()
    assert f"CXX_STANDARD {standard}" in edited
    assert "distutils" in edited
    assert (tmp_path / "horovod/tensorflow/CMakeLists.txt").read_text() == "\nset_output_dir()\n"


def test_edits_without_distutils(tmp_path):
    wheel_script.apply_edits(sources(tmp_path), edits.edits(FRAMEWORKS, (3, 12)))
    assert not [p for p in tmp_path.rglob("*.*") if p.is_file() and "distutils" in p.read_text()]


def test_edits_only_for_the_frameworks_built_for():
    both = {path for path, _, _ in edits.edits(FRAMEWORKS, (3, 11))}
    torch_only = {path for path, _, _ in edits.edits({"torch": "2.13.0"}, (3, 11))}
    assert both - torch_only == {"horovod/tensorflow/CMakeLists.txt"}


@pytest.mark.parametrize("remaining", ["set(CMAKE_CXX_STANDARD 11)", None])
def test_edit_without_a_match_names_file_and_text(tmp_path, remaining):
    file = sources(tmp_path) / "horovod/torch/CMakeLists.txt"
    file.unlink() if remaining is None else file.write_text(remaining)
    with pytest.raises(wheel_script.WheelError) as error:
        wheel_script.apply_edits(tmp_path, edits.edits(FRAMEWORKS, (3, 11)))
    assert "horovod/torch/CMakeLists.txt" in str(error.value)
    assert "set(CMAKE_CXX_STANDARD 14)" in str(error.value)


def test_edits_for_cuda(tmp_path):
    changes = edits.edits({"torch": "2.11.0"}, (3, 12), cuda=True)
    wheel_script.apply_edits(sources(tmp_path), changes)
    kernels = (tmp_path / "horovod/common/ops/cuda/CMakeLists.txt").read_text()
    assert "CUDA_STANDARD 17" in kernels
    assert kernels.count("EXCLUDE_FROM_ALL") == 1
    assert "libnccl.so.2" in (tmp_path / "cmake/Modules/FindNCCL.cmake").read_text()
