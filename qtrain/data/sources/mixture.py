from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from qtrain.config.settings import family, proportions
from qtrain.data.base import DataSettings

if TYPE_CHECKING:
    from qtrain.data.base import DataSettings as Part
else:
    Part = family("qtrain.data.sources", without="mixture")


class Mixture(DataSettings):
    """Several sources, in the proportion of their weights: each sample of model.seq_len tokens is of one of them.

    parts: the sources by name, each with the settings of a source.
    weights: how many samples each gives, by the same names; their proportion counts.
    """

    source: Literal["mixture"]
    parts: dict[str, Part] = Field(default_factory=dict)
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> Mixture:
        if not self.parts:
            raise ValueError(
                "data.source=mixture needs data.parts and data.weights: +data@data.parts.web=c4 "
                "+data@data.parts.code=python_env data.weights='{web: 3, code: 1}'"
            )
        for name, part in self.parts.items():
            part.check_beside(f"data.parts.{name}")
        if self.parts.keys() != self.weights.keys():
            raise ValueError(
                f"data.weights names {', '.join(sorted(self.weights)) or 'nothing'}, and data.parts "
                f"{', '.join(sorted(self.parts))}; give each part its weight"
            )
        return self

    @property
    def reads_to_the_budget(self) -> bool:
        return any(part.reads_to_the_budget for part in self.parts.values())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.parts))

    def __str__(self) -> str:
        whole = proportions(self.weights)
        return f"{self.source} ({', '.join(f'{weight} {name}' for name, weight in whole.items())})"

    def __hash__(self) -> int:
        return hash(self.model_dump_json())
