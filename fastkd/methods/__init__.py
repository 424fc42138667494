"""The distillation methods: one file a family."""
