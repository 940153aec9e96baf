"""What all sections of a config are."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

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

assert set(SPLITS) == set(Split.__args__)  # type: ignore[attr-defined]  # Literal's values, the schema's constants


class Section(BaseModel):
    """Base of all sections: frozen, and no name that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field of one is, if it is one."""
    return _as_section(field.annotation)


def entry_of(field: FieldInfo) -> type[Section] | None:
    """The section that each value of a field is, if that is a dict of them."""
    return _as_section(get_args(field.annotation)[1]) if get_origin(field.annotation) is dict else None


def _as_section(kind: Any) -> type[Section] | None:
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def check_order(bounds: Mapping[str, tuple[float, float]]) -> None:
    """Refuse settings, by name, of which the lower bound is above the higher one.

    Raises:
        ConfigError: Names the first one.
    """
    for name, (low, high) in bounds.items():
        if low > high:
            raise ConfigError(f"{name} must be the lower and the higher bound, got {low:g} and {high:g}; swap them")
