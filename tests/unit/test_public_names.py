"""Names that code outside of `core` relies on. A change here is a change of interface."""

from __future__ import annotations

import inspect

import pytest

import core.config
import core.errors
from core import errors

ERRORS = {
    "AerieError": "Exception",
    "UserError": "AerieError",
    "ConfigError": "UserError",
    "InputError": "UserError",
    "ResourceError": "UserError",
    "MismatchError": "UserError",
    "ShapeError": "AerieError",
    "BusyError": "AerieError",
    "StageError": "AerieError",
}
CONFIG = {
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
}


def test_the_error_tree() -> None:
    classes = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls)}
    assert {name: cls.__bases__[0].__name__ for name, cls in classes.items()} == ERRORS
    documented = core.errors.__doc__ or ""
    assert all(name in documented for name in ERRORS)


@pytest.mark.parametrize("name", ["UserError", "ShapeError"])
def test_wrong_values_are_value_errors(name: str) -> None:
    assert issubclass(getattr(errors, name), ValueError)


def test_exit_codes() -> None:
    assert (errors.EXIT_DONE, errors.EXIT_FAILURE, errors.EXIT_USER_ERROR) == (0, 1, 2)


def test_names_of_the_configuration() -> None:
    assert set(core.config.__all__) == CONFIG
    assert all(hasattr(core.config, name) for name in CONFIG)
