"""DeepSpeed: `"optimizer": {"type": "Adai"}`, exact under every ZeRO stage.

- registration: makes the names known to DeepSpeed, and binds every engine that is built with one of them.
- trainer, dropped: what the Trainer of transformers, and other engines, put in the place of an optimizer.
- support: which settings cannot be exact, and what to use instead.
- binding: ties the optimizer to the wrapper that DeepSpeed has put around it.
- zero_mean: the global mean of a step, from the norms that ZeRO has all-reduced anyway.
- zero: what the wrappers have in common and where they differ.
- universal: universal checkpoints that keep all states.
"""
