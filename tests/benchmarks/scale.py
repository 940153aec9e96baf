"""A program: what it costs to begin reading a very large data set: index, plan and first micro-batch.

    python -m tests.benchmarks.scale [--utterances 1000000 10000000]

The index is synthetic: every one of its tars is the same small tar, which is indexed in place. It is written first,
which does not count. A process of its own then reads index and table, plans an epoch with a language temperature, and
reads the audio of the first micro-batch. A line of JSON for each size has seconds of processor time, microseconds for
an utterance, and the most memory that the process held; ten million utterances are to take at most 60 s and 4 GB.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.columns import schema_of
from shards.index import INDEX, UTTERANCES, ShardEntry, read_utterances
from shards.mixture import Mixture
from shards.plan import Plan
from shards.read import Shards
from shards.schema import TRAIN, Recording, Utterance
from shards.storage import fingerprint, sha256_file, write_json
from tests.helpers.packing import pack_tones
from tests.helpers.tones import write_tone

PER_TAR = 1_000
ROWS_AT_ONCE = 1_000_000
LANGUAGES = 30


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--utterances", type=int, nargs="+", default=[1_000_000, 10_000_000])
    arguments.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    for count in options.utterances:
        with tempfile.TemporaryDirectory() as folder:
            write_index_of(count, Path(folder))
            command = [sys.executable, "-m", "tests.benchmarks.scale", "--measure", f"{folder}/index"]
            subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", "PATH": ""}, cwd=Path(__file__).parents[2])


def measure(folder: Path) -> dict[str, float]:
    """Begin reading, as training does."""
    begun = time.process_time()
    table = read_utterances(folder, splits=[TRAIN])
    seconds = table.numbers("duration_seconds")
    codes, _ = table.codes("language")
    read = time.process_time()
    num_tokens = np.ceil(seconds * 13).astype(np.int64) + 50
    mixture = Mixture(codes, seconds, temperature=2.0, max_hours_per_language=None)
    plan = Plan(
        num_tokens, audio_seconds=seconds, mixture=mixture, seed=0, token_budget=8192, micro_batches_per_step=16
    )
    step = plan.step(0)
    planned = time.process_time()
    samples = Shards(folder).read(table.take(step[0]))
    assert [len(one) / 16_000 for one in samples] == [table[row].duration_seconds for row in step[0]]
    done = time.process_time()
    return {
        "utterances": len(table),
        "seconds": round(done - begun, 2),
        "index_seconds": round(read - begun, 2),
        "plan_seconds": round(planned - read, 2),
        "batch_seconds": round(done - planned, 2),
        "microseconds_per_utterance": round((done - begun) / len(table) * 1e6, 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def write_index_of(count: int, folder: Path) -> None:
    """Write the index of ``count`` utterances in ``count / PER_TAR`` tars that are all one."""
    random = np.random.default_rng(0)
    recordings = [
        Recording(
            path=str(write_tone(folder / "in" / f"{i}.wav", i % 300, seconds=seconds)), key=f"tone-{i}", source="s"
        )
        for i, seconds in enumerate(random.uniform(1, 6, PER_TAR).tolist())
    ]
    pack_tones(recordings, folder / "tar", holdout=0, utterances_per_shard=PER_TAR, drop_duplicates=False)
    tar, index = folder / "tar" / "train-000000.tar", folder / "index"
    index.mkdir()
    rows = read_utterances(folder / "tar").table
    num_tars = count // PER_TAR
    with pq.ParquetWriter(index / UTTERANCES, schema_of(Utterance), compression="zstd") as writer:
        for first in range(0, num_tars, ROWS_AT_ONCE // PER_TAR):
            tars = np.arange(first, min(num_tars, first + ROWS_AT_ONCE // PER_TAR))
            writer.write_table(_rows_of_tars(rows, tars))
    entry = {"bytes": tar.stat().st_size, "sha256": sha256_file(tar), "num_utterances": PER_TAR, "seconds": 1.0}
    entries = [
        ShardEntry(name=f"set-{number:06d}.tar", location=str(tar), seconds_by_language={}, **entry)
        for number in range(num_tars)
    ]
    values = {
        "version": 2,
        "shards": [{name: getattr(entry, name) for name in entry.__slots__} for entry in entries],
        "num_utterances": count,
        "hours": 1.0,
        "hours_by_split_language": {},
        "utterances_sha256": sha256_file(index / UTTERANCES),
        "fingerprint": fingerprint([[entry.name, entry.sha256] for entry in entries]),
    }
    write_json(index / INDEX, values)


def _rows_of_tars(rows: pa.Table, tars: np.ndarray) -> pa.Table:
    """The rows of one tar for each of several, with keys, speakers and languages of their own."""
    count = len(tars) * len(rows)
    table = rows.take(np.tile(np.arange(len(rows)), len(tars)))
    numbers = np.arange(count) + int(tars[0]) * len(rows)
    keys = pa.array([f"corpus-speaker{number % 9_973}-{number:09d}" for number in numbers.tolist()])
    random = np.random.default_rng(int(tars[0]))
    languages = random.zipf(1.5, count) % LANGUAGES
    columns = {
        "key": keys,
        "recording": keys,
        "shard": pa.array([f"set-{number:06d}.tar" for number in np.repeat(tars, len(rows)).tolist()]),
        "speaker": pa.array([f"speaker{number % 9_973}" for number in numbers.tolist()]),
        "language": pa.array([f"Language {code}" for code in languages.tolist()]),
    }
    schema = schema_of(Utterance)
    return pa.table({name: columns.get(name, table.column(name)) for name in schema.names}).cast(schema)


if __name__ == "__main__":
    main()
