"""What every table of the schema is: frozen, and without unknown keys."""

from pydantic import BaseModel, ConfigDict


class StrictConfig(BaseModel):
    """A table of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)
