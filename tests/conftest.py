"""Settings of the whole test suite."""

from hypothesis import settings

# The same examples every time, and no deadline: a busy machine must not decide whether the suite passes.
settings.register_profile("bitwright", derandomize=True, deadline=None)
settings.load_profile("bitwright")
