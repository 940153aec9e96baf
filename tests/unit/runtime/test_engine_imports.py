"""What knows the engine by its interface only does not wait for accelerate and DeepSpeed."""

from pathlib import Path

from tests.helpers.launching import run_python


def test_interface_imports_neither_accelerate_nor_deepspeed(tmp_path: Path) -> None:
    program = (
        "import sys, qad_dist.runtime.engine; print(sorted({'accelerate', 'deepspeed', 'torch'} & set(sys.modules)))"
    )

    ended = run_python("-c", program, folder=tmp_path)

    assert (ended.code, ended.stdout) == (0, "['torch']\n"), ended.stderr
