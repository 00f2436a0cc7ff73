"""What can go wrong, as one family of exceptions, each with the exit code of the command that meets it.

| code | meaning |
|---|---|
| 0 | done |
| 1 | failed, or done but for images that could not be read, or the folder is in use |
| 2 | usage or config, a folder of another run's fingerprint, a combination that cannot be |
| 3 | a gate refused: size, parity, accuracy, deadline |
| 130 | interrupted, work so far saved |
"""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_REFUSED = 3
EXIT_INTERRUPTED = 130


class ParkdetError(Exception):
    """Something the user can act on: the message says what, where and the remedy."""

    exit_code = EXIT_FAILED


class DataError(ParkdetError):
    """The data set is not what it should be: a file is missing, unreadable or contradicts another."""


class ArtifactError(ParkdetError):
    """A checkpoint, graph, engine or shard is damaged, of another version, or does not describe itself."""


class InUseError(ParkdetError):
    """Another process works in the same folder."""


class UsageError(ParkdetError):
    """The command line asks for something that does not exist or cannot be."""

    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    """A settings file or a `key=value` override is wrong; the message holds every finding, one a line."""


class GateError(ParkdetError):
    """A gate refused the result: too large, too different, not accurate enough, too late."""

    exit_code = EXIT_REFUSED


class Interrupted(ParkdetError):  # noqa: N818 - it is not an error: the work so far is saved
    """Stopped by Ctrl-C or a termination signal after the work so far was saved."""

    exit_code = EXIT_INTERRUPTED
