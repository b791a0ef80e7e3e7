"""The options of `loraplex train adapters` and `loraplex train mixture`: those of both, and those of each."""

from loraplex.cli.flag_groups import Flag, FlagGroup, JobFlag, settings_of
from loraplex.cli.options import Weights

_OPTIMIZATION = (
    Flag("learning_rate", float, 1e-3, "Learning rate of AdamW."),
    Flag("schedule", str, "cosine", "Learning rate over the steps: constant, linear or cosine."),
    Flag("warmup_steps", int, 0, "Steps in which the learning rate rises from 0."),
    Flag("weight_decay", float, 0.0, "Weight decay of AdamW."),
    Flag("max_grad_norm", str, "1", "Clip gradients to this norm; none: don't."),
    Flag("steps", int | None, None, "Optimizer steps; default 300."),
    Flag("epochs", int | None, None, "Epochs instead of steps."),
    Flag("batch_size", int, 16, "Records of one micro-batch."),
    Flag("gradient_accumulation", int, 1, "Micro-batches of a step."),
    Flag("seed", int, 0, "Seed of the first weights, the data's order and dropout."),
    Flag("max_length", int, 512, "Tokens of a record at most; longer ones lose the first."),
)
_EVALUATION = (
    Flag("patience", int | None, None, "Evaluations without gain before training stops."),
    Flag("eval_every", int, 50, "Steps between evaluations."),
    Flag("eval_fraction", float, 0.1, "Share of the records that is held out, without --eval-data."),
    Flag("eval_records", int, 256, "Records that are evaluated at most; of each domain of a mixture."),
)
_DTYPE = Flag("dtype", str, "float32", "Dtype of the base model: float32 or bfloat16.")
_WEIGHTS = Flag("weights", Weights, "auto")
_RUN = (
    Flag("checkpoint_every", int, 50, "Steps between checkpoints."),
    Flag("tokens_per_forward", int, 1024, "Largest forward pass, in padded tokens."),
    Flag("resume", bool, True, "Go on from the checkpoint in OUTPUT."),
    Flag("plots", bool, True, "Draw the losses."),
)

ADAPTERS = (
    FlagGroup(
        "Adapters",
        (
            JobFlag("kind", "lora (default), residual: a linked residual, or loreft."),
            JobFlag("layers", "Of residuals and LoReFT: layers such as 0,8-10; default all."),
            JobFlag("positions", "Of LoReFT: tokens of the prompt such as l1 or f7+l7 (default)."),
            JobFlag("rank", "Rank of the adapter; default 16, of LoReFT 4."),
            JobFlag("alpha", "LoRA alpha; default twice the rank."),
            JobFlag("targets", "Modules, joined by commas; default q,k,v,o_proj."),
            JobFlag("dropout", "LoRA dropout.", 0),
            JobFlag("dora", "true: DoRA, a magnitude for each output besides."),
            JobFlag("rslora", "true: rsLoRA, the LoRA scaling alpha/sqrt(rank)."),
        ),
    ),
    FlagGroup(
        "Loss",
        (
            JobFlag("loss", "cross_entropy (default), reward, or dpo: of chosen and rejected."),
            JobFlag("dpo_beta", "How strongly DPO keeps to its reference: --init-from, else the base model.", 0.1),
            JobFlag("turns", "Assistant turns that count: all (default) or last."),
        ),
    ),
    FlagGroup(
        "Optimization",
        (*settings_of(_OPTIMIZATION), JobFlag("lora_plus_ratio", "LoRA+: learning rate of B over that of A.", 1)),
    ),
    FlagGroup(
        "Evaluation",
        (
            *settings_of(_EVALUATION),
            JobFlag("keep_best", "true: write the weights of the best evaluation."),
            JobFlag("best_by", "What is best: loss (default) or exact_match."),
        ),
    ),
    FlagGroup(
        "Where they begin",
        (
            JobFlag("start", "lora (default), pissa or olora: of the base model's own."),
            JobFlag("init_from", "Adapter folder to start from."),
            JobFlag("after", "Train as the last of a link: folders of adapters that stay as they are: a+b:0.5."),
            JobFlag(
                "gates_before_user",
                "For experts: the gate of the tokens before the user's turn, 0 to 1 (default), or dropout: either.",
            ),
        ),
    ),
    FlagGroup(
        "How it is computed",
        (
            _DTYPE,
            Flag("device", str, "auto", "Where to compute: cpu, cuda, or auto: accelerate's choice."),
            _WEIGHTS,
            *_RUN,
            Flag("gradient_checkpointing", bool, False, "Run layers again in the backward pass, for less memory."),
            Flag("packing", bool, False, "Lay the records of a pass behind each other, without padding; exact."),
            Flag("fsdp", bool, False, "Share the base model's weights out over the processes of accelerate launch."),
            Flag("prompt_centroids", bool, True, "Write what prompts look like beside each LoRA, for adapters=auto."),
            Flag(
                "tracker",
                list[str] | None,
                None,
                "tensorboard, wandb or mlflow gets the log's numbers; may be repeated.",
            ),
            Flag(
                "push_to_hub",
                str | None,
                None,
                "User or organization on the hub, of a repository for each LoRA.",
            ),
            Flag("push_private", bool, False, "New repositories are private."),
        ),
    ),
)

