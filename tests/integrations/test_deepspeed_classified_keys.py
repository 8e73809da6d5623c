"""Every key of a DeepSpeed configuration is run against the oracle, refused, or irrelevant to the step."""

from __future__ import annotations

import pytest

from tests.integrations.deepspeed_keys import found_keys

pytestmark = pytest.mark.deepspeed

# One word for every key, with the reason if it is irrelevant.
CLASSIFIED: dict[str, str] = {
    "run: against the oracle": """
        bf16 bf16.check_grad_overflow bf16.enabled bf16.immediate_grad_update
        checkpoint checkpoint.load_universal
        communication_data_type
        data_types data_types.buffer_dtype data_types.grad_accum_dtype data_types.param_dtype
        disable_python_gc dump_state memory_breakdown wall_clock_breakdown comms_logger flops_profiler
        expert_parallel expert_parallel.autoep_size expert_parallel.enabled expert_parallel.preset_model
        expert_parallel.use_grouped_mm
        fp16 fp16.auto_cast fp16.enabled fp16.hysteresis fp16.initial_scale_power fp16.loss_scale
        fp16.loss_scale_window
        gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor
        hybrid_engine hybrid_engine.enabled
        managed_gradient_accumulation prescale_gradients
        optimizer optimizer.params optimizer.type scheduler scheduler.params scheduler.type
        tensor_parallel tensor_parallel.autotp_size tensor_parallel.preset_model tensor_parallel.tp_overlap_comm
        tensor_parallel.vocab_parallel_lm_head
        torch_autocast torch_autocast.dtype torch_autocast.enabled torch_autocast.lower_precision_safe_modules
        train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism
        zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
        zero_optimization zero_optimization.allgather_bucket_size zero_optimization.allgather_partitions
        zero_optimization.compute_grad_norm zero_optimization.contiguous_gradients
        zero_optimization.enable_sanity_checks zero_optimization.leaf_module zero_optimization.leaf_module.classes
        zero_optimization.leaf_module.name_suffixes zero_optimization.leaf_module.names
        zero_optimization.log_trace_cache_warnings zero_optimization.memory_efficient_linear
        zero_optimization.offload_optimizer zero_optimization.offload_optimizer.buffer_count
        zero_optimization.offload_optimizer.device zero_optimization.offload_optimizer.nvme_path
        zero_optimization.offload_optimizer.pipeline_read zero_optimization.offload_optimizer.pipeline_write
        zero_optimization.offload_param zero_optimization.offload_param.device
        zero_optimization.overlap_comm zero_optimization.override_module_apply zero_optimization.parameter_alignment
        zero_optimization.reduce_bucket_size zero_optimization.reduce_scatter zero_optimization.round_robin_gradients
        zero_optimization.stage zero_optimization.stage3_allgather_sequential
        zero_optimization.stage3_max_live_parameters zero_optimization.stage3_max_reuse_distance
        zero_optimization.stage3_model_persistence_threshold zero_optimization.stage3_module_granularity_threshold
        zero_optimization.stage3_param_persistence_threshold zero_optimization.stage3_prefetch_bucket_size
        zero_optimization.stage3_use_all_reduce_for_fetch_params zero_optimization.sub_group_size
        zero_optimization.use_multi_rank_bucket_allreduce zero_optimization.zero_hpz_partition_size
        zero_optimization.zero_quantized_weights
    """,
    "refused: by adai_dist, at least for some values": """
        bf16.bf16_master_weights_and_grads bf16.bf16_optimizer_states fp16.fp16_master_weights_and_grads
        compile compile.deepcompile
        sequence_parallel_size data_parallel_size
        zero_optimization.elastic_checkpoint zero_optimization.offload_optimizer.ratio
        zero_optimization.offload_optimizer.super_offload zero_optimization.zenflow
        zero_optimization.zero_quantized_gradients
    """,
    "irrelevant: DeepSpeed refuses it, as removed or obsolete": """
        amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula
        progressive_layer_drop quantize_training sparse_attention sparse_gradients zero_optimization.legacy_stage1
    """,
    "irrelevant: has an effect only with a refused setting": """
        compile.debug_log compile.double_buffer compile.free_activation compile.free_activation_threshold
        compile.keep_all_input_tensors compile.keep_int_input_tensors compile.offload_activation
        compile.offload_activation_pin_memory compile.offload_opt_states compile.offload_parameters compile.passes
        compile.symmetric_memory compile.sync_after_allgather compile.sync_after_reduce compile.sync_before_allgather
        compile.sync_before_reduce
        zero_optimization.offload_optimizer.cpuadam_cores_perc
        zero_optimization.zenflow.auto_ratio zero_optimization.zenflow.full_warm_up_rounds
        zero_optimization.zenflow.offload zero_optimization.zenflow.overlap_step
        zero_optimization.zenflow.pt_reserved_cores_perc zero_optimization.zenflow.select_interval
        zero_optimization.zenflow.select_strategy zero_optimization.zenflow.steps_per_epoch
        zero_optimization.zenflow.topk_ratio zero_optimization.zenflow.update_interval
    """,
    "irrelevant: another spelling of a key above": """
        bfloat16 zero_optimization.cpu_offload zero_optimization.cpu_offload_param
        zero_optimization.cpu_offload_use_pin_memory zero_optimization.stage3_gather_fp16_weights_on_model_save
    """,
    "irrelevant: changes the forward and backward passes, not what is done with their gradients": """
        activation_checkpointing compile.autoep_non_moe data_types.keep_in_fp32_modules pipeline
        seq_parallel_communication_data_type
        expert_parallel.async_split_plan expert_parallel.combine_impl expert_parallel.comm_backend
        expert_parallel.comm_max_tokens_per_rank expert_parallel.comm_num_sm expert_parallel.comm_qp_margin
        expert_parallel.disable_triton_grouped_mm expert_parallel.expert_activation expert_parallel.expert_pattern
        expert_parallel.expert_tensor_parallel_size expert_parallel.expert_w1 expert_parallel.expert_w2
        expert_parallel.expert_w3 expert_parallel.gate_up_impl expert_parallel.has_shared_experts
        expert_parallel.load_balance_coeff expert_parallel.moe_layer_pattern expert_parallel.num_expert_groups
        expert_parallel.num_experts_attr expert_parallel.num_limited_groups expert_parallel.route_norm
        expert_parallel.route_scale expert_parallel.routed_scaling_factor expert_parallel.router_pattern
        expert_parallel.row_weighting_impl expert_parallel.score_apply expert_parallel.score_func
        expert_parallel.shared_experts_gate_pattern expert_parallel.shared_experts_pattern expert_parallel.top_k
        expert_parallel.top_k_attr expert_parallel.validate_folding_routing
        hybrid_engine.enable_cuda_graph hybrid_engine.inference_tp_size hybrid_engine.max_out_tokens
        hybrid_engine.pin_parameters hybrid_engine.release_inference_cache hybrid_engine.tp_gather_partition_size
        tensor_parallel.dtype tensor_parallel.injection_policy_tuple tensor_parallel.keep_module_on_host
        tensor_parallel.kernel_inject tensor_parallel.partition_config tensor_parallel.tp tensor_parallel.tp.mpu
        tensor_parallel.tp.tp_grain_size tensor_parallel.tp.tp_group tensor_parallel.tp.tp_size
        tensor_parallel.vocab_parallel_ce_backend
        weight_quantization zero_optimization.zero_quantized_nontrainable_weights
    """,
    "irrelevant: memory, files and their speed": """
        aio checkpoint.checkpoint_serialization checkpoint.parallel_write checkpoint.tag_validation
        checkpoint.use_node_local_storage checkpoint.writer datastates_ckpt
        zero_optimization.load_from_fp32_weights zero_optimization.offload_optimizer.fast_init
        zero_optimization.offload_optimizer.pin_memory zero_optimization.offload_param.buffer_count
        zero_optimization.offload_param.buffer_size zero_optimization.offload_param.max_in_cpu
        zero_optimization.offload_param.nvme_path zero_optimization.offload_param.pin_memory
        zero_optimization.pipeline_loading_checkpoint zero_optimization.save_muon_momentum_buffer_in_memory
        zero_optimization.stage3_gather_16bit_weights_on_model_save
    """,
    "irrelevant: part of the search for a loss scale, which the step reads": """
        fp16.consecutive_hysteresis fp16.min_loss_scale
    """,
    "irrelevant: data, measurements and messages": """
        autotuning comet csv_monitor data_efficiency dataloader_drop_last log_level steps_per_print tensorboard timers
        vocabulary_size wandb zero_optimization.ignore_unused_parameters
    """,
    "irrelevant: not used by DeepSpeed, or only by its own optimizers": """
        disable_allgather optimizer.legacy_fusion
    """,
}


def test_every_key_of_deepspeed_is_classified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    classified = [key for keys in CLASSIFIED.values() for key in keys.split()]
    assert len(classified) == len(set(classified)), "a key is classified twice"
    found = found_keys()
    assert sorted(found - set(classified)) == [], "keys that are not classified: run, refused or irrelevant?"
    assert sorted(set(classified) - found) == [], "keys that DeepSpeed has dropped"
