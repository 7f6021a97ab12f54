"""The typed configuration. Nothing here imports torch or Ray."""

from core.config.base import Section
from core.config.draft import DRAFT_CONFIGS, DraftConfig
from core.config.load import describe, load_config
from core.config.schema import Config
from core.config.sections import (
    BenchmarkConfig,
    ClusterConfig,
    ConvertConfig,
    DataConfig,
    DecodeConfig,
    EvalConfig,
    ExportConfig,
    FeaturesConfig,
    FinetuneConfig,
    GenerateConfig,
    LoadConfig,
    ServeConfig,
    TargetConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "DRAFT_CONFIGS",
    "BenchmarkConfig",
    "ClusterConfig",
    "Config",
    "ConvertConfig",
    "DataConfig",
    "DecodeConfig",
    "DraftConfig",
    "EvalConfig",
    "ExportConfig",
    "FeaturesConfig",
    "FinetuneConfig",
    "GenerateConfig",
    "LoadConfig",
    "Section",
    "ServeConfig",
    "TargetConfig",
    "TrackingConfig",
    "TrainConfig",
    "describe",
    "load_config",
]
