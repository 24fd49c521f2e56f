"""What is and what is not taken for a lost connection."""

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from dsc_hf.hub_errors import lost_connection, unreadable

try:
    import httpx2 as httpx  # what huggingface_hub uses depends on its version
except ImportError:
    import httpx


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("cause", [httpx.ReadError("gone"), httpx.ReadTimeout("late"), ConnectionResetError("reset")])
def test_a_lost_connection_is_found_behind_an_error(cause, explicit):
    error = OSError("no file pytorch_model.bin")
    setattr(error, "__cause__" if explicit else "__context__", cause)
    assert lost_connection(error) is cause
    message = str(unreadable("The checkpoint 'me/it'", error, "Check the id."))
    assert message.startswith("The checkpoint 'me/it' could not be fetched whole: the connection failed")
    assert str(cause) in message and "pytorch_model" not in message


@pytest.mark.parametrize(
    "cause", [FileNotFoundError("x"), PermissionError("x"), OfflineModeIsEnabled("off"), KeyError()]
)
def test_other_errors_are_told_as_they_are(cause):
    error = OSError("no such file.")
    error.__cause__ = cause
    assert lost_connection(error) is None
    assert str(unreadable("It", error, "Check the id.")) == "It could not be read: no such file. Check the id."


def test_causes_in_a_circle_end():
    error, cause = ValueError(), KeyError()
    error.__context__, cause.__context__ = cause, error
    assert lost_connection(error) is None
