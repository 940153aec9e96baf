"""The lines that a user copies to transcribe a file with an export. Pure: no I/O."""

from pathlib import Path


def usage(folder: Path) -> str:
    """A shell command for an export in ModelOpt's format.

    Args:
        folder: The exported folder.
    """
    return (
        "Transcribe a file with it:\n"
        '    python -c "import modelopt.torch.opt as mto, soundfile; mto.enable_huggingface_checkpointing(); '
        "from qwen_asr import Qwen3ASRModel; "
        f"print(Qwen3ASRModel.from_pretrained('{folder}').transcribe(audio=soundfile.read('FILE.wav'), language=None)"
        '[0].text)"\n'
    )
