"""A plan to a trained run: the loop, the step, the objective."""
