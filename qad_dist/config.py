"""Every setting of a run: one YAML file, one frozen pydantic model per section, unknown names refused.

Validation happens here, once; the stages trust what they are given. Relative paths start at the folder that the program
is started in, which is the project's for ``launch/run.sh`` and ``launch/demo.sh``. ``${QAD_NAME}`` is replaced by that
environment variable; only names that begin with ``QAD_`` are, so that no secret can slip into a saved config.
"""

import difflib
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from qad_dist.filters import FiltersConfig
from qad_dist.quantize_section import QuantizeConfig
from qad_dist.section import Section
from qad_dist.train_section import TrainConfig
from shards.errors import ConfigError
from shards.schema import SPLITS

Split = Literal["train", "heldout", "test"]

SourceKind = Literal[
    "auto",
    "folder",
    "qwen",
    "nemo",
    "lhotse",
    "kaldi",
    "librispeech",
    "vivos",
    "common_voice",
    "fleurs",
    "parquet",
    "nemo_tarred",
    "lhotse_shar",
    "webdataset",
]
"""``auto``, and the modules of :mod:`shards.sources`."""

MAX_CONFIG_BYTES = 1_000_000


class ModelConfig(Section):
    """The ``model:`` section: the full-precision teacher, from which the student is made."""

    path: str
    """Folder of a Qwen3-ASR checkpoint, or its hub id."""
    revision: str | None = None
    """Commit of the hub id; no effect for a folder."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What teacher and student compute in. Calibration and the masters of training are float32 either way."""
    audio_attention: Literal["windowed", "full"] = "windowed"
    """The audio tower's attention: 8 s windows, as the model was trained and is served, or the whole utterance."""


