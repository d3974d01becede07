"""The option that a mistaken name means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# The names that other programs give to an option, without their section. A name may stand at several options.
OTHER_NAMES = {
    "run.directory": "output_dir output out_dir out save_dir name run_name experiment_name",
    "run.resume": "resume_from_checkpoint continue",
    "run.seed": "random_seed data_seed",
    "model.path": "name model_name model_name_or_path model_path name_or_path pretrained base_model",
    "model.reference": "ref_model reference_model ref_path",
    "model.train": "train_tower freeze_tower freeze_encoder freeze_audio_encoder freeze_audio",
    "model.dtype": "bf16 fp16 precision torch_dtype mixed_precision",
    "model.attention": "attn_implementation flash_attention",
    "model.compile": "torch_compile use_torch_compile compile_model",
    "model.recompute": "gradient_checkpointing activation_checkpointing",
    "lora.rank": "r lora_r",
    "lora.targets": "target_modules lora_target_modules modules",
    "lora.path": "adapter adapters adapter_path adapter_name_or_path",
    "sharding.offload": "cpu_offload offload_optimizer",
    "data.train": "train_file train_files train_data dataset data_path train_path dataset_path",
    "data.validation": "val val_file valid dev eval_file eval_data validation_file",
    "data.test": "test_file test_files test_data",
    "data.columns": "column_mapping rename_columns column_names text_column audio_column columns_mapping",
    "data.audio_root": "audio_dir audio_path audio_folder clips",
    "data.template": "prompt prompt_template chat_template system_prompt",
    "data.max_seconds": "max_duration max_audio_length max_audio_seconds duration",
    "data.workers": "num_workers dataloader_num_workers preprocessing_num_workers",
    "rollout.group_size": "num_generations num_samples num_completions n g samples_per_prompt num_return_sequences",
    "rollout.max_new_tokens": "max_tokens max_length max_completion_length max_response_length max_output_tokens",
    "reward.weights": "rewards reward_funcs reward_functions reward_weight accuracy format",
    "loss.kind": "algorithm algo adv_estimator loss_fn",
    "loss.advantage": "scale_rewards normalize_advantages whiten_rewards",
    "loss.ratio": "importance_sampling_level",
    "loss.ratio_cap": "delta clip_ratio_c",
    "loss.truncated": "mask_truncated_completions overlong_filter",
    "loss.kl": "kl_estimator kl_loss_type",
    "loss.kl_in": "use_kl_in_reward kl_in_reward",
    "loss.kl_target": "target_kl",
    "loss.reference_every": "sync_ref_model ref_model_sync_steps",
    "loss.reference_mix": "ref_model_mixup_alpha",
    "loss.entropy": "entropy_coef entropy_coeff ent_coef",
    "loss.importance_cap": "tis_imp_ratio_cap vllm_importance_sampling_cap",
    "loss.clip_low": "epsilon eps clip clip_range cliprange clip_eps clip_ratio epsilon_low",
    "loss.clip_high": "epsilon eps clip clip_range cliprange clip_eps clip_ratio epsilon_high",
    "loss.beta": "kl_coef kl_coeff kl_beta kl_weight kl_loss_coef kl_penalty",
    "loss.token_weights": "loss_type loss_agg_mode",
    "loss.inner_epochs": "mu num_iterations ppo_epochs",
    "optim.steps": "epochs num_epochs num_train_epochs max_steps total_steps num_steps iterations max_epochs",
    "optim.prompts_per_step": "batch_size train_batch_size global_batch_size batch",
    "optim.micro_batch": "batch_size per_device_train_batch_size gradient_accumulation_steps accumulation_steps",
    "optim.lr": "learning_rate peak_lr max_lr",
    "optim.lr_floor": "min_lr min_lr_rate min_lr_ratio",
    "optim.schedule": "scheduler lr_scheduler lr_scheduler_type",
    "optim.warmup_steps": "warmup warmup_ratio num_warmup_steps",
    "optim.weight_decay": "wd decay",
    "optim.clip_norm": "max_grad_norm grad_clip gradient_clipping gradient_clip_val clip_grad",
    "evaluation.every": "eval_steps eval_every eval_interval",
    "evaluation.batch": "eval_batch_size per_device_eval_batch_size",
    "checkpoint.every": "save_steps save_every save_interval save_freq",
    "checkpoint.keep": "save_total_limit",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """The `section.key` of `known` that `name` means, whatever its section is; two, where two may be meant."""
    known = list(known)
    name = name.lower().replace("-", "_").strip("_")
    section, _, key = name.rpartition(".")
    same = [option for option in known if option.endswith(f".{key}")]
    if same:
        return max(same, key=lambda option: _likeness(name, option))
    other = [option for option in known if key in OTHER_NAMES.get(option, "").split()]
    similar = [option for option in known if option.startswith(f"{section}.")]
    spelt = difflib.get_close_matches(name, similar, n=1, cutoff=0.85)
    within = [option for option in known if option.rpartition(".")[2] in key.split("_")]
    for meant in (spelt, _of(section, other), _of(section, within), other):
        if meant:
            return " or ".join(meant)
    return max(known, key=lambda option: _likeness(name, option))


def _of(section: str, options: list[str]) -> list[str]:
    return [option for option in options if option.startswith(f"{section}.")]


def _likeness(name: str, option: str) -> float:
    """How many words two names share, plus how far their letters agree (0 to 1), which decides between equals."""
    words, own = set(re.split("[._]", name)), set(re.split("[._]", option))
    return len(words & own) + difflib.SequenceMatcher(None, name, option).ratio()
