"""The text of an error, which is all that other programs report."""

from __future__ import annotations

import pickle

import pytest

from port_kit.errors import InputError, ParallelError, PortKitError


@pytest.mark.parametrize("hint", ["", "use 2"])
@pytest.mark.parametrize("kind", [ParallelError, InputError])
def test_the_text_holds_code_message_and_hint(kind: type[PortKitError], hint: str) -> None:
    error = kind("tp is 3", code="parallel_degree", hint=hint, possible=[2])
    assert str(error) == "[parallel_degree] tp is 3" + ("\nhint: use 2" if hint else "")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.details) == (kind, str(error), {"possible": [2]})


def test_a_code_that_is_not_listed_cannot_be_raised() -> None:
    with pytest.raises(KeyError, match="no_such_code"):
        PortKitError("tp is 3", code="no_such_code")
