#!/usr/bin/env bash
# Train the small model `scenes`, which comes with the package: an Align-SGTR on generated scenes. It takes about two
# hours on one core. The argument is a new folder for all files. The model is in its subfolder `scenes`. EXTRA may hold
# further options of all runs. These try the script in two minutes:
#     EXTRA="--trainer.max_steps 2 --trainer.check_val_every_n_epoch 1 --trainer.limit_val_batches 1"
set -euo pipefail

sgalign=${SGALIGN:-sgalign}
configs=$(cd "$(dirname "$0")/../configs" && pwd)
out=${1:?the folder for all files}
mkdir "$out"
cd "$out"
sizes=(--model.init_args.dim 64 --model.init_args.heads 4 --model.init_args.ffn_dim 128)
sizes+=(--model.init_args.padded_size "[168, 168]")

# Checkpoints are written after each validation, so the numbers of steps are multiples of the steps between two of them.
# The detector trains twice. The second run starts from the weights of the first, and keeps its batch normalization.
"$sgalign" fit --config "$configs/detr_small.yaml" "${sizes[@]}" --trainer.max_steps 5264 \
    --model.init_args.learning_rate_drops "[5000]" --trainer.check_val_every_n_epoch 4 ${EXTRA:-}
"$sgalign" fit --config "$configs/detr_small.yaml" "${sizes[@]}" --trainer.max_steps 4512 \
    --model.init_args.detector_weights runs/detr_small/version_0/checkpoints/last.ckpt \
    --model.init_args.learning_rate 1.0e-3 --model.init_args.backbone_learning_rate 1.0e-3 \
    --model.init_args.learning_rate_drops "[4500]" --trainer.check_val_every_n_epoch 4 ${EXTRA:-}
"$sgalign" fit --config "$configs/align_sgtr_small.yaml" "${sizes[@]}" --trainer.max_steps 2244 --data.batch_size 8 \
    --model.init_args.detector_weights runs/detr_small/version_1/checkpoints/last.ckpt \
    --model.init_args.frozen "[detector]" --model.init_args.learning_rate 1.0e-3 \
    --model.init_args.backbone_learning_rate 1.0e-3 --model.init_args.learning_rate_drops "[1700]" \
    --trainer.check_val_every_n_epoch 2 ${EXTRA:-}

checkpoint=runs/align_sgtr_small/version_0/checkpoints/last.ckpt
"$sgalign" test --config "$configs/align_sgtr_small.yaml" "${sizes[@]}" --ckpt_path "$checkpoint" \
    ${EXTRA:-}
"$sgalign" export "$checkpoint" scenes --results runs/align_sgtr_small/version_1/metrics.csv --license apache-2.0
