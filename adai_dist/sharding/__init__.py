"""What a rank holds of a model, and the one collective of a step."""
