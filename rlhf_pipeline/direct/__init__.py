"""The parts of `rlhf dpo` that its recipe is made of (recipes/dpo.py)."""
