"""Write a checkpoint in the base model's layout: config, tokenizer and preprocessor verbatim, the head as it has it."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qad_dist.asr.checkpoint import HEAD, stored_shapes
from qad_dist.asr.load import PROCESSOR_FILES
from qad_dist.runtime.logs import prints_as_debug
from shards.storage import atomic_folder, write_json

log = logging.getLogger(__name__)


def save_checkpoint(
    model: Any, folder: Path, *, base: Path, dtype: str, beside: Mapping[str, Any] | None = None
) -> None:
    """Write ``model`` to ``folder``, whole or not at all, with a manifest of hashes.

    ``save_pretrained`` (which ModelOpt extends by its state file) writes the weights. What it writes beside them is
    replaced by the base model's own files: it changes ``thinker_config.model_type``, and a re-saved tokenizer differs.
    The head, one tensor with the embedding in memory, is stored beside it where the base does so: by the base's config
    it may not be tied, and whoever loads a copy without it then gets a head of random numbers.

    Args:
        model: ``Qwen3ASRForConditionalGeneration``, on any device.
        folder: Replaced if it exists.
        base: The checkpoint that the model was made from.
        dtype: Of the weights, as the config shall say.
        beside: Further JSON files of the folder: names and contents.
    """
    state = model.state_dict()
    if HEAD in stored_shapes(base):
        state[HEAD] = state[HEAD].clone()  # else it counts as shared and is left out
    with atomic_folder(folder) as temporary:
        with prints_as_debug(log):
            model.save_pretrained(temporary, state_dict=state, safe_serialization=True)
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        for section in (config, config.get("thinker_config", {})):
            if "torch_dtype" in section:
                section["torch_dtype"] = dtype
            if "dtype" in section:
                section["dtype"] = dtype
        (temporary / "config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        for name in PROCESSOR_FILES:
            if (base / name).is_file():
                shutil.copyfile(base / name, temporary / name)
            else:
                (temporary / name).unlink(missing_ok=True)
        for name, content in (beside or {}).items():
            write_json(temporary / name, content)
