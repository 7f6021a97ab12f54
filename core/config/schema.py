"""The whole schema: one class, of which each job reads the sections it names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError, field_validator, model_validator

from core.config import sections
from core.config.base import Section, setting
from core.config.draft import DEFAULT_DRAFT_KIND, DRAFT_CONFIGS, AnyDraftConfig
from core.config.explain import explain


class Config(Section):
    """Everything a job can be told."""

    output: str | None = setting(None, "folder of this run; absolute on a cluster")
    overwrite: bool = setting(False, "replace another run's results in the output folder")
    convert: sections.ConvertConfig = sections.ConvertConfig()
    target: sections.TargetConfig = sections.TargetConfig()
    data: sections.DataConfig = sections.DataConfig()
    generate: sections.GenerateConfig = sections.GenerateConfig()
    features: sections.FeaturesConfig = sections.FeaturesConfig()
    draft: AnyDraftConfig = DRAFT_CONFIGS[DEFAULT_DRAFT_KIND].model_validate({})
    train: sections.TrainConfig = sections.TrainConfig()
    finetune: sections.FinetuneConfig = sections.FinetuneConfig()
    decode: sections.DecodeConfig = sections.DecodeConfig()
    eval: sections.EvalConfig = sections.EvalConfig()
    export: sections.ExportConfig = sections.ExportConfig()
    benchmark: sections.BenchmarkConfig = sections.BenchmarkConfig()
    serve: sections.ServeConfig = sections.ServeConfig()
    load: sections.LoadConfig = sections.LoadConfig()
    tracking: sections.TrackingConfig = sections.TrackingConfig()
    cluster: sections.ClusterConfig = sections.ClusterConfig()

    @field_validator("draft", mode="before")
    @classmethod
    def _name_the_kind(cls, value: Any) -> Any:
        """`draft.vocab_size=…` alone means the default kind."""
        if isinstance(value, dict):
            return {"kind": DEFAULT_DRAFT_KIND, **value}
        return value

    @model_validator(mode="after")
    def _finetuning_is_possible(self) -> Config:
        sections.check_finetuning(self.finetune, self.train)
        return self

    @model_validator(mode="after")
    def _models_are_possible(self) -> Config:
        sections.check_models(self.serve)
        self.served_models()
        return self

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

    def served_models(self) -> dict[str, Config]:
        """What is served, by name; first the one for requests that name none.

        Each has its own sections target, draft, decode and serve, and no further `serve.models`.
        """
        if not self.serve.models:
            return {self.serve.model_name: self}
        names = sorted(self.serve.models, key=lambda name: name != self.serve.model_name)
        return {name: self._served(name, self.serve.models[name]) for name in names}

    def with_models(self, models: Mapping[str, Config]) -> Config:
        """A copy that serves these, of the same names as `served_models` gives."""
        if not self.serve.models:
            return next(iter(models.values()))
        changes: dict[str, Any] = {}
        for name in self.serve.models:
            values = models[name].model_dump(include=set(sections.MODEL_SECTIONS))
            serve = {key: values["serve"][key] for key in sections.PER_MODEL}
            changes[name] = {**values, "serve": serve}
        return self.replace(serve={"models": changes})

    def _served(self, name: str, changes: Mapping[Any, Any]) -> Config:
        serve = {**changes.get("serve", {}), "model_name": name, "models": {}}
        try:
            return self.replace(**{**changes, "serve": serve})
        except ValidationError as error:
            raise ValueError(f"serve.models.{name}: {explain(error, type(self))}") from error

    def identity(self, sections: Iterable[str]) -> dict[str, Any]:
        """The values of these sections that can change a result, for a stage's identity."""
        return {
            name: {key: value for key, value in values.items() if self._counts(name, key)}
            for name, values in self.shown(sections).items()
        }

    def shown(self, sections: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The values of sections, as plain data.

        Args:
            sections: names, or `section.field` where a stage reads that field alone.
        """
        picture: dict[str, dict[str, Any]] = {}
        for one in sections:
            name, _, only = one.partition(".")
            values = getattr(self, name).model_dump(mode="json")
            found = picture.setdefault(name, {})
            found.update({only: values[only]} if only else values)
        return picture

    def _counts(self, section: str, key: str) -> bool:
        extra = type(getattr(self, section)).model_fields[key].json_schema_extra
        return not (isinstance(extra, dict) and extra.get("identity") is False)
