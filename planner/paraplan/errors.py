"""The errors a user can mend; every other exception is a bug of ours."""


class PlanError(Exception):
    """Something the user can mend, said in one line, with a hint where one helps.

    Args:
        message: what is wrong, with the value, in one line.
        hint: what to try instead.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")  # for a script that lets it end in a traceback


class InputError(PlanError):
    """An option, a name or a file is wrong: exit code 2."""

    exit_code = 2


class InfeasibleError(PlanError):
    """Every layout was tried and none fits: an answer, exit code 3."""

    exit_code = 3


class ImpossibleError(InputError):
    """The pinned layout cannot be, whatever the memory: its hint or message says by which rule."""


class FrozenLayerError(InputError):
    """A whole layer has nothing to train, which the tracer does not follow."""
