"""Around the model, never inside it: files in and out, few bits, many devices."""
