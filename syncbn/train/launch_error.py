"""The error of processes that were started for a run."""

from __future__ import annotations


class LaunchError(RuntimeError):
    """The processes failed. The message is what they reported, or ends with their last output.

    Attributes:
        mistake: whether it is a mistake of the user's, and not of the machine, such as a full disk.
    """

    def __init__(self, message: str, mistake: bool = False) -> None:
        super().__init__(message)
        self.mistake = mistake
