"""Every error that a user can cause, with the exit code that the command line returns for it.

QloraDpoError            1   base class; catch this one to catch them all
  UsageError             2   the command, an option, or a combination of options
  DataError             65   the content of a data file
  ModelError            65   the content of a model or adapter folder
  StorageError          74   a file or folder that cannot be found, read or written
  EndpointError         69   a server that gives no usable answer
  ResourceError         71   the machine: out of memory, no such device
  TrainingError         70   the numbers of a run stopped making sense
  ProcessLost           71   one of several processes of a run is gone; the same command continues
  Interrupted           75   stopped by a signal; the same command continues
"""


class QloraDpoError(Exception):
    """Base class: `str(error)` says what happened (with the value), why, and what to do."""

    exit_code = 1


class UsageError(QloraDpoError):
    """A command, an option or a combination of options that cannot work."""

    exit_code = 2


class DataError(QloraDpoError):
    """A data file whose content cannot be used."""

    exit_code = 65


class ModelError(QloraDpoError):
    """A model or adapter folder whose content cannot be used."""

    exit_code = 65


class StorageError(QloraDpoError):
    """A file or folder that cannot be found, read or written."""

    exit_code = 74


class EndpointError(QloraDpoError):
    """A server of a model that cannot be reached, refuses, or answers what nobody can read."""

    exit_code = 69


class ResourceError(QloraDpoError):
    """The machine lacks what the run needs: memory or a device."""

    exit_code = 71


class TrainingError(QloraDpoError):
    """The numbers of a run stopped making sense, so going on would waste the machine."""

    exit_code = 70


class ProcessLost(QloraDpoError):
    """Another process of the same run is gone."""

    exit_code = 71


class Interrupted(QloraDpoError):
    """A signal stopped the run after a checkpoint was written."""

    exit_code = 75
