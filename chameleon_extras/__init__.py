"""What surrounds the model and is no part of it. Each file says at its top who needs it."""
