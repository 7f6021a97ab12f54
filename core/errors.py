"""Every error that Aerie raises on purpose.

A message says what is wrong, what was got, and what to do::

    AerieError                   the root: never raised itself
    ├── UserError (ValueError)   the user can mend it: exit code 2, no traceback
    │   ├── ConfigError          a key, a value, or two values that exclude each other
    │   ├── InputError           a file, a record or a folder that is not what it should be
    │   ├── ResourceError        too few CPUs or GPUs, too little memory or disk
    │   └── MismatchError        two artifacts that do not belong together (head and target, …)
    ├── ShapeError (ValueError)  a tensor of the wrong shape: a caller's mistake
    ├── BusyError                more requests than may wait: the same one may succeed later
    └── StageError               a stage failed for a reason that is not the user's: exit code 1
"""

from __future__ import annotations


class AerieError(Exception):
    """Root of all errors that Aerie raises on purpose."""


class UserError(AerieError, ValueError):
    """Something the user can mend; commands exit with code 2 and print the message alone."""


class ConfigError(UserError):
    """A configuration key or value is wrong."""


class InputError(UserError):
    """An input file, record or folder is missing or is not what it should be."""


class ResourceError(UserError):
    """The machine or cluster lacks what the job needs."""


class MismatchError(UserError):
    """Two artifacts do not belong together, such as a draft head and a target."""


class ShapeError(AerieError, ValueError):
    """A tensor has the wrong shape."""


class BusyError(AerieError):
    """More requests wait already than may."""


class StageError(AerieError):
    """A stage failed for a reason other than its input; commands exit with code 1."""


EXIT_DONE, EXIT_FAILURE, EXIT_USER_ERROR = 0, 1, 2
