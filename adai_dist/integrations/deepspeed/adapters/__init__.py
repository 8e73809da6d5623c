"""All that this package knows about the inside of DeepSpeed.

- releases: the names that the adapters use and what they mean, by range of DeepSpeed's releases.
- names: the check that these names exist, when an optimizer is bound.
- zero_wrapper: the interface to ZeRO's optimizer wrappers; stage_1_and_2, stage_3 and bf16: its implementations.
- wrappers: the choice of the implementation.
- without_zero: who holds which parameters without ZeRO.
- engine: the settings of an engine.
- checkpoint_loading, nvme_checkpoint: loading of checkpoints with all states.
"""
