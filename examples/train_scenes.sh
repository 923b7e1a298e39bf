#!/usr/bin/env bash
# Train the small model `scenes`, which comes with the package: an Align-SGTR on generated scenes. On one core, the
# third of the four trainings took 28 minutes, and the last one 29. The argument is a new folder for all files. The
# model is in its subfolder `scenes`. EXTRA may hold further options of all runs. These try the script in two minutes:
#     EXTRA="--trainer.max_steps 2 --trainer.check_val_every_n_epoch 1 --trainer.limit_val_batches 1"
set -euo pipefail

sgalign=${SGALIGN:-sgalign}
configs=$(cd "$(dirname "$0")/../configs" && pwd)
out=${1:?the folder for all files}
mkdir "$out"
cd "$out"

# Checkpoints are written after each validation, so the numbers of steps are multiples of the steps between two of them.
fit() { # configuration, steps, epochs between validations, learning rate, step at which it drops to a tenth, options
    "$sgalign" fit --config "$configs/$1.yaml" --trainer.max_steps "$2" --trainer.check_val_every_n_epoch "$3" \
        --model.init_args.learning_rate "$4" --model.init_args.backbone_learning_rate "$4" \
        --model.init_args.learning_rate_drops "[$5]" "${sizes[@]}" "${@:6}" ${EXTRA:-}
}
sizes=(--model.init_args.dim 64 --model.init_args.heads 4 --model.init_args.ffn_dim 128)
sizes+=(--model.init_args.padded_size "[168, 168]")

# The detector trains three times. A run that starts from weights keeps their batch normalization.
weights() { echo --model.init_args.detector_weights "runs/detr_small/version_$1/checkpoints/last.ckpt"; }
fit detr_small 5264 4 5.0e-4 5000
fit detr_small 4512 4 1.0e-3 4500 $(weights 0)
fit detr_small 4512 4 3.0e-4 3000 $(weights 1)
fit align_sgtr_small 5984 2 1.0e-3 4500 $(weights 2) --model.init_args.frozen "[detector]" --data.batch_size 8

checkpoint=runs/align_sgtr_small/version_0/checkpoints/last.ckpt
"$sgalign" test --config "$configs/align_sgtr_small.yaml" "${sizes[@]}" --ckpt_path "$checkpoint" ${EXTRA:-}
"$sgalign" export "$checkpoint" scenes --results runs/align_sgtr_small/version_1/metrics.csv --license apache-2.0
