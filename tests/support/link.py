"""A TCP proxy that can be a bad link; scripts/chaos uses the same."""

from scripts.lib.chaos.link import CuttableLink

__all__ = ["CuttableLink"]
