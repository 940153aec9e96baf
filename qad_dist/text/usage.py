"""The lines that a user copies to transcribe a file with an export. Pure: no I/O."""

import json
import shlex
from pathlib import Path


def usage(folder: Path) -> str:
    """A shell command for an export in ModelOpt's format.

    Args:
        folder: The exported folder.
    """
    # Double quotes inside, so that a shell's single quotes need no escapes around them.
    program = (
        "import modelopt.torch.opt as mto, soundfile; mto.enable_huggingface_checkpointing(); "
        "from qwen_asr import Qwen3ASRModel; "
        f"print(Qwen3ASRModel.from_pretrained({json.dumps(str(folder), ensure_ascii=False)})"
        '.transcribe(audio=soundfile.read("FILE.wav"), language=None)[0].text)'
    )
    return f"Transcribe a file with it:\n    python -c {shlex.quote(program)}\n"
