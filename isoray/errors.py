"""The ways a run can fail, each with the exit status it ends in and what to do next.

A message says what was wrong, where, what was expected and what to do; the command line prints it without a traceback.
Anything that is not an :class:`IsorayError` is a bug of ours (exit status 1).
"""

from __future__ import annotations


class IsorayError(Exception):
    """Base of all errors that are told to a person rather than shown as a traceback."""

    exit_status = 1


class UserError(IsorayError):
    """The configuration or the command line is at fault."""

    exit_status = 2


class DataError(UserError):
    """The input data is at fault: a missing column, a broken row, an empty corpus."""


class PolicyError(IsorayError):
    """The lineage policy refuses the data."""

    exit_status = 3


class NumericError(IsorayError):
    """The numbers broke down (NaN, divergence, nothing trains); the last good state is kept."""

    exit_status = 4


class InfraError(IsorayError):
    """Workers, nodes or storage failed; running the same command again is safe and goes on where it stopped."""

    exit_status = 5
