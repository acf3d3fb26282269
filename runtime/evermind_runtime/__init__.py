"""Run packages: load only the experts a token routes to, under a hard memory budget.

import evermind_runtime as em
model = em.load("shakespeare/", budget="64MiB")
for piece in model.generate("def ", max_new_tokens=64):
    print(piece.text, end="")
"""

from __future__ import annotations

from .chat import Chat
from .generation import Finish, Piece
from .introspection import Introspection
from .limbic import LimbicSession, LimbicStep
from .model import Model, PagingWarning, ThreadsWarning, load
from .state import State
from .stats import Stats

__all__ = [
    "Chat",
    "Finish",
    "Introspection",
    "LimbicSession",
    "LimbicStep",
    "Model",
    "PagingWarning",
    "Piece",
    "State",
    "Stats",
    "ThreadsWarning",
    "load",
]
