"""The type of what tells the time: Unix seconds. Passed in, so that a test can bring its own."""

from collections.abc import Callable
from typing import TypeAlias

Clock: TypeAlias = Callable[[], float]
