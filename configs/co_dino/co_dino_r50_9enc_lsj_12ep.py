"""Co-DINO with nine encoder layers, ResNet-50, large-scale jitter, 12 epochs."""

from .co_dino_r50_lsj_12ep import data, dataloader, lr_multiplier, model, optimizer, train

model.encoder.update(num_layers=9, activation_checkpointing=True)
train.output_dir = "output/co_dino_r50_9enc_lsj_12ep"
