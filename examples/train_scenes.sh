#!/usr/bin/env bash
# Train the small model `scenes`, which comes with the package: an Align-SGTR on generated scenes. It takes about two
# hours on one core. The argument is a new folder for all files. The model is in its subfolder `scenes`.
set -euo pipefail

sgalign=${SGALIGN:-sgalign}
configs=$(cd "$(dirname "$0")/../configs" && pwd)
out=${1:?the folder for all files}
mkdir "$out"
cd "$out"
sizes=(--model.init_args.dim 64 --model.init_args.heads 4 --model.init_args.ffn_dim 128)

# The detector trains twice. The second run starts from the weights of the first, and keeps its batch normalization.
"$sgalign" fit --config "$configs/detr_small.yaml" "${sizes[@]}" --trainer.max_steps 6000 \
    --model.init_args.learning_rate_drops "[5000]" --trainer.check_val_every_n_epoch 4 ${QUICK:-}
"$sgalign" fit --config "$configs/detr_small.yaml" "${sizes[@]}" --trainer.max_steps 5500 \
    --model.init_args.detector_weights runs/detr_small/version_0/checkpoints/last.ckpt \
    --model.init_args.learning_rate 1.0e-3 --model.init_args.backbone_learning_rate 1.0e-3 \
    --model.init_args.learning_rate_drops "[4500]" --trainer.check_val_every_n_epoch 4 ${QUICK:-}
"$sgalign" fit --config "$configs/align_sgtr_small.yaml" "${sizes[@]}" --trainer.max_steps 2500 --data.batch_size 8 \
    --model.init_args.detector_weights runs/detr_small/version_1/checkpoints/last.ckpt \
    --model.init_args.frozen "[detector]" --model.init_args.learning_rate 1.0e-3 \
    --model.init_args.backbone_learning_rate 1.0e-3 --model.init_args.learning_rate_drops "[2000]" \
    --trainer.check_val_every_n_epoch 2 ${QUICK:-}

checkpoint=runs/align_sgtr_small/version_0/checkpoints/last.ckpt
"$sgalign" test --config "$configs/align_sgtr_small.yaml" "${sizes[@]}" --ckpt_path "$checkpoint"
"$sgalign" export "$checkpoint" scenes --results runs/align_sgtr_small/version_1/metrics.csv --license apache-2.0
