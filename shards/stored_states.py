"""The stored hidden states of any labelled utterance: which label file's, and where in it."""

from pathlib import Path

from shards.errors import ShardError
from shards.hidden import Bits, HiddenStates, hidden_path
from shards.index import read_index
from shards.labelled import LabelledTable
from shards.labels import label_path, read_label_file, second_path


class StoredStates:
    """Hidden states beside the label files of a run; a file is opened, and its label file read, when first needed.

    What is open is mapped, not read: it takes no memory that the machine could not have back.
    """

    def __init__(self, pack_folder: Path, label_folder: Path) -> None:
        """Look after the label files of an index.

        Args:
            pack_folder: Of the index.
            label_folder: Of the label files.
        """
        self._label_folder = label_folder
        self._hashes = {entry.name: entry.sha256 for entry in read_index(pack_folder).shards}
        self._open: dict[tuple[str, bool], HiddenStates] = {}

    def rows(self, table: LabelledTable, row: int) -> Bits:
        """The states of a row's response tokens, ``[tokens, width]``: what the LM head read to choose each.

        Raises:
            ShardError: Its label file has no hidden states beside it, or others.
        """
        utterance, response = table[row]
        place = utterance.shard, bool(table.responses.is_second[row])
        if place not in self._open:
            self._open[place] = self._states(*place)
        return self._open[place].rows(int(table.responses.hidden_starts[row]), len(response.token_ids))

    def _states(self, shard: str, is_second: bool) -> HiddenStates:
        first = file = read_label_file(label_path(self._label_folder, shard), shard_sha256=self._hashes[shard])
        if is_second:
            file = read_label_file(second_path(self._label_folder, shard), first_sha256=first.sha256)
        if file.header.hidden is None:
            raise ShardError(f"{file.path} must have hidden states beside it, got none; label again with them")
        return HiddenStates(hidden_path(file.path), file.header.hidden, num_tokens=file.num_tokens)
