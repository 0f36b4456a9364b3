"""Settings of the training loop."""

import torch

train = dict(
    output_dir="output/run",
    # .pth or .pkl (Detectron2), or .safetensors; a file with only a backbone fills model.backbone.
    init_checkpoint="",
    # If it does not fit the model: "error"; "by_name", for other classes: class heads take over the
    # rows of classes with the same name; "reset": what does not fit keeps its initial values.
    init_checkpoint_mismatch="error",
    # With by_name: of classes that shall start from the rows of a class with another name, that
    # name, as {lorry: truck}; and how many times faster the rows of those learn that have none.
    init_checkpoint_classes={},
    new_class_rate=1.0,
    init_checkpoint_unsafe=False,  # True: let it run code; only for files of people you trust
    # Of a file that has averaged weights, too: "ema" or "raw". --resume continues with both.
    init_checkpoint_weights="ema",
    max_iter=90000,  # 12 epochs of COCO at total batch 16
    device="cuda" if torch.cuda.is_available() else "cpu",
    seed=0,
    amp=dict(enabled=False, dtype="bfloat16"),
    # Float32 on tensor cores (tf32); cuDNN's search for the fastest algorithm of each image size.
    cuda=dict(tf32=True, cudnn_benchmark=False),
    # Kernels that give the same numbers in every run; slower. What has none is named in a warning.
    deterministic=False,
    compile=False,  # torch.compile of encoder and decoder layers; costs a minute at the start
    clip_grad=dict(max_norm=0.1),  # L2 norm over all parameters; None: no clipping
    # Images per optimizer step, over all processes; the learning rate belongs to it.
    effective_batch_size=16,
    # Images that a process computes at a time; gradients are accumulated until the step has all of
    # its images. None: its whole share at once.
    images_per_gpu=None,
    # Where gradients are accumulated, heads that assign by what they predict (Faster R-CNN, PAA,
    # GFL) run once more in advance, to count what their losses are divided by in the whole step.
    # False: they count for each part by itself, which is faster.
    exact_counts=True,
    # Parts that stay as they are, by names of parameters or parts, as ["backbone.bottom_up"] or
    # ["*.sampling_offsets.*"]; see co_detr/engine/freezing.py.
    freeze=[],
    # Average of the weights, which evaluation then uses; decay grows over warmup_iterations.
    ema=dict(enabled=False, decay=0.9997, warmup_iterations=2000),
    # Steps in a row that are skipped because a loss or the gradient is NaN or infinite.
    non_finite=dict(max_skips=5),
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    # How long one process waits for another, which may be evaluating or saving, until it gives up.
    process_timeout_minutes=30,
    checkpointer=dict(period=5000, max_to_keep=20),
    eval_period=7500,  # one epoch of COCO; 0: only at the end
    # Of metrics.json; its best value is kept as model_best.pth. None: no best checkpoint.
    best_metric="AP",
    # Ends after so many evaluations in a row in which best_metric gains no more than min_delta.
    early_stop=dict(patience=None, min_delta=0.0),
    # At every evaluation also the training losses on the val set, as val_loss/*; changes nothing in
    # the training. max_images: so many, evenly spread; None: all.
    val_loss=dict(enabled=False, max_images=None),
    log_period=20,
    # Experiment trackers, whose packages are not installed with this project.
    wandb=dict(enabled=False, project="co-detr", name=None, mode=None),
    mlflow=dict(enabled=False, experiment="co-detr", name=None, tracking_uri=None),
)
