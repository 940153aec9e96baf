"""vLLM's server, each of whose processes ends with the one that started it. Run by its path, by vLLM's own Python.

Its engine and workers go on when the server is killed. They are started by multiprocessing, which imports the program's
main file in each process: this one, which then watches over its parent.
"""

import os
import runpy
import signal
import threading
import time

_POLL_SECONDS = 1.0


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _watch() -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


if __name__ in ("__main__", "__mp_main__"):  # the server itself, or a process that multiprocessing has started
    _watch()
    os.register_at_fork(after_in_child=_watch)

if __name__ == "__main__":
    # Not altering sys: the main module, which is imported by the others, stays this one.
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=False)
