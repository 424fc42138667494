"""Plain torch and numpy forms of every operator: the truth of the tests, the baseline of the benchmarks."""
