import torch  # noqa: F401

from fastkd import _C  # noqa: F401
