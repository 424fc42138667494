"""The operators: what torch needs to know of each (fake, autograd), and a Python signature with defaults."""
