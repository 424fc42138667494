"""fastkd in the trainers of others, each in a module that imports it only when called: ``trl`` and ``transformers``."""
