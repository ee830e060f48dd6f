"""The errors that deltatc raises for bad input, so that callers can tell them from bugs."""


class DeltatcError(ValueError):
    """Bad input; the message says what, where, what was expected, what came, and what to do."""


class ConfigError(DeltatcError):
    """A key of params.yaml is missing, unknown, of the wrong type or out of range."""


class DataError(DeltatcError):
    """A data file (JSON, JSONL, text) does not hold what its reader needs."""


class FormatError(DeltatcError):
    """A transcoder file does not hold a transcoder."""


class PartsNotRecorded(FormatError):
    """A transcoder cannot be taken apart: it does not record a base and a delta."""


class ModelError(DeltatcError):
    """A model folder is missing or is not of an architecture that deltatc can hook."""


class SiteError(DeltatcError):
    """The declared read/write site of the transcoders is unknown or does not win the site check."""


class PositionError(DeltatcError):
    """A model call does not say which positions are BOS or padding."""


class CalcError(DeltatcError):
    """An expression is outside the calculator's grammar or bounds."""


class OpError(DeltatcError):
    """An argument of an operator has the wrong dtype, device, rank, shape or value."""