MIXTURE = (
    FlagGroup(
        "Routers, with --router linear",
        (
            Flag("teacher", str | None, None, "Folder or hub id of an X-LoRA that teaches; its experts are taken."),
            Flag("first_weights", str | None, None, "noise (default), arrow, spectr, or kept (of --init-from)."),
            Flag("activation", str, "softmax", "softmax, or sigmoid for each expert."),
            Flag("top_k", int | None, None, "Keep so many experts of each token."),
            Flag("top_p", float | None, None, "Keep the fewest whose gates add up to it."),
            Flag("temperature", float, 1.0, "Divides the router's logits; below 1 is sharper."),
            Flag("shared", bool, False, "One router for all LoRA layers of one width."),
            Flag("train_experts", bool, False, "Train the experts with the router."),
            Flag("answer_weight", float, 1.0, "Weight of the answers in the loss."),
            Flag("gate_kl_weight", float, 1.0, "Weight of the teacher's gates in it."),
            Flag("logit_kl_weight", float, 0.0, "Weight of the teacher's logits in it."),
            Flag("z_loss_weight", float, 0.0, "Weight of the router z-loss in it."),
        ),
    ),
    FlagGroup(
        "X-LoRA's scaling head",
        (
            Flag("xlora_depth", int, 1, "Linear layers of the scaling head."),
            Flag("xlora_size", int, 2048, "Width of its hidden layers."),
            Flag("xlora_dropout_p", float, 0.2, "Dropout after its hidden layers."),
            Flag("layerwise_scalings", bool, False, "Other scalings in each LoRA layer."),
            Flag("enable_softmax", bool, True, "Softmax over the experts."),
            Flag("softmax_temperature", float, 1.0, "Divides the head's logits; below 1 is sharper."),
            Flag("top_k_lora", int | None, None, "Keep so many experts of each token."),
            Flag("enable_softmax_topk", bool, False, "Softmax over the kept ones."),
            Flag("scaling_pass_value", str, "0", "Scalings of the scaling pass; none: 1 / experts."),
            Flag("global_scaling_weight", float, 1.0, "Multiplies what every expert adds."),
            Flag("use_trainable_adapters", bool, False, "Train the experts too."),
            Flag("use_bias", bool, True, "Biases in the scaling head."),
            Flag("enable_relu_and_dropout", bool, True, "ReLU and dropout in the scaling head."),
            Flag("layout", str, "peft", "Folder format: peft or xlora (the original package's)."),
        ),
    ),
    FlagGroup("Optimization", _OPTIMIZATION),
    FlagGroup("Evaluation", _EVALUATION),
    FlagGroup(
        "Regularization",
        (
            Flag("load_balance_weight", float, 0.0, "Weight of the load balance in the loss."),
            Flag("sparsity_weight", float, 0.0, "Weight of the mean entropy of scalings or gates in it."),
            Flag("expert_dropout", float, 0.0, "Dropout on what each expert reads."),
        ),
    ),
    FlagGroup(
        "How it is computed",
        (
            _DTYPE,
            Flag("device", str, "cpu", "Where to compute: cpu or cuda."),
            _WEIGHTS,
            *_RUN,
            Flag("hidden_cache_bytes", int, 2 << 30, "Memory for hidden states of the scaling pass."),
        ),
    ),
)
