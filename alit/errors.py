"""User errors: every one is an `AlitError` whose message explains the problem and how to fix it.

    AlitError (a ValueError)
    ├── ConfigError       a model or training configuration
    ├── CriterionError    a token-selection criterion
    ├── ImageError        an image's bytes
    ├── WeightsError      a weights folder
    ├── CheckpointError   a published checkpoint
    ├── DatasetError      a token dataset
    ├── TrainingError     a training run
    ├── InputError        the input of a job            (jobs.sources)
    └── StorageError      a path to read from or write  (jobs.storage)

`ImageError` is defined in `alit.images.formats`, together with its reasons.
"""


class AlitError(ValueError):
    """The base class of all user errors."""


class ConfigError(AlitError):
    """A model or training configuration is invalid."""


class CriterionError(AlitError):
    """A criterion does not parse, or the model cannot follow it."""


class WeightsError(AlitError):
    """A weights folder or file cannot be used."""


class CheckpointError(AlitError):
    """A published checkpoint cannot be converted."""


class DatasetError(AlitError):
    """A folder is not a readable token dataset."""


class TrainingError(AlitError):
    """Training cannot start or continue."""
