"""What a person can put right: every such error is an `AlitError` whose message is a sentence for that person.

    AlitError (a ValueError)
    ├── ConfigError       a model or training configuration
    ├── CriterionError    a token-selection criterion
    ├── ImageError        an image's bytes
    ├── WeightsError      a weights folder
    ├── CheckpointError   a published checkpoint
    ├── DatasetError      a token dataset
    ├── TrainingError     a training run
    ├── InputError        the input of a job        (jobs.listing)
    └── StorageError      a place to read or write  (jobs.storage)

`ImageError` lives in `alit.formats`, beside its reasons.
"""


class AlitError(ValueError):
    """The base of all errors that a person can put right."""


class ConfigError(AlitError):
    """A model or training configuration that cannot be."""


class CriterionError(AlitError):
    """A criterion that does not parse, or that the model cannot follow."""


class WeightsError(AlitError):
    """A weights folder that cannot be used."""


class CheckpointError(AlitError):
    """A published checkpoint that cannot be converted."""


class DatasetError(AlitError):
    """A folder that is no readable token dataset."""


class TrainingError(AlitError):
    """Training that cannot start or go on."""
