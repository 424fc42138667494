"""What ``fastkd demo`` runs: the experiment, its report and its figure."""