class PackConfig(Section):
    """The ``pack:`` section: recordings in, shards out."""

    inputs: list[str] = Field(min_length=1)
    """Manifests, corpora and folders of audio, read in this order; also ``http(s)://`` and ``s3://`` addresses."""
    source: SourceKind = "auto"
    """What the inputs are; ``auto`` sees it from what is there."""
    in_place: bool = False
    """Index WebDataset tars where they are, instead of packing a copy; all audio is decoded once, to check it."""
    language: str | None = None
    """Language of utterances whose source does not name one (one of the model's 30 names, or a code such as ``vi``)."""
    splits: dict[str, Split] = {"train": "train", "dev": "heldout", "heldout": "heldout", "test": "test"}
    """The source's split names and what they mean here; an utterance whose split is not listed is refused."""
    holdout: float = Field(default=0.05, ge=0, lt=1)
    """Share of the training recordings set aside per language as ``heldout``; 0 where the sources name such a split."""
    holdout_by: Literal["speaker", "recording"] = "speaker"
    """Whole speakers are set aside where they are known, else single recordings."""
    exclude: list[str] = []
    """Test sets, in any form that ``inputs`` may have: what sounds exactly like one of their utterances is dropped."""
    hours_per_shard: float = Field(default=1.0, gt=0)
    """About how much audio a shard holds. Smaller ones share out better over ranks, larger ones read faster."""
    bytes_per_shard: int | None = Field(default=None, ge=1_000_000)
    """Where this is less than ``hours_per_shard``: size of a shard, counting 32,000 bytes a second (uncompressed)."""
    utterances_per_shard: int = Field(default=10_000, ge=1)
    """A shard holds no more recordings than this, however short they are."""
    min_audio_seconds: float = Field(default=0.1, ge=0.05)
    """Shorter recordings are rejected."""
    max_audio_seconds: float = Field(default=30.0, ge=1, le=1200)
    """Longest utterance; what happens to longer recordings is said by ``long_recordings``."""
    long_recordings: Literal["energy", "vad", "reject"] = "energy"
    """Cut where they are quietest, or where silero-vad hears no speech (the extra ``vad``); or reject them."""
    max_recording_hours: float = Field(default=6.0, gt=0)
    """Longer recordings are rejected: the whole of one must fit in memory, as FLAC (66 MB an hour)."""
    drop_duplicates: bool = True
    """Of utterances with exactly the same samples keep one: that of test before heldout before train."""
    max_rejected_share: float = Field(default=0.05, ge=0, le=1)
    """Packing stops with an error when a larger share of the recordings cannot be used; duplicates do not count."""
    processes: int = Field(default=0, ge=0)
    """Packing processes; 0 is one for each core. The shards' bytes do not depend on it."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if self.min_audio_seconds > self.max_audio_seconds / 4:
            raise ConfigError(
                f"pack.min_audio_seconds must be at most a quarter of pack.max_audio_seconds "
                f"({self.max_audio_seconds:g}), got {self.min_audio_seconds:g}; a cut must leave two utterances"
            )
        return self


class ReadConfig(Section):
    """The ``read:`` section: how every stage reads the shards. Results do not depend on it."""

    workers: int = Field(default=4, ge=0)
    """Processes of each rank that decode audio ahead of the model; 0 decodes in the rank itself."""
    cache: str | None = None
    """Folder for copies of shards that lie behind an address, best on a local disk; needed only for those."""
    cache_gib: float = Field(default=200.0, gt=0)
    """Size of that folder; the shards that were used longest ago go first."""
    max_quarantined_share: float = Field(default=0.01, ge=0, le=1)
    """Training leaves out utterances that cannot be read any more, and stops above this share of them."""


class LabelConfig(Section):
    """The ``label:`` section: the teacher's pass over the shards."""

    splits: list[Split] = ["train", "heldout"]
    """Splits to label. ``test`` is decoded by score."""
    max_hours_per_language: float | None = Field(default=None, gt=0)
    """Most audio of one language to label in each split, in the order of the shards; the rest is left unlabelled."""
    language: Literal["auto", "manifest"] = "auto"
    """``auto``: the teacher names the language; ``manifest``: it is told the source's, where there is one."""
    context: str = Field(default="", max_length=10_000)
    """Text of the prompt's system turn: names and terms to expect. Training and calibration use the same prompt."""
    second_pass: Literal["none", "manifest"] = "none"  # noqa: S105  no password
    """``manifest``: rejected utterances are labelled once more, with the source's language, where there is one."""
    batch_audio_seconds: float = Field(default=160.0, gt=0)
    """Audio that goes through the audio tower and the prompts' forward pass at once, padding counted."""
    slots: int = Field(default=128, ge=1)
    """Utterances of a rank that are decoded at once; an ended one makes place for the next of its shard."""
    max_response_tokens: int = Field(default=448, ge=8)
    """A response that is longer counts as runaway (``ended_by: length``)."""
    max_tokens_per_second: float = Field(default=25.0, gt=0)
    """So does one that is longer than 32 tokens and this many for each second of its audio."""
    hidden_states: bool = False
    """Also store the teacher's final hidden states, 2 KB a token, for training without its forward pass."""
    stale_seconds: float = Field(default=120.0, ge=1)
    """A rank that makes no progress for so long loses its shard to another one."""
    backend: Literal["torch", "vllm"] = "torch"
    """What decodes: this project, or a vLLM server."""
    vllm_url: str | None = None
    """Address of a server that runs with ``--enable-scale-out``; None starts one a rank with ``vllm_python``."""
    vllm_python: str | None = None
    """Python of an environment that has vLLM; it cannot be this one, as it needs another torch."""
    filters: FiltersConfig = FiltersConfig()
    """Which labels are used for calibration and training."""

    @model_validator(mode="after")
    def _backend_fits(self) -> Self:
        if self.backend == "vllm" and self.vllm_url is None and self.vllm_python is None:
            raise ConfigError(
                "label.backend vllm needs a server, got neither label.vllm_url nor label.vllm_python; set one of them"
            )
        if self.backend == "vllm" and self.hidden_states:
            raise ConfigError("label.hidden_states needs label.backend torch, got vllm; vLLM does not give them")
        return self


class ScoreConfig(Section):
    """The ``score:`` section: WER, CER and KL of any number of systems on the same utterances."""

    splits: list[Split] = ["test"]
    """Splits to score."""
    systems: dict[str, str] = {}
    """Further systems beside teacher, ptq and qad: name to model folder or hub id."""
    batch_audio_seconds: float = Field(default=160.0, gt=0)
    """Audio in one decoding batch, padding counted."""
    max_response_tokens: int = Field(default=448, ge=8)
    """Longest response."""
    arithmetic: Literal["fake_quant", "int8"] = "fake_quant"
    """How quantized systems compute: with quantized values in ``model.dtype``, as they were trained, or in integers."""

    @field_validator("systems")
    @classmethod
    def _names_are_free(cls, systems: dict[str, str]) -> dict[str, str]:
        for name in systems:
            if name in ("teacher", "ptq", "qad") or not re.fullmatch(r"[a-z0-9_-]+", name):
                raise ConfigError(
                    f"score.systems names must match [a-z0-9_-]+ and not be teacher, ptq, qad, got {name!r}; rename it"
                )
        return systems


