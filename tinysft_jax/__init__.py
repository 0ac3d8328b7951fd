"""Supervised fine-tuning of small GPTs in JAX."""
