"""Settings for property tests: no deadline, since timing never decides a test."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("evermind", deadline=None)
settings.load_profile("evermind")
