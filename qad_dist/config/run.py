"""A run's settings: one YAML file, one frozen pydantic model per section, unknown names refused.

Validation happens here, once; the stages trust what they are given. Relative paths start at the folder that the program
is started in, which is the project's for ``launch/run.sh`` and ``launch/demo.sh``. ``${QAD_NAME}`` is replaced by that
environment variable; only names that begin with ``QAD_`` are, so that no secret can slip into a saved config.
"""

import difflib
from pathlib import Path
from typing import Self

import yaml
from pydantic import Field, ValidationError, model_validator

from qad_dist.config.export import ExportConfig
from qad_dist.config.label import LabelConfig
from qad_dist.config.model import ModelConfig
from qad_dist.config.pack import PackConfig, ReadConfig
from qad_dist.config.quantize import QuantizeConfig
from qad_dist.config.score import ScoreConfig
from qad_dist.config.section import Section, entry_of, section_of
from qad_dist.config.splice import SpliceConfig
from qad_dist.config.train import TrainConfig
from qad_dist.config.values import apply_override, expand, read_values
from shards.errors import ConfigError


class RunConfig(Section):
    """One run: everything it writes is below ``run``."""

    run: str
    """Folder of the run; each stage writes ``<run>/<stage>/``."""
    seed: int = Field(default=0, ge=0)
    """Decides hold-out, order of shards and order of training data."""
    model: ModelConfig
    pack: PackConfig
    splice: SpliceConfig = SpliceConfig()
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
    values = read_values(Path(path))
    for override in overrides or []:
        apply_override(values, override)
    values = expand(values, where="")
    try:
        return RunConfig.model_validate(values)
    except ValidationError as cause:
        raise ConfigError(_explain(cause, Path(path))) from cause


def dump_run(run: RunConfig) -> str:
    """The resolved config as YAML that :func:`load_run` reads back to an equal config."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


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
    section: type[Section] | None = RunConfig
    entry: type[Section] | None = None
    for name in path:
        if entry is not None:  # the name is the user's
            section, entry = entry, None
        elif section is None or (field := section.model_fields.get(name)) is None:
            return []
        else:
            section, entry = section_of(field), entry_of(field)
    return [] if section is None else list(section.model_fields)
