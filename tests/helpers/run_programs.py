"""A program: other programs in this process, one after the other, each as if started alone.

    python tests/helpers/run_programs.py COMMANDS ANSWERS

COMMANDS is a JSON list of argument lists, each beginning with a program's name (``label``); ANSWERS gets a list of
``{"code", "stdout", "stderr"}``. One process, because importing the libraries takes longer than being refused.
"""

import io
import json
import runpy
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from tests.helpers.launching import ROOT


def run_program(name: str, *arguments: str) -> dict[str, int | str]:
    path = ROOT / "launch" / f"{name}.py"
    stdout, stderr = io.StringIO(), io.StringIO()
    code = 0
    sys.argv = [str(path), *arguments]
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except Exception:  # noqa: BLE001  as the interpreter: a bug of one program is its answer, the others still run
            traceback.print_exc()
            code = 1
    return {"code": code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}


if __name__ == "__main__":
    commands = json.loads(Path(sys.argv[1]).read_text())
    answers = Path(sys.argv[2])
    answers.write_text(json.dumps([run_program(*command) for command in commands]))
