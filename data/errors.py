"""What can be wrong with the data; every message says where, what, what was expected and how to fix it."""


class DataError(ValueError):
    """A line, a clip or an example cannot be used as it is."""


class AudioError(DataError):
    """An audio file is missing, unreadable, empty, silent, not finite or too long."""


class SkippedClipError(AudioError):
    """A clip is too long and the settings ask to leave such clips out: callers count it and go on."""
