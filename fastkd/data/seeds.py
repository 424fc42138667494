"""Independent streams of random numbers out of one seed."""

from __future__ import annotations

from fastkd._seeding import mixed_generator, mixed_seed

__all__ = ["mixed_generator", "mixed_seed"]
