"""Errors of loading, told as what happened: transformers calls a broken download a missing `pytorch_model.bin`."""

from __future__ import annotations

from collections.abc import Iterator

from huggingface_hub.errors import OfflineModeIsEnabled


def lost_connection(error: BaseException) -> BaseException | None:
    """The failure of the network behind an error, or None if there is none."""
    for cause in _causes(error):
        kinds = {f"{kind.__module__.split('.')[0].rstrip('2')}.{kind.__name__}" for kind in type(cause).__mro__}
        network = kinds & {"httpx.TransportError", "builtins.ConnectionError", "builtins.TimeoutError"}
        if network and not isinstance(cause, OfflineModeIsEnabled):
            return cause
    return None


def unreadable(what: str, error: BaseException, advice: str) -> ValueError:
    """The error to raise when a checkpoint can't be read.

    Args:
        what (`str`): names the checkpoint.
        error (`BaseException`): what transformers raised.
        advice (`str`): what to do if the network was not the cause.
    """
    cause = lost_connection(error)
    if cause is None:
        return ValueError(f"{what} could not be read: {str(error).rstrip('. ')}. {advice}".rstrip())
    return ValueError(
        f"{what} could not be fetched whole: the connection failed ({type(cause).__name__}: {cause}). Nothing was "
        "loaded; try again, files that were complete are not fetched again."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it, the last first."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