class ExportConfig(Section):
    """The ``export:`` section: a folder that others load."""

    format: Literal["modelopt"] = "modelopt"
    """``modelopt``: fake-quantized Hugging Face folder for ``mto.enable_huggingface_checkpointing()``."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Dtype of the stored weights; ``null`` keeps ``model.dtype``, the only one that is bit for bit the student."""
    verify_utterances: int = Field(default=8, ge=1)
    """Utterances that the reloaded folder and the student must transcribe alike."""


class RunConfig(Section):
    """One run: everything it writes is below ``run``."""

    run: str
    """Folder of the run; each stage writes ``<run>/<stage>/``."""
    seed: int = Field(default=0, ge=0)
    """Decides hold-out, order of shards and order of training data."""
    model: ModelConfig
    pack: PackConfig
    read: ReadConfig = ReadConfig()
    label: LabelConfig = LabelConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    train: TrainConfig = TrainConfig()
    score: ScoreConfig = ScoreConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _cached_states_are_stored(self) -> Self:
        if self.train.teacher == "cached" and not self.label.hidden_states:
            raise ConfigError(
                "train.teacher cached needs label.hidden_states true, got false; set it and label again, or set "
                "train.teacher to online"
            )
        return self

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run)

    def stage_folder(self, stage: str) -> Path:
        """``<run>/<stage>``."""
        return self.folder / stage


def load_run(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read and check a run's YAML.

    Args:
        path: The YAML file.
        overrides: ``section.name=value`` strings, the value in YAML's notation; applied in order.

    Raises:
        ConfigError: The file cannot be read, is not YAML, repeats a key, or breaks a rule of the schema. The message
            names the setting, the value, the rule and the remedy; only the first of several mistakes is told.
    """
    values = _read_yaml(Path(path))
    for override in overrides or []:
        _apply_override(values, override)
    values = _expand(values, where="")
    try:
        return RunConfig.model_validate(values)
    except ValidationError as cause:
        raise ConfigError(_explain(cause, Path(path))) from cause


def dump_run(run: RunConfig) -> str:
    """The resolved config as YAML that :func:`load_run` reads back to an equal config."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe loader that refuses repeated keys (PyYAML keeps the last one silently) and aliases (billion laughs)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: names must be text, got {key!r}; quote it")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: {key!r} appears twice; remove one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():  # also keeps a FIFO or /dev/zero from being opened
            raise ConfigError(f"--config must be a YAML file, got {str(path)!r}; see configs/ for examples")
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} must be smaller than {MAX_CONFIG_BYTES} bytes, got {path.stat().st_size}")
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_UniqueKeyLoader)  # noqa: S506  a SafeLoader
    except OSError as cause:
        raise ConfigError(f"{path} must be readable, got {cause.strerror!r}; mend its permissions") from cause
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as cause:
        if isinstance(cause, ConfigError):
            raise
        raise ConfigError(f"{path} must be YAML, got: {' '.join(str(cause).split())}") from cause
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `name: value` lines, got {type(values).__name__}; see configs/toy.yaml")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    parts = name.split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set must look like section.name=value, got {override!r}; e.g. --set train.steps=100")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506  a SafeLoader
    except (yaml.YAMLError, ValueError) as cause:
        raise ConfigError(f"--set {name} must have a YAML value, got {text!r}; quote it") from cause
    section = values
    for depth, part in enumerate(parts[:-1]):
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            inner = ".".join(parts[: depth + 1])
            raise ConfigError(f"--set {name} must name a setting, got a path through the value {inner!r}")
    section[parts[-1]] = value


