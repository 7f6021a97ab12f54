"""The sections of the configuration. Every field says its meaning and its unit."""

from core.config.sections.cluster import ClusterConfig
from core.config.sections.data import (
    DataConfig,
    FeaturesConfig,
    FormatName,
    GenerateConfig,
    RuleName,
)
from core.config.sections.decoding import (
    MODEL_SECTIONS,
    PER_MODEL,
    BenchmarkConfig,
    DecodeConfig,
    ServeConfig,
    check_models,
)
from core.config.sections.evaluation import EvalConfig
from core.config.sections.finetuning import FinetuneConfig, check_finetuning
from core.config.sections.load import LoadConfig, Phase
from core.config.sections.models import ConvertConfig, ExportConfig, TargetConfig, TemplateName
from core.config.sections.training import TrackingConfig, TrainConfig

__all__ = [
    "MODEL_SECTIONS",
    "PER_MODEL",
    "BenchmarkConfig",
    "ClusterConfig",
    "ConvertConfig",
    "DataConfig",
    "DecodeConfig",
    "EvalConfig",
    "ExportConfig",
    "FeaturesConfig",
    "FinetuneConfig",
    "FormatName",
    "GenerateConfig",
    "LoadConfig",
    "Phase",
    "RuleName",
    "ServeConfig",
    "TargetConfig",
    "TemplateName",
    "TrackingConfig",
    "TrainConfig",
    "check_finetuning",
    "check_models",
]
