"""What all sections of a config are."""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from shards.errors import ConfigError
from shards.schema import SPLITS

Split = Literal["train", "heldout", "test"]

assert set(SPLITS) == set(Split.__args__)  # type: ignore[attr-defined]  # Literal's values, the schema's constants


class Section(BaseModel):
    """Base of all sections: frozen, and no name that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def check_order(bounds: Mapping[str, tuple[float, float]]) -> None:
    """Refuse settings, by name, of which the lower bound is above the higher one.

    Raises:
        ConfigError: Names the first one.
    """
    for name, (low, high) in bounds.items():
        if low > high:
            raise ConfigError(f"{name} must be the lower and the higher bound, got {low:g} and {high:g}; swap them")
