"""Settings of the whole test suite, and the command line as a fixture."""

from types import SimpleNamespace

import pytest
from hypothesis import settings

# The same examples every time, and no deadline: a busy machine must not decide whether the suite passes.
settings.register_profile("bitwright", derandomize=True, deadline=None)
settings.load_profile("bitwright")


@pytest.fixture
def run(capsys):
    """Run a command; gives status, output and error text."""
    from bitwright.cli import main

    def run(*words):
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run
