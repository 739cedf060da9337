"""Random and damaged inputs by the thousand: every one must give a right answer, or one line with exit code 2."""
