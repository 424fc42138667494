"""Experiments of the papers, each of them run by one command."""
