"""Linear recurrences in the place of attention, to compare with."""
