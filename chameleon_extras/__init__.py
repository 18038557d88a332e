"""What surrounds the model and never changes it. The first line of each file says what it does."""
