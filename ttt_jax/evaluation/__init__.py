"""Whether learning while reading helps: evaluations that a user of any model can run again."""