def _expand(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand(inner, f"{where}.{key}".lstrip(".")) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if not name.startswith("QAD_"):
            raise ConfigError(f"{where} may only use ${{QAD_...}} variables, got ${{{name}}}; write the value out")
        if name not in os.environ:
            raise ConfigError(f"{where} needs the environment variable {name}, got none; export {name}=...")
        return os.environ[name]

    return re.sub(r"\$\{([^}]*)\}", replace, value)


def _explain(error: ValidationError, path: Path) -> str:
    """One line for the first mistake of a config."""
    first = error.errors()[0]
    names = [str(part) for part in first["loc"] if not str(part).endswith("]")]
    setting = ".".join(names) or str(path)
    if isinstance(cause := first.get("ctx", {}).get("error"), ConfigError):
        return str(cause)
    if first["type"] == "extra_forbidden":
        known = _known_names(names[:-1])
        close = difflib.get_close_matches(names[-1], known, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"known names are: {', '.join(known)}"
        return f"{setting} must be a setting of this project, got an unknown name; {remedy}"
    if first["type"] == "missing":
        return f"{setting} must be set in {path}, got nothing; see configs/README.md"
    rule = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{setting} must be {rule}, got {first['input']!r}; see configs/README.md"


def _known_names(path: list[str]) -> list[str]:
    section: Any = RunConfig
    for name in path:
        field = section.model_fields.get(name)
        section = field.annotation if field else None
        if not (isinstance(section, type) and issubclass(section, Section)):
            return []
    return list(section.model_fields)


README = """\
# Settings

One YAML file per run, one section per stage; `--set section.name=value` changes a setting for one start, and
`--print-config` shows all of them as resolved. Relative paths are relative to the folder that the command is started
in; `${QAD_NAME}` is replaced by that environment variable. Unknown names are refused.

| file | what it is |
|---|---|
| `toy.yaml` | the embedded run of `launch/demo.sh`: a small teacher and spoken digits in 29 languages |
| `an4.yaml` | human speech: AN4 in the folder that `QAD_SPEECH_DIR` names |
| `qwen3-asr-0.6b.yaml` | the real model on one node of 8 GPUs |
| `accelerate/*.yaml` | how many ranks on which machines: `accelerate launch --config_file` |
| `deepspeed/*.json` | what ZeRO shards: `train.deepspeed` |

Made by `python -m qad_dist.config > configs/README.md`; a test compares the two.

"""


def settings_readme() -> str:
    """The text of ``configs/README.md``."""
    return README + settings_table()


def settings_table() -> str:
    """All settings as Markdown: name, type, default, meaning; the body of ``configs/README.md``."""
    lines: list[str] = []
    for name, field in RunConfig.model_fields.items():
        if (section := _section_of(field)) is not None:
            lines += _table(section, name)
    return "\n".join(["## The run", "", *_rows(RunConfig, ""), *lines, ""])


def _section_of(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _table(section: type[Section], name: str) -> list[str]:
    """A section, and behind it the one inside it."""
    doc = _first_line(section.__doc__).replace("``", "`")
    lines = ["", f"## `{name}:`", "", doc, "", *_rows(section, f"{name}.")]
    for inner, field in section.model_fields.items():
        if "." not in name and (nested := _section_of(field)) is not None:
            lines += _table(nested, f"{name}.{inner}")
    return lines


def _rows(section: type[Section], prefix: str) -> list[str]:
    return ["| setting | type | default | meaning |", "|---|---|---|---|", *_settings(section, prefix)]


def _settings(section: type[Section], prefix: str) -> list[str]:
    rows = []
    for name, field in section.model_fields.items():
        if (nested := _section_of(field)) is not None:
            if prefix.count(".") == 2:  # sections in a section of a section have no table of their own
                rows += [f"| **`{prefix}{name}`** | | | {field.description} |", *_settings(nested, f"{prefix}{name}.")]
            continue
        kind = field.annotation
        text = getattr(kind, "__name__", "") if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
        text = text.replace("typing.", "").replace("NoneType", "None").replace("|", "or")
        text = re.sub(r"Optional\[(.*)\]", r"\1 or None", text)
        text = re.sub(r"^Union\[(.*)\]$", r"\1", text)
        text = re.sub(r"Literal\[([^]]*)\]", lambda choices: choices.group(1).replace("'", "`"), text)
        default = "required" if field.is_required() else f"`{field.default!r}`"
        limits = ", ".join(str(rule) for rule in field.metadata)
        limits = re.sub(r"(Ge|Gt|Le|Lt|MinLen|MaxLen)\(\w+=([^)]*)\)", _limit, limits)
        meaning = " ".join((field.description or "").split()).replace("``", "`") + (f" ({limits})" if limits else "")
        rows.append(f"| `{prefix}{name}` | {text} | {default} | {meaning} |")
    return rows


def _limit(match: re.Match[str]) -> str:
    sign = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<", "MinLen": "at least", "MaxLen": "at most"}[match.group(1)]
    return f"{sign} {match.group(2)}"


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]


assert set(SPLITS) == set(Split.__args__)  # type: ignore[attr-defined]  # Literal's values, the schema's constants


if __name__ == "__main__":
    sys.stdout.write(settings_readme())
