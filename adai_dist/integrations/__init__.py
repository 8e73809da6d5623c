"""What connects the optimizers to engines of other projects. Nothing here is imported before the engine is."""
