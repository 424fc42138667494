"""Data sets that the methods run on."""
