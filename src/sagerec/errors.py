"""The project's own exceptions: each message says what was got, what was expected and how to mend it."""


class SagerecError(Exception):
    """Base of every error that a user can cause; the command line prints it without a traceback."""


class SettingsError(SagerecError):
    """A setting has an unknown name or a value outside its range."""


class DatasetError(SagerecError):
    """A dataset folder does not hold what the canonical form asks for."""


class ArtifactError(SagerecError):
    """An artefact on disk is missing, damaged, or was made from something else."""


class LeakError(SagerecError):
    """A stage used an event that it must not see."""


class TrieError(SagerecError):
    """A prefix that the trie does not hold, or a slate for which no legal item is left."""


class TrainingError(SagerecError):
    """Training cannot go on: a non-finite loss, or no sequence to train on."""


class MissingExtraError(SagerecError):
    """An optional dependency is not installed."""


class NumericalError(SagerecError):
    """A number is not finite where the mathematics asks for one."""


class RewardError(SagerecError):
    """A reward is unknown, impossible on this data, or gave what is no reward."""
