"""Examples of Hypothesis are the same at every run, without a time limit: a change is judged by what it changes."""

from hypothesis import settings

settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")
