"""What training, evaluation and generation do not need: nothing outside of this package imports it."""
