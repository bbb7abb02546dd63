"""The parts of `rlhf ppo` that its loop is made of (recipes/ppo.py): its models, an iteration's numbers, its updates."""
