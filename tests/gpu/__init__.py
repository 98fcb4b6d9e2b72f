"""What only an accelerator can prove; ``scripts/test-gpu`` runs it where there is one.

``LLM_MAGIC_TEST_DEVICE=cpu`` runs the same tests with small models on a machine without one.
"""
