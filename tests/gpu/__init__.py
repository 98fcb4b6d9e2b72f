"""Tests that need an accelerator. ``scripts/test-gpu`` runs them.

``LLM_MAGIC_TEST_DEVICE=cpu`` runs the same tests with small models on a machine without one.
"""
