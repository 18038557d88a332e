"""What surrounds the model and is no part of it. Each other file says who needs it."""
