"""The whole schema: one class, of which each job reads the sections it names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import field_validator

from core.config.base import Section, setting
from core.config.draft import DEFAULT_DRAFT_KIND, DRAFT_CONFIGS, AnyDraftConfig
from core.config.sections import (
    BenchmarkConfig,
    ClusterConfig,
    ConvertConfig,
    DataConfig,
    DecodeConfig,
    EvalConfig,
    FeaturesConfig,
    GenerateConfig,
    ServeConfig,
    TargetConfig,
    TrackingConfig,
    TrainConfig,
)


class Config(Section):
    """Everything a job can be told."""

    output: str | None = setting(None, "folder of this run; absolute on a cluster")
    overwrite: bool = setting(False, "replace another run's results in the output folder")
    convert: ConvertConfig = ConvertConfig()
    target: TargetConfig = TargetConfig()
    data: DataConfig = DataConfig()
    generate: GenerateConfig = GenerateConfig()
    features: FeaturesConfig = FeaturesConfig()
    draft: AnyDraftConfig = DRAFT_CONFIGS[DEFAULT_DRAFT_KIND].model_validate({})
    train: TrainConfig = TrainConfig()
    decode: DecodeConfig = DecodeConfig()
    eval: EvalConfig = EvalConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    serve: ServeConfig = ServeConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("draft", mode="before")
    @classmethod
    def _name_the_kind(cls, value: Any) -> Any:
        """`draft.vocab_size=…` alone means the default kind."""
        if isinstance(value, dict):
            return {"kind": DEFAULT_DRAFT_KIND, **value}
        return value

    def replace(self, **changes: Any) -> Config:
        """A validated copy; a section's changes are a mapping: `replace(target={"path": p})`.

        Another `kind` of draft begins from its own defaults: it has other fields.
        """
        values = self.model_dump()
        for name, change in changes.items():
            if name == "draft" and change.get("kind", self.draft.kind) != self.draft.kind:
                values[name] = change
            elif isinstance(change, dict):
                values[name].update(change)
            else:
                values[name] = change
        return Config.model_validate(values)

    def identity(self, sections: Iterable[str]) -> dict[str, Any]:
        """The values of these sections that can change a result, for a stage's identity."""
        picture: dict[str, Any] = {}
        for name in sections:
            section: Section = getattr(self, name)
            picture[name] = {
                key: value
                for key, value in section.model_dump(mode="json").items()
                if _counts(type(section), key)
            }
        return picture


def _counts(section: type[Section], key: str) -> bool:
    extra = section.model_fields[key].json_schema_extra
    return not (isinstance(extra, dict) and extra.get("identity") is False)
